#!/usr/bin/env bash
# Make .venv and install the pinned packages; nothing happens when that is done already.
#
#   bash launch/setup.sh [--test]     --test adds what launch/test.sh needs
#   PYTHON=python3.12 bash launch/setup.sh
#
# Exit codes: 2 wrong Python or argument, 3 too little disk, 4 pip failed (log: .venv/setup.log).
# A stamp, written last, holds the hash of the requirement file: without it an install is resumed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv log=.venv/setup.log python=.venv/bin/python
readonly needed_gib=6

fail() {
  local code=$1
  shift
  printf 'setup: %s\n' "$@" >&2
  exit "$code"
}

requirement_hash() { sha256sum "requirements/$1.txt" | cut -d ' ' -f 1; }

is_installed() {
  [[ -x $python && -f $venv/setup.$1.stamp ]] &&
    [[ $(<"$venv/setup.$1.stamp") == "$(requirement_hash "$1")" ]]
}

check_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null ||
    fail 2 "$1 is not Python 3.11 or 3.12 ($("$1" --version 2>&1 | tail -n 1))." "$2"
}

check_disk() {
  local free_kib
  free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
  ((free_kib >= needed_gib * 1024 * 1024)) ||
    fail 3 "$((free_kib / 1024 / 1024)) GiB free on the disk of $PWD; the packages need $needed_gib GiB."
}

# stage NAME COMMAND...: one line on the terminal, the command's own output in the log
stage() {
  local name=$1 began=$SECONDS
  shift
  printf 'setup: %-28s' "$name"
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  if ! "$@" >>"$log" 2>&1; then
    printf 'failed after %d s\n' "$((SECONDS - began))"
    explain_failure
  fi
  printf '%4d s\n' "$((SECONDS - began))"
}

explain_failure() {
  tail -n 5 "$log" | sed 's/^/  | /' >&2
  if grep -qiE 'connection|resolve|timed out|no matching distribution' < <(tail -n 40 "$log"); then
    fail 4 "pip could not get a package from its index. Check the network, and pip's own settings" \
      "(\`pip config list\`: index-url, proxy, cert). Then run this again: it resumes." \
      "The whole output is in $log."
  fi
  fail 4 "The whole output is in $log. Running this again resumes."
}

make_venv() {
  if [[ -x $python ]]; then
    check_python "$python" "Remove $venv and run this again with PYTHON=python3.11 or python3.12."
  else
    check_python "${PYTHON:-python3}" "Name one with PYTHON=/path/to/python3.11."
  fi
  check_disk
  mkdir -p "$venv"
  exec 9>"$venv/setup.lock"
  flock 9 # a second set-up waits for the first, and then finds its work done
  "$python" -m pip --version >/dev/null 2>&1 || stage "virtual environment" "${PYTHON:-python3}" -m venv "$venv"
}

pip_install() { "$python" -m pip --disable-pip-version-check --no-input install "$@"; }

warn_of_cuda_build() {
  command -v nvidia-smi >/dev/null && return
  [[ $("$python" -m pip --disable-pip-version-check list 2>/dev/null) == *$'\n'nvidia-* ]] || return 0
  printf 'setup: %s\n' \
    "pip chose the CUDA build of torch. It works here, but is some 3 GiB larger than needed." \
    "To get the CPU build, add PyTorch's CPU wheel index to pip's settings" \
    "(\`pip config set global.extra-index-url ...\`), remove $venv and run this again."
}

install_cpu() {
  stage "torch (the largest part)" pip_install -c requirements/cpu.txt "$(grep '^torch==' requirements/cpu.txt)"
  warn_of_cuda_build
  stage "SGLang, Megatron-Core, Ray" pip_install --no-deps -r requirements/cpu.txt
}

install_test() { stage "test tools" pip_install --no-deps -r requirements/test.txt; }

wanted=(cpu)
case "${1:-}" in
  '') ;;
  --test) wanted+=(test) ;;
  *) fail 2 "unknown argument $1; the only one is --test." ;;
esac

missing=()
for part in "${wanted[@]}"; do
  is_installed "$part" || missing+=("$part")
done
((${#missing[@]})) || exit 0

make_venv
for part in "${missing[@]}"; do
  is_installed "$part" && continue
  "install_$part"
  requirement_hash "$part" >"$venv/setup.$part.stamp"
done
printf 'setup: done in %d s\n' "$SECONDS"
