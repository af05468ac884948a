#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: torch, numpy and megatron-core are enough.
#
#   bash launch/gpu_check.sh                    all parts
#   bash launch/gpu_check.sh exactness memory   some of them: exactness, memory, learner
#   bash launch/gpu_check.sh --cpu              a rehearsal without CUDA: the same commands, tiny sizes
#   PYTHON=python3.12 OUT=results bash launch/gpu_check.sh
#
# exactness: FlexAttention against dense attention in float64, forward and backward, bfloat16 and float32.
# memory: its peak memory and speed up to 64k tokens; memory must grow with the tokens, not with their square.
# learner: tree-packed against flat training of the same trees, at the size of Qwen2.5-0.5B and 1.5B, random weights.
#
# Everything goes to the folder $OUT (gpu_check): check.txt, JSON files of the first two parts, and a folder for each learner,
# numbered from the second time.
# Exit codes: 0, 1 a part failed (the others run all the same), 2 wrong words, or no CUDA and no --cpu.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
out=${OUT:-gpu_check}
on_cpu=
parts=()
for word in "$@"; do
  case "$word" in
    --cpu) on_cpu=yes ;;
    exactness | memory | learner) parts+=("$word") ;;
    *)
      echo "gpu_check: $word is no part; the parts are exactness, memory, learner, and --cpu rehearses" >&2
      exit 2
      ;;
  esac
done
((${#parts[@]})) || parts=(exactness memory learner)

if [[ $on_cpu ]]; then
  export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: $python sees no CUDA device; bash launch/gpu_check.sh --cpu rehearses without one" >&2
  exit 2
fi

failed=()

# part NAME COMMAND...: run it, say how long it took, remember a failure
part() {
  local name=$1 began=$SECONDS outcome=passed
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" || { outcome=FAILED && failed+=("$name"); }
  printf '== %s %s in %d s\n' "$name" "$outcome" "$((SECONDS - began))"
}

# learner SHAPE KEY=VALUE...: into a folder that is not there yet, as in another one the rounds it has would not be repeated
learner() {
  local shape=$1 folder=$out/learner-$1 number=1
  shift
  while [[ -e $folder ]]; do folder=$out/learner-$shape-$((++number)); done
  part "learner $shape" "$python" launch/bench.py learner "shape=$shape" "out=$folder" "$@"
}

run_parts() {
  "$python" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__, *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))'

  for name in "${parts[@]}"; do
    case "$name" in
      learner)
        if [[ $on_cpu ]]; then
          learner cpu branching=late width=4 depth=3 segment=8 prompt=8 rounds=1
        else
          # a microbatch holds a whole tree: 16 trajectories of 4096 tokens, 17k to 23k of them different
          sizes=(dtype=bfloat16 branching=spread,late width=16 segment=512 prompt=512 budget=24576 rounds=3)
          learner qwen2.5-0.5b "${sizes[@]}"
          learner qwen2.5-1.5b "${sizes[@]}" recompute=full
        fi
        ;;
      *) part "$name" "$python" -m treepo_async.bench.attention "$name" "out=$out" "size=$([[ $on_cpu ]] && echo small || echo full)" ;;
    esac
  done

  if ((${#failed[@]})); then
    printf '\nfailed: %s\n' "$(IFS=,; printf '%s' "${failed[*]}")"
    return 1
  fi
  printf '\nall passed in %d s; results in %s\n' "$SECONDS" "$out"
}

mkdir -p "$out"
run_parts 2>&1 | tee "$out/check.txt"
exit "${PIPESTATUS[0]}"
