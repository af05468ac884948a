#!/usr/bin/env bash
# Install what is missing, then run: bash launch/quickstart.sh [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/python launch/run.py "$@"
