#!/bin/bash
#SBATCH --job-name=headgate-gate-full
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=256G
#SBATCH --time=96:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --output=slurm-%x-%j.out
# The full run. Sent TERM five minutes before the limit: the run saves and, requeued, goes on where it was.
# Submit from the repository root: sbatch recipes/backward_gate/slurm/full.sh
set -euo pipefail
launch() {
  accelerate launch --config_file recipes/backward_gate/accelerate/8_gpu.yaml -m headgate.cli.main train "$1" &
  child=$!
  # wait again: the signal ends the first wait, and the run still has to save; at a time limit SLURM requeues nothing by itself
  trap 'kill -TERM $child; wait $child || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' TERM
  wait $child
}
launch recipes/backward_gate/full.yaml
