#!/usr/bin/env bash
# The whole story on this machine, offline once installed: train, unlearn with seven methods, evaluate, report.
#
#   bash launch/demo.sh [--output_dir runs/demo] [any option of `unlearn-ds demo`]
#
# See launch/environment.sh for VENV and PYTHON.
set -euo pipefail
EXTRAS=wandb,tune  # the search of `unlearn-ds forget`
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
exec unlearn-ds demo "$@"
