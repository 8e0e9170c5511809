#!/usr/bin/env bash
# Train on several machines without a batch system: the deepspeed launcher over pdsh and ssh.
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
#   EXPORT        prefixes of variables that the ranks get         (default: NCCL_ GLOO_ CUDA_ TORCH_ DS_ HF_HOME HF_HUB_ OMP_
#                 UNLEARN_DS_). Keys do not belong there: they would show in every machine's process list. Log in instead.
#
# SIGUSR1 or SIGTERM to this script reaches the ranks of the first machine, which is enough: all ranks save a checkpoint at the
# next update and the script ends with code 75. The same command with --auto_resume goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/wait_for_ranks.sh
HOSTFILE="${HOSTFILE:-launch/hostfile}"
MODULE="${MODULE:-unlearn_ds.train}"
PYTHON="${PYTHON:-python}"
MASTER_PORT="${MASTER_PORT:-$((20000 + (RANDOM * 32768 + RANDOM) % 20000))}"
EXPORT="${EXPORT:-NCCL_ GLOO_ CUDA_ TORCH_ DS_ HF_HOME HF_HUB_ OMP_ UNLEARN_DS_}"
if [ ! -f "$HOSTFILE" ]; then
    echo "launch/multinode.sh: no hostfile $HOSTFILE: copy launch/hostfile.example, put your machines in, set HOSTFILE" >&2
    exit 2
fi
first="$(grep -vE '^[[:space:]]*(#|$)' "$HOSTFILE" | head -n 1 | cut -d ' ' -f 1)"

# DeepSpeed's launcher hands the variables in this file to the ranks.
variables="$(mktemp)"
trap 'rm -f "$variables"' EXIT
for prefix in $EXPORT; do
    { compgen -e "$prefix" || true; } | while read -r name; do
        printf '%s=%q\n' "$name" "${!name}"
    done
done >"$variables"

DS_ENV_FILE="$variables" "$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --force_multi --launcher pdsh \
    --master_port "$MASTER_PORT" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} ${SSH_PORT:+--ssh_port "$SSH_PORT"} \
    --no_local_rank --module "$MODULE" "$@" &
launcher=$!

# The ranks are the children of the process that the launcher started there; the port tells it from other runs.
to_ranks() {
    local parents="^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*--master_port=$MASTER_PORT"
    ssh ${SSH_PORT:+-p "$SSH_PORT"} "$first" "for parent in \$(pgrep -f '$parents'); do pkill -$1 -P \$parent; done" || true
}
wait_for_ranks "$launcher"
