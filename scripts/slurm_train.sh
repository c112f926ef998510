#!/usr/bin/env bash
#SBATCH --job-name=kernelwarehouse
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains under SLURM, one task for each GPU, and puts itself back into the queue until it is done:
#   sbatch --nodes 2 scripts/slurm_train.sh --kw_config configs/resnet18/kw4x_resnet18.json --data_path FOLDER \
#       --output_dir output/kw4x_resnet18
# Three minutes before the time is up SLURM sends SIGUSR1: the training finishes its step, saves its state in the output
# folder, which all nodes must share, and exits with status 75. The next job continues it from there.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the root of the project}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=0 .venv/bin/python main.py "$@"
status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
