# Sourced by train.sh and multinode.sh: the launcher runs in the background, and a signal to the script reaches the ranks.
#
#   wait_for_ranks LAUNCHER      hands SIGUSR1 and SIGTERM to `to_ranks`, which the script defines; exits with the launcher's code

wait_for_ranks() {
    local code=0
    trap 'to_ranks USR1' USR1
    trap 'to_ranks TERM' TERM INT
    while true; do
        wait "$1" && code=0 || code=$?
        kill -0 "$1" 2>/dev/null || break # a signal ended the wait, not the launcher
    done
    exit "$code"
}
