#!/usr/bin/env bash
# All tests, in an environment of their own making.
#
#   bash launch/test.sh [any argument of pytest]
#
# As root on Debian it first installs what the cluster and browser tests need (launch/test_packages.sh); elsewhere those tests say
# what they miss. TEST_WORKERS is the number of test files that run at once (default 2). See launch/environment.sh for VENV and PYTHON.
set -euo pipefail
EXTRAS=test
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
bash launch/test_packages.sh
ruff check .
ruff format --check .
lint-imports
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
