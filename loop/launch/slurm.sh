#!/bin/bash
# sbatch loop/launch/slurm.sh --output-dir DIR [flags of train.py]: trains in as many jobs as it takes.
# Ten minutes before the limit SLURM sends SIGUSR1; the run ends with a checkpoint, and the job queues itself again.
#SBATCH --job-name=qwen3-medical
#SBATCH --gpus=1
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
srun python train.py "$@" --resume
folder=$(python -m loop.start.command_line "$@")
if grep -q '"status": "interrupted"' "$folder/run_status.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
