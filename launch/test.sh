#!/usr/bin/env bash
# All tests, in an environment of their own making.
#
#   bash launch/test.sh [any argument of pytest]
#
# See launch/environment.sh for VENV and PYTHON.
set -euo pipefail
EXTRAS=test
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
ruff check .
ruff format --check .
exec python -m pytest "$@"
