#!/usr/bin/env bash
# Everything that only a GPU can show, in one go, on a machine with the `gpu` extra; torch, numpy and megatron-core are enough for most.
#
#   bash launch/gpu_campaign.sh                    all parts
#   bash launch/gpu_campaign.sh exactness learner  some of them; learner is learner-0.5b, learner-1.5b and learner-7b
#   bash launch/gpu_campaign.sh --cpu              a rehearsal without CUDA: the same commands, tiny sizes
#   PYTHON=python3.12 OUT=results bash launch/gpu_campaign.sh
#
# exactness: FlexAttention against dense attention in float64, forward and backward, bfloat16 and float32.
# memory: its peak memory and speed up to 64k tokens; memory must grow with the tokens, not with their square.
# step: updates of a learner on CUDA, over NCCL, against the same on a CPU.
# learner: tree-packed against flat training of the same trees, at the size of Qwen2.5-0.5B, 1.5B and 7B, random weights.
# profile: where the device's time goes in a pass of these.
# weights: a version's way from the learner through a folder in /dev/shm back to the device, a stage at a time.
# sampling: trees against independent responses of an SGLang server, the same sizes. Needs SGLang.
# run: a run of three updates. Needs SGLang and Ray.
#
# What treepo_async/bench/campaign.py leaves in the folder $OUT (gpu_campaign) and its exit codes stand there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
for word in "$@"; do
  [[ $word == --cpu ]] && export CUDA_VISIBLE_DEVICES=
done
exec "$python" -m treepo_async.bench.campaign "$@"
