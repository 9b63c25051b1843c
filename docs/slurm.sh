#!/bin/bash
# One run over several nodes, on and on until it is done:  sbatch docs/slurm.sh RECIPE_OR_YAML RUN_DIR [--section.key VALUE ...]
# RUN_DIR lies on a file system that all nodes see.
#SBATCH --job-name=opd_fast
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
recipe=$1 run=$2
shift 2

newest() { find "$run/checkpoints" -maxdepth 1 -name 'round-*' 2>/dev/null | sort | tail -n 1; }

# A run that has begun goes on from its newest checkpoint, on as many nodes as this job has.
if [[ -f $run/config.yaml ]]; then
  arguments=(--resume "$run")
else
  arguments=("$recipe" --run-dir "$run" "$@")
fi
before=$(newest)

# The launcher ends workers that have not finished so many seconds after a signal: leave them the round in hand.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  -m opd_fast.train "${arguments[@]}"

if [[ -f $run/results.json ]]; then
  exit 0
elif [[ $(newest) == "$before" ]]; then
  echo "no checkpoint since the start: not queued again" >&2
  exit 1
fi
scontrol requeue "$SLURM_JOB_ID"
