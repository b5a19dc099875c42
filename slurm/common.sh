# shellcheck shell=bash
# What the training scripts of this folder share: `train_on_slurm REPOSITORY OPTIONS...`, with the options of
# megatron_lpa.pretrain. docs/slurm.md describes what happens, the environment variables and
# the exit codes:
#
#   0 complete   1 the run folder cannot be written   2 wrong options   3 a node cannot train
#   4 no progress over several starts   5 SLURM refused to requeue   78 training would end like this again
#   143 stopped by SIGTERM; SLURM then shows CANCELLED, where it lets a job cancel itself
readonly EXIT_FOLDER=1 EXIT_OPTIONS=2 EXIT_HEALTH=3 EXIT_NO_PROGRESS=4 EXIT_NOT_REQUEUED=5 EXIT_REFUSED=78 EXIT_STOPPED=143

asked_by="" # USR1: save, then start again. TERM: save, then end.
signalled=""
training=""  # process id of the training step's srun
timers=()    # process ids of what ends a checkpoint that takes too long
asker=""     # process id of what repeats the signal until training ends
operators="" # folder of this job's compiled operators, unless the user named one

# The number of the last task of an array is that of the whole array, too.
own_job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}"
own_job="${own_job:-${SLURM_JOB_ID:-}}"

