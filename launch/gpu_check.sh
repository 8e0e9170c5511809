#!/usr/bin/env bash
# Everything that needs a GPU, in one command that brings its results home as one archive: versions, whole updates, loss kernels
# beside every installed peer, KL, a profile, the tests of the kernels.
#
#   bash launch/gpu_check.sh [OUT] [cuda|cpu] [STEP ...] [--budget_s 570] [--from results.tar.gz] [--list]
#
#   OUT           where the results go                               (default: output/gpu_check)
#   cuda | cpu    `cpu` walks through the same steps with small shapes, to check the script itself (default: cuda)
#   STEP          which of them                                      (default: all, in the order of what is wanted most)
#   --budget_s    seconds for this call: a case that would not fit is left for the next one
#   --from        results of an earlier call, on this machine or another: what they hold is not run again
#   --list        the steps, what is in them and how long they take, about 30 minutes in all
#
# OUT/results.tar.gz holds everything but the traces, and is whole after every case; OUT/results.json all rows, a failed case
# among them with its reason. The models are layers of Yi-6B at 4096 tokens with random weights: 12 of them, which 80 GB hold. Run it
# in an environment that has the package and pytest, on one GPU, without network (launch/gpu_wheels.sh fetches what may lack).
# The exit code is 0 if every case succeeded. PYTHON is the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m unlearn_ds.bench.gpu_check "$@"
