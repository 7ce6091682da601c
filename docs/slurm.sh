#!/bin/bash
# One run on several machines: sbatch docs/slurm.sh vith14 /data/imagenet runs/vith14
# A machine that fails or a job that is requeued goes on from the last checkpoint of train.output.
#SBATCH --job-name=ijepa
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=72:00:00
#SBATCH --requeue
#SBATCH --signal=SIGTERM@120

set -euo pipefail
recipe=$1 images=$2 output=$3
shift 3
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node 8 \
    --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" \
    -m ijepa.cli pretrain "$recipe" \
    --data.path "$images" \
    --data.workers 10 \
    --train.output "$output" \
    "$@"
