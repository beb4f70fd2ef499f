#!/bin/bash
#SBATCH --job-name=headgate-70b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --output=slurm-%x-%j.out
# Two nodes, eight ranks on each. Sent TERM ten minutes before the limit: the run saves and, requeued, goes on where it was.
# Submit from the repository root, on a file system that both nodes see: sbatch recipes/scale/slurm/two_nodes.sh [RECIPE]
set -euo pipefail
recipe=${1:-recipes/scale/llama3_70b.yaml}
first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)
srun torchrun --nnodes "${SLURM_NNODES:-2}" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  --rdzv-id "$SLURM_JOB_ID" -m headgate.cli.main train "$recipe" &
child=$!
# wait again: the signal ends the first wait, and the run still has to save; at a time limit SLURM requeues nothing by itself
trap 'kill -TERM $child; wait $child || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' TERM
wait $child
