#!/usr/bin/env bash
# Tokenizes a corpus of many files: one array task per shard, and whoever finishes last merges the shards.
#
#   sbatch --array=0-29 slurm/prepare_pile.sh --input /data/pile/train --tokenizer /data/llama/tokenizer.model \
#       --append-eod --output-prefix /data/pile/train
#
# Everything after the script's name goes to tools/preprocess_data.py. Submit it from the repository. A task
# that was killed, ran out of time or was requeued goes on where it was when the same line is submitted again;
# finished shards are left alone. To repeat only some tasks, say how many shards there are:
#
#   SHARDS=30 sbatch --array=3,17 slurm/prepare_pile.sh ...
#
# Without SLURM, the script does all of it on this machine:
#
#   slurm/prepare_pile.sh --input ... --output-prefix ...
#
# It runs .venv/bin/python of the repository where there is one, else python3; PYTHON=... names another. A task
# that left out bad records ends with exit code 3, which SLURM calls FAILED; its data are complete all the same.
#
#SBATCH --job-name=prepare_pile
#SBATCH --array=0-29
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=24G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%A_%a.log
set -euo pipefail

# SLURM runs a copy of this script, whose place says nothing.
repository="$(dirname -- "${BASH_SOURCE[0]}")/.."
if [[ ! -f $repository/tools/preprocess_data.py ]]; then repository="${SLURM_SUBMIT_DIR:-$repository}"; fi
if [[ ! -f $repository/tools/preprocess_data.py ]]; then
    echo "error: $repository is not the repository; run sbatch from there" >&2
    exit 1
fi
python="${PYTHON:-}"
if [[ -z $python ]]; then
    python=python3
    if [[ -x $repository/.venv/bin/python ]]; then python="$repository/.venv/bin/python"; fi
fi

# Not every SLURM binds a task to its cores, so the tool cannot always see how many it has.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then set -- --workers "$SLURM_CPUS_PER_TASK" "$@"; fi
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    shards="${SHARDS:-}"
    if [[ -z $shards ]]; then
        shards="${SLURM_ARRAY_TASK_COUNT:?}"
        if ((${SLURM_ARRAY_TASK_MIN:?} != 0 || ${SLURM_ARRAY_TASK_MAX:?} != shards - 1)); then
            echo "error: the array has gaps, so the number of shards is not known;" \
                "submit with SHARDS=N in front" >&2
            exit 1
        fi
    fi
    set -- --shard "$SLURM_ARRAY_TASK_ID/$shards" --merge "$@"
fi
# exec: SLURM's SIGTERM at the time limit has to reach the tool, which then records how far it came.
exec "$python" "$repository/tools/preprocess_data.py" "$@"
