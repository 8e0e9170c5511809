#!/usr/bin/env bash
# Train on this machine: DeepSpeed's launcher over all its GPUs (one process without a GPU).
#
#   bash launch/train.sh --config run.yaml [any option of `unlearn-ds train`]
#
#   NUM_GPUS      ranks to start                                   (default: the GPUs that nvidia-smi lists, else 1)
#   MASTER_PORT   port of the rendezvous                           (default: a free one)
#   MODULE        what the ranks run                               (default: unlearn_ds.train)
#   PYTHON        an interpreter that has unlearn_ds installed     (default: python; without it launch/environment.sh makes one)
#
# SIGUSR1 or SIGTERM to this script reaches the ranks, which the launcher itself would not do: they save a checkpoint at the next
# update and the script ends with code 75. The same command with --auto_resume goes on from there. When the script ends, however it
# ends, so do the ranks.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$HERE/..${PYTHONPATH:+:$PYTHONPATH}"
if ! "${PYTHON:-python}" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("unlearn_ds") and u.find_spec("deepspeed")))'; then
    source "$HERE/environment.sh"
    PYTHON=python
fi
PYTHON="${PYTHON:-python}"
NUM_GPUS="${NUM_GPUS:-$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)}"
if [ "$NUM_GPUS" -lt 1 ]; then
    NUM_GPUS=1
fi
exec "$PYTHON" -m unlearn_ds.cluster.launch --num_ranks "$NUM_GPUS" ${MASTER_PORT:+--master_port "$MASTER_PORT"} \
    "${MODULE:-unlearn_ds.train}" "$@"
