# What the jobs of slurm/ share; sourced by each of them.
# shellcheck shell=bash
#
# Settings, from the site file (`memshare slurm`) or the environment of a plain `sbatch`:
#   MEMSHARE_ROOT     the work tree (default: where sbatch was called)
#   MEMSHARE_PYTHON   the command that runs Python, in words: a virtual environment's, or one that
#                     begins with a container's (default: .venv/bin/python of the work tree, whose
#                     path may hold blanks)
#   MEMSHARE_LOGS     folder of the logs (default: runs/slurm)
#   MEMSHARE_GRACE    seconds from the scheduler's warning until what runs gets SIGTERM (default: 150)
#   MEMSHARE_PROCESSES, MEMSHARE_ACCELERATE
#                     of train: processes a node (default: one a GPU, or one), and accelerate's
#                     configuration (default: the one in configs/accelerate/ that fits)

python=("$MEMSHARE_ROOT/.venv/bin/python")
[[ ${MEMSHARE_PYTHON:-} ]] && read -ra python <<< "$MEMSHARE_PYTHON"
export MEMSHARE_ROOT

warned='' cancelled=''
trap 'warned=yes' USR1 # here already: it would end a shell without a trap
trap 'cancelled=yes' TERM

say() { printf '%(%H:%M:%S)T %s\n' -1 "$*"; }

die() {
    say "error: $*" >&2
    exit 1
}

# Everything from here on goes to a log of this attempt. JOB/latest leads to the newest one's.
open_log() {
    local home=${MEMSHARE_LOGS:-runs/slurm}/$SLURM_JOB_NAME
    local job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    attempt=${SLURM_RESTART_COUNT:-0}
    mkdir -p "$home/$job"
    home=$(realpath "$home")
    log_file=$home/$job/attempt-$attempt.log
    stop_file=$home/$job/stop-$attempt
    rm -f "$stop_file"
    say "attempt $attempt, log: $log_file"
    exec >> "$log_file" 2>&1
    ln -sfn "$job/attempt-$attempt.log" "$home/latest" || true # array tasks race for it
    say "job $job, attempt $attempt, on $SLURM_JOB_NODELIST"
}

# The value of option $1 among the arguments that follow; empty where it is not given.
option() {
    local name=$1
    shift
    while (($#)); do
        case $1 in
            "$name") printf '%s' "${2:-}" && return ;;
            "$name="*) printf '%s' "${1#*=}" && return ;;
        esac
        shift
    done
}

# The address by which SLURM itself reaches node $1.
address() {
    local found
    found=$(scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p') || true
    [[ $found ]] || die "scontrol names no address of node '$1'"
    printf '%s' "$found"
}

# The first node of the allocation.
first_host() {
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
        die "scontrol can't expand SLURM_JOB_NODELIST='$SLURM_JOB_NODELIST'"
    printf '%s' "${hosts%%$'\n'*}"
}

# A port that is free on this node now, below those that the kernel deals out by itself (from 32768
# on): srun, started next, takes several of these, and so does whatever connects to somewhere.
free_port() {
    "${python[@]}" -c '
import contextlib, random, socket
for port in random.sample(range(10000, 32000), 100):
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("", port))
        print(port)
        break
else:
    raise SystemExit(1)' || die "no free port, or no Python: '${python[*]}'"
}

# The options --config and --set among the arguments, in the array `config_words`; and in `ports` more of
# them, which put the LLM servers that run here on ports that are free: others may serve on this node.
llm_ports() {
    local found
    config_words=() ports=()
    while (($#)); do
        case $1 in
            --config | --set) config_words+=("$1" "${2:?}") && shift ;;
            --config=* | --set=*) config_words+=("$1") ;;
        esac
        shift
    done
    found=$("${python[@]}" -m memshare.cli slurm ports "${config_words[@]}") ||
        die "no ports for the LLM servers; the reason is above"
    [[ $found ]] && mapfile -t ports <<< "$found"
    return 0
}

# Run a command to its end; its exit code is then in `code`. Once the scheduler warns (SIGUSR1) or
# cancels (SIGTERM), `$1 PID` asks it to stop; what still runs MEMSHARE_GRACE seconds later gets
# SIGTERM, so that there is time left to requeue the job. (serve/up.py, which that asked already,
# goes on stopping in order.)
supervise() {
    local ask=$1 deadline='' child
    shift
    "$@" < /dev/null &
    child=$!
    while kill -0 "$child" 2> /dev/null; do
        if [[ $warned$cancelled && ! $deadline ]]; then
            say "${cancelled:+cancelled }${warned:+warned }by SLURM: stopping"
            "$ask" "$child"
            deadline=$((SECONDS + ${MEMSHARE_GRACE:-150}))
        elif [[ $deadline ]] && ((SECONDS >= deadline)); then
            say "still running after ${MEMSHARE_GRACE:-150} s: ended"
            kill -TERM "$child" || true
            deadline=$((SECONDS + 10))
        fi
        sleep 1 || true # a trap runs when it is over; cancelling ends it, too
    done
    # shellcheck disable=SC2034  # for the caller
    wait "$child" && code=0 || code=$?
}

# Whether the job is to go on in a next attempt. A cancelled one is not; nor is one whom the
# scheduler requeues by itself.
interrupted() { [[ $warned && ! $cancelled ]]; }

# Put the job back into the queue: it goes on from where it stopped. Does not return.
requeue() {
    # The last task of an array has the array's number, by which all tasks would be requeued.
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    say "requeued; the next attempt goes on from here"
    trap '' TERM # requeueing ends this shell, too
    scontrol requeue "${job:-$SLURM_JOB_ID}" ||
        die "the job can't be requeued; submit it again to go on"
    exit 0
}

# Run serve/up.py with these arguments until it ends or SLURM ends it; does not return.
serve() {
    local port
    port=$(option --port "$@")
    [[ $port ]] || port=$(free_port) # others may serve on this node, too
    llm_ports "$@"
    # shellcheck disable=SC2317,SC2329  # called by supervise
    end() { kill -TERM "$1"; }
    supervise end "${python[@]}" "$MEMSHARE_ROOT/serve/up.py" "$@" "${ports[@]}" \
        --port "$port"
    say "serve/up.py ended with code $code"
    interrupted && requeue
    [[ $cancelled ]] && exit 0
    exit "$code"
}