say() { printf '%s %s: %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "job $SLURM_JOB_ID" "$*"; }

fail() {
    local code="$1"
    shift
    echo "error: $*" >&2
    exit "$code"
}

# The batch script alone gets USR1 (sbatch --signal=B:USR1@..., scancel --batch --signal=USR1).
on_signal() {
    signalled=yes
    if [[ $asked_by != TERM ]]; then asked_by="$1"; fi
    if [[ -z $training ]]; then return; fi
    say "SIG$1: asking the training processes for a checkpoint"
    # Through SLURM, which reaches the processes on all nodes; srun takes a SIGTERM of its own for an order to kill.
    # It fails for a job that is cancelled, whose processes SLURM has told already.
    scancel --signal=TERM "$own_job" 2>/dev/null || true
    if [[ -z $asker ]]; then ask_again; fi
    if [[ $asked_by == USR1 ]]; then
        requeue_at_the_latest
    else # a job that was told to stop is not to start again
        end_timers
    fi
}

# A signal that comes while srun still starts the processes reaches none of them. A second one does no harm.
ask_again() {
    (
        trap - USR1 TERM
        while sleep 10; do scancel --signal=TERM "$own_job" 2>/dev/null || true; done
    ) &
    disown
    asker="$!"
}

end_timers() {
    if ((${#timers[@]})); then kill "${timers[@]}" 2>/dev/null || true; fi
    timers=()
}

# Once the time limit has ended the job, SLURM does not start it again. So a checkpoint that takes too long is given up.
requeue_at_the_latest() {
    local seconds="${SAVE_WITHIN_S:-540}" end
    end="$(squeue --noheader --jobs="$own_job" --format=%e)" || end=""
    if end="$(date --date="${end:-none}" +%s 2>/dev/null)"; then
        end=$((end - $(date +%s) - 60))
        seconds=$((end < seconds ? end : seconds))
    fi
    (
        trap - USR1 TERM
        sleep $((seconds > 5 ? seconds : 5))
        say "no checkpoint within $seconds s; starting again from the newest"
        scontrol requeue "$own_job"
    ) &
    disown
    timers+=("$!")
}

# Sets `run`. A disk that does not answer costs a job that was requeued no more than a few minutes.
find_run() {
    local attempt code
    for attempt in 1 2 3; do
        code=0
        run="$("${python[@]}" "$repository/tools/snapshot_run.py" \
            --processes "$processes" --job-script "${BASH_SOURCE[-1]}" "$@")" || code=$?
        if ((code == 0)); then return; fi
        if ((code != 1)); then exit "$EXIT_OPTIONS"; fi
        if ((restarts == 0 || attempt == 3)); then exit "$EXIT_FOLDER"; fi
        sleep "${HEALTH_PAUSE_S:-60}" &
        wait "$!" || true # a signal ends the wait
    done
}

# The step of the newest complete checkpoint; 0 without one, or where the disk does not say.
newest_step() { "${python[@]}" -m megatron_lpa.run_folder "$run" 2>/dev/null || echo 0; }

# How many starts in a row of this job, before this one, brought no newer checkpoint. A job that is submitted anew
# counts from 0: somebody looked at it.
count_idle_starts() {
    local job step count file="$run/logs/idle_starts"
    idle_starts=0
    if [[ -f $file ]] && read -r job step count <"$file" && [[ "$job $step $count" =~ ^[0-9]+\ [0-9]{1,15}\ [0-9]{1,15}$ ]] &&
        [[ $job == "$SLURM_JOB_ID" ]] && ((first_step <= 10#$step)); then
        idle_starts=$((10#$count + 1))
    fi
    # A link that has one of these names is removed or replaced, not followed.
    rm -f -- "$file.partial"
    if ! (set -o noclobber && echo "$SLURM_JOB_ID $first_step $idle_starts" >"$file.partial") ||
        ! mv --no-target-directory -- "$file.partial" "$file"; then
        fail "$EXIT_FOLDER" "$file cannot be written"
    fi
}

# Sets `logs`, a new folder: one that is there already is not this start's, and nothing in it is written or believed.
make_logs() {
    local number=1
    logs="$run/logs/$SLURM_JOB_ID.$restarts"
    while [[ -e $logs || -L $logs ]]; do
        number=$((number + 1))
        logs="$run/logs/$SLURM_JOB_ID.$restarts.$number"
    done
    mkdir -- "$logs" || exit "$EXIT_FOLDER"
}

# A process that was killed while it compiled an operator leaves a lock that everybody then waits for, for ever.
# So a job compiles in a folder of its own, where nothing else can be at work now, and which its later starts and all
# nodes find again where the home folder is shared. Not in the run folder: what is compiled is run, and that may come
# from a stranger.
own_operators() {
    local caches="${XDG_CACHE_HOME:-}"
    if [[ -n ${TORCH_EXTENSIONS_DIR:-} ]]; then return; fi
    if [[ $caches != /* ]]; then caches="${HOME:-}/.cache"; fi
    if [[ $caches == /.cache ]]; then fail "$EXIT_OPTIONS" "HOME is not set; set it, or TORCH_EXTENSIONS_DIR"; fi
    operators="$caches/megatron_lpa/operators-$SLURM_JOB_ID"
    export TORCH_EXTENSIONS_DIR="$operators"
    rm -f -- "$operators"/*/lock
}

stop_without_progress() {
    fail "$EXIT_NO_PROGRESS" "$1 starts of this job brought no checkpoint after step $first_step" \
        "(MAX_RESTARTS_WITHOUT_PROGRESS=$max_idle); see $run/logs. Mend the cause and submit the job again$(cause)"
}

check_health() {
    local gpus="$per_node"
    if [[ $device == cpu ]]; then gpus=0; fi
    timeout --kill-after=30 "${HEALTH_CHECK_S:-600}" \
        srun "${on_all_nodes[@]}" --ntasks="$nodes" --ntasks-per-node=1 --input=none \
        "${python[@]}" "$repository/tools/health_check.py" node --gpus "$gpus" "$@" |
        "${python[@]}" "$repository/tools/health_check.py" judge "${hosts[@]}"
}

# Once a job has trained, a node that is not ready may become so: memory that dying processes still hold, a slow mount.
# At the first start somebody is there to mend it.
wait_for_health() {
    local attempt
    for attempt in 1 2 3; do
        if check_health "$@" || [[ -n $asked_by ]]; then return; fi
        if ((restarts == 0)); then fail "$EXIT_HEALTH" "the nodes are not ready, so training was not started"; fi
        say "the nodes are not ready (attempt $attempt of 3)"
        if ((attempt < 3)); then
            sleep "${HEALTH_PAUSE_S:-60}" &
            wait "$!" || true # a signal ends the wait
        fi
    done
    start_again
}

# Sets MASTER_PORT to one that is free on the first node, which this script and rank 0 share. srun hands it to all nodes.
# Another one at each start: what takes a port may stay there. One that the user has named is taken if it is free.
choose_port() {
    local port
    port="$("${python[@]}" -m megatron_lpa.parallel.address ${MASTER_PORT:+"$MASTER_PORT"})" ||
        fail "$EXIT_OPTIONS" "there is no port at which the processes can meet"
    export MASTER_PORT="$port"
}

# Whether a process of this start has said that another start would end alike.
refused() { grep -q -s "^exit code $EXIT_REFUSED: " -- "$logs"/rank_*.log; }

# What the ranks' logs say went wrong; rank 0's is in this log already.
show_errors() {
    local log
    for log in "$logs"/rank_*.log; do
        if [[ -s $log && $log != "$first_log" ]] && grep -q -e '^error:' -e '^Traceback' -- "$log"; then
            echo "--- the end of $log:"
            tail -n 15 -- "$log"
            return
        fi
    done
}

# What the ranks' logs say went wrong first, to repeat it below the launcher's own lines. That another rank is gone says
# nothing of why.
cause() {
    local lines line
    lines="$(grep -h -s -m 1 '^error:' -- "$logs"/rank_*.log)" || return 0
    line="$(grep -v -m 1 'lost its connection to another process' <<<"$lines")" || line="${lines%%$'\n'*}"
    line="${line#error: }"
    echo ". Training said: ${line:0:1000}"
}

# A job that was stopped is not FAILED, which would call for somebody. Nor may it be COMPLETED: what waits for the trained
# model (--dependency=afterok) would start. So it ends as CANCELLED. SLURM itself may have decided otherwise by now (time
# limit, requeue, preemption), and then has the say.
end_stopped() {
    if ((status != EXIT_STOPPED)); then
        show_errors
        fail "$EXIT_STOPPED" "stopped, but not in order: what came after step $(newest_step) is lost$(cause)"
    fi
    local step at="before the first checkpoint"
    step="$(newest_step)"
    if ((step)); then at="at the checkpoint of step $step"; fi
    say "stopped $at; submit the same line again to continue"
    if [[ "$(squeue --noheader --jobs="$own_job" --format=%T)" == RUNNING ]]; then
        trap '' TERM
        scancel "$own_job" || true
    fi
    exit "$EXIT_STOPPED"
}

start_again() {
    local attempt
    if (($(newest_step) <= first_step && idle_starts >= max_idle)); then stop_without_progress $((idle_starts + 1)); fi
    for attempt in 1 2 3; do
        if scontrol requeue "$own_job"; then
            say "requeued"
            exit 0
        fi
        sleep $((attempt * 5))
    done
    fail "$EXIT_NOT_REQUEUED" "SLURM does not requeue this job; submit the same line again to continue"
}

train_on_slurm() {
    repository="$1"
    shift
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    device="${DEVICE:-gpu}"
    if [[ $device != gpu && $device != cpu ]]; then fail "$EXIT_OPTIONS" "DEVICE is $device; it is gpu or cpu"; fi
    max_idle="${MAX_RESTARTS_WITHOUT_PROGRESS:-3}"
    if [[ ! $max_idle =~ ^[0-9]+$ ]]; then
        fail "$EXIT_OPTIONS" "MAX_RESTARTS_WITHOUT_PROGRESS is $max_idle; it is a whole number"
    fi
    nodes="$SLURM_JOB_NUM_NODES"
    per_node="${SLURM_NTASKS_PER_NODE:-}"
    if [[ ! $per_node =~ ^[0-9]+$ ]]; then
        fail "$EXIT_OPTIONS" "the processes per node are not known; submit with --ntasks-per-node=N"
    fi
    processes=$((nodes * per_node))
    restarts="${SLURM_RESTART_COUNT:-0}"

    python=(python3)
    if [[ -x $repository/.venv/bin/python ]]; then python=("$repository/.venv/bin/python"); fi
    if [[ -n ${PYTHON:-} ]]; then python=("$PYTHON"); fi
    if [[ -n ${CONTAINER:-} ]]; then python=(apptainer exec --nv "$CONTAINER" "${PYTHON:-python}"); fi
    # The code of the folder the job was submitted from, whichever is installed; DeepSpeed's compiler needs ninja.
    export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
    if [[ ${python[0]} == */* ]]; then export PATH="${python[0]%/*}:$PATH"; fi
    if [[ $device == cpu ]]; then export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu; fi
    # Where sbatch --export=... left them out, bash has them for itself alone. And srun's output is to go where it is read.
    export PATH HOME="${HOME-$(cd ~ && pwd)}"
    unset SLURM_LABELIO SLURM_STDOUTMODE SLURM_STDERRMODE
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # On one machine nobody else needs to reach the processes.
    if ((${#hosts[@]} == 1)); then export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"; fi
    export MASTER_ADDR="${MASTER_ADDR:-${hosts[0]}}"

    # A run that must be new, or must not be, has answered that at its first start.
    if ((restarts > 0)); then set -- "$@" --train.resume auto; fi
    find_run "$@"
    make_logs
    first_log="$logs/rank_0000.log"
    first_step="$(newest_step)"
    count_idle_starts
    if ((idle_starts > max_idle)); then stop_without_progress "$idle_starts"; fi
    own_operators
    say "start $((restarts + 1)) on $(IFS=,; echo "${hosts[*]}"): $processes processes, logs in $logs"

    # ALL: sbatch --export=... counts for srun too, and would keep back what this script exports.
    on_all_nodes=(--nodes="$nodes" --distribution=block --mpi=none --export=ALL)
    wait_for_health "$@"

    if [[ -z $asked_by ]]; then
        choose_port
        # shellcheck disable=SC2016  # the variables of each task
        srun "${on_all_nodes[@]}" --ntasks="$processes" --ntasks-per-node="$per_node" --kill-on-bad-exit=1 --input=none \
            ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
            --open-mode=append --output="${logs//%/%%}/rank_%4t.log" \
            bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
                LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE; exec "$@"' rank \
            "${python[@]}" -m megatron_lpa.pretrain "$@" &
        training=$!
        if [[ -n $asked_by ]]; then on_signal "$asked_by"; fi # it came just before there was anything to pass it on to
        # scancel's SIGTERM reaches tail as well, which has to tell how training ends.
        (trap '' TERM && exec tail -n +1 -F --pid="$training" -- "$first_log" 2>/dev/null) &
        tail_process=$!
        wait_for_training
        training=""
        end_timers
        if [[ -n $asker ]]; then kill "$asker" 2>/dev/null || true; fi
        wait "$tail_process" || true
    else
        status=$EXIT_STOPPED
    fi

    if ((status == 0)); then
        say "complete"
        if [[ -n $operators ]]; then rm -rf -- "$operators"; fi
        exit 0
    fi
    say "training ended with exit code $status at the checkpoint of step $(newest_step)"
    if [[ $asked_by == TERM ]]; then end_stopped; fi
    if [[ -z $asked_by ]]; then
        show_errors
        if refused; then
            fail "$EXIT_REFUSED" "another start would end in the same way, so there is none; mend the cause and submit" \
                "the job again$(cause)"
        fi
    fi
    start_again
}

# Sets `status`. A trap ends bash's wait, not what it waits for; waiting again gives the exit code once more.
wait_for_training() {
    while true; do
        signalled=""
        status=0
        wait "$training" || status=$?
        if [[ -z $signalled ]]; then return; fi
    done
}
