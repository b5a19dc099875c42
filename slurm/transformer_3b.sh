#!/usr/bin/env bash
# Trains the 3B Transformer that the low-dimensional model is compared with, on 2 nodes of 8 GPUs.
#
#   sbatch slurm/transformer_3b.sh --data.prefix /data/pile/train_text_document
#
# Submit it from the repository. Everything after the script's name goes to megatron_lpa.pretrain, after
# --preset 3b/transformer, and wins over it. Other sizes need options of sbatch only, in front of the script's name:
# --nodes=4, or --gpus-per-node=4 --ntasks-per-node=4. docs/slurm.md has the rest.
#
#SBATCH --job-name=transformer_3b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -euo pipefail

# SLURM runs a copy of this script, whose place says nothing.
repository="${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
if [[ ! -f $repository/slurm/common.sh ]]; then
    echo "error: $repository is not the repository; run sbatch from there" >&2
    exit 2
fi
# shellcheck source=/dev/null
source "$repository/slurm/common.sh"
train_on_slurm "$repository" --preset 3b/transformer "$@"
