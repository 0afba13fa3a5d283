#!/usr/bin/env bash
# Lint, type-check and test the working tree in an environment of its own.
#
#   bash scripts/test.sh                     everything
#   bash scripts/test.sh tests/test_box.py   arguments go to pytest
#   bash scripts/test.sh --lowest            with the lowest versions of what the package imports that it claims to
#                                            work with, in an environment beside the other (.venv-lowest); no lint or
#                                            types. From PyPI, torch 2.6 comes with its CUDA libraries: gigabytes
#
# Environment:
#   VENV     the virtual environment (default: .venv in the repository; made and filled when missing, and filled again
#            when pyproject.toml or constraints.txt change)
#   PYTHON   the interpreter it is made from (default: python3)
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/_venv.sh
source "$REPO/scripts/_venv.sh"
if [[ ${1:-} == --lowest ]]; then
  shift
  # Exported, since tests run scripts/launch_ddp.sh, which would fill the environment anew with the newest versions.
  export VENV=${VENV:-$REPO/.venv-lowest} CONSTRAINTS=$REPO/constraints-lowest.txt
  ensure_venv dev
  cd "$REPO"
  exec python -m pytest "$@"
fi
ensure_venv dev
cd "$REPO"

# One command a line: within an && list, set -e would let all but the last fail.
echo "ruff"
ruff check .
ruff format --check .
echo "mypy"
mypy
echo "pytest"
exec python -m pytest "$@"
