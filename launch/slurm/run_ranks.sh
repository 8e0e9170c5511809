# Sourced by the batch scripts: run Python on every task of the job, and do with the job what the run's exit code asks for.
#
#   run_ranks [arguments of python]     exits with the run's code, or requeues the job

VENV="${VENV:-.venv}"
if [ -f "$VENV/bin/activate" ]; then
    source "$VENV/bin/activate"
fi
PYTHON="${PYTHON:-python}"
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
job="${job:-$SLURM_JOB_ID}"
LOG_DIR="${LOG_DIR:-logs}/$job"
RESUMABLE=75 # unlearn_ds.cluster.signals.EXIT_RESUMABLE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

run_ranks() {
    mkdir -p "$LOG_DIR" || exit 1
    check_nodes || exit 1
    local attempt="${SLURM_RESTART_COUNT:-0}" code=0
    echo "job $job, start $((attempt + 1)), on $SLURM_JOB_NODELIST: $(date -Is)"
    # SLURM signals the tasks by itself. This shell must outlive them, and srun must not take SIGTERM for its own end: it would
    # kill the tasks before they have saved. A rank that dies brings the others down by itself, so srun need not do it
    # (--kill-on-bad-exit would also kill ranks that are about to end with the same code); --wait is for what happens before.
    local logs="${LOG_DIR//%/%%}" srun_args=() # in srun's names of files %t is a rank
    read -ra srun_args <<<"${SRUN_ARGS:-}"
    trap 'echo "the batch script was told to end: waiting for the tasks"' TERM USR1
    (
        trap '' TERM USR1
        exec srun --kill-on-bad-exit=0 --wait=60 --output="$logs/$attempt-%t.log" ${srun_args[@]+"${srun_args[@]}"} "$PYTHON" "$@"
    ) &
    local ranks=$!
    tail -n +1 -F --pid="$ranks" "$LOG_DIR/$attempt-0.log" 2>/dev/null &
    while true; do
        wait "$ranks" && code=0 || code=$?
        kill -0 "$ranks" 2>/dev/null || break # a signal ended the wait, not srun
    done
    wait # for tail's last lines
    echo "job $job: the ranks ended with code $code: $(date -Is)"
    case "$code" in
        0) exit 0 ;;
        "$RESUMABLE") requeue ;;
        2) show_logs "$attempt" && exit 2 ;;
    esac
    show_logs "$attempt"
    local crashes
    crashes=$(($(cat "$LOG_DIR/crashes" 2>/dev/null || echo 0) + 1))
    echo "$crashes" >"$LOG_DIR/crashes"
    if [ "$crashes" -le "${MAX_CRASHES:-3}" ]; then
        echo "job $job: crash $crashes"
        requeue
    fi
    exit "$code"
}

# On every node, before any model is loaded: the interpreter runs and the GPUs that SLURM granted are there.
check_nodes() {
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --overlap bash -c '
        "$0" -c "import unlearn_ds" || { echo "$(hostname): $0 cannot import unlearn_ds: set VENV or PYTHON" >&2; exit 1; }
        if command -v nvidia-smi >/dev/null && ! nvidia-smi >/dev/null; then
            echo "$(hostname): nvidia-smi fails: drain this node" >&2
            exit 1
        fi' "$PYTHON"
}

requeue() {
    local state
    state="$(scontrol show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*')"
    if [ "$state" != JobState=RUNNING ]; then
        # Cancelled, or about to be requeued by SLURM itself.
        echo "job $job: $state, so not requeued by this script"
        exit 0
    fi
    echo "job $job: requeued"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # SLURM ends this script
    exit 0
}

show_logs() {
    local log
    for log in "$LOG_DIR/$1"-*.log; do
        echo "--- the end of $log"
        tail -n 20 "$log"
    done
}
