#!/usr/bin/env bash
# Train on several machines without a batch system: one ssh to each, where DeepSpeed's launcher starts the ranks.
#
#   cp launch/hostfile.example hosts          # and put your machines in
#   HOSTFILE=hosts bash launch/multinode.sh --config run.yaml [any option of `unlearn-ds train`]
#
# Every machine needs the same path to this repository and to the interpreter, ssh to the others without a password, and a file
# system that all of them see for --output_dir.
#
#   HOSTFILE      machines and their GPUs                          (default: launch/hostfile)
#   MASTER_ADDR   address of the first machine                     (default: what `hostname -I` says there)
#   MASTER_PORT   port of the rendezvous there                     (default: one from 20000 to 39999, at random)
#   SSH_PORT      port of the ssh servers                          (default: 22)
#   MODULE        what the ranks run                               (default: unlearn_ds.train)
#   PYTHON        an interpreter that has unlearn_ds installed     (default: python)
#   EXPORT        names of variables that the ranks get, NCCL_* for all that begin so (default: EXPORT in unlearn_ds/cluster/hosts.py).
#                 Arguments and variables go through ssh: they stand on no command line but the ranks' and in no log. A name that
#                 looks like a secret (TOKEN, KEY, ...) goes only if it is named in full.
#
# SIGUSR1 or SIGTERM to this script reaches all ranks: they save a checkpoint at the next update and the script ends with code 75.
# The same command with --auto_resume goes on from there. When the script ends, however it ends, so do the ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
HOSTFILE="${HOSTFILE:-launch/hostfile}"
if [ ! -f "$HOSTFILE" ]; then
    echo "launch/multinode.sh: no hostfile $HOSTFILE: copy launch/hostfile.example, put your machines in, set HOSTFILE" >&2
    exit 2
fi
exec "${PYTHON:-python}" -m unlearn_ds.cluster.launch --hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    ${MASTER_PORT:+--master_port "$MASTER_PORT"} ${SSH_PORT:+--ssh_port "$SSH_PORT"} ${EXPORT:+--export "$EXPORT"} \
    "${MODULE:-unlearn_ds.train}" "$@"
