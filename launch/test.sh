#!/usr/bin/env bash
# Every check of the project, stage by stage; with arguments, pytest alone with those arguments.
#
#   bash launch/test.sh
#   bash launch/test.sh tests/tree -k cut
#
# Tests marked `slow` or `gpu` are left out; name them: bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh --test
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

if (($#)); then
  exec pytest "$@"
fi

failed=()

# stage NAME COMMAND...: run it, say how long it took, remember a failure
stage() {
  local name=$1 began=$SECONDS outcome=passed
  shift
  printf '\n== %s\n' "$name"
  "$@" || { outcome=FAILED && failed+=("$name"); }
  printf '== %s %s in %d s\n' "$name" "$outcome" "$((SECONDS - began))"
}

# marked EXPRESSION: the tests of one marker; that there are none (exit code 5) is no failure
marked() {
  pytest -m "$1 and not slow and not gpu" || (($? == 5))
}

stage "ruff check" ruff check
stage "ruff format" ruff format --check
stage "mypy" mypy
stage "lint-imports" lint-imports
# these start no engine and no group of ranks, so that several files at once do not disturb one another
stage "tests" pytest -n auto --maxprocesses 4 --dist loadfile -m "not engine and not faults and not browser and not slow and not gpu"
stage "tests: engine" marked "engine and not faults and not browser"
stage "tests: faults" marked "faults and not browser"
stage "tests: browser" marked "browser"

if ((${#failed[@]})); then
  printf '\nfailed: %s\n' "$(IFS=,; printf '%s' "${failed[*]}")"
  exit 1
fi
printf '\nall passed in %d s\n' "$SECONDS"
