#!/bin/bash
# One node's part of train.sbatch: `accelerate launch` with what only this node knows.
# Usage: node.sh ADDRESS PORT PROGRAM [ARGUMENT...]; ADDRESS and PORT are the first node's.
set -euo pipefail
# shellcheck source=slurm/common.sh
source "$MEMSHARE_ROOT/slurm/common.sh"

head=$1 port=$2
shift 2
gpus=${SLURM_GPUS_ON_NODE:-0}
here=${MEMSHARE_PROCESSES:-$((gpus > 0 ? gpus : 1))}
total=$((here * SLURM_NNODES))
threads=$((SLURM_CPUS_ON_NODE / here))

if ((gpus && total > 1)); then
    settings=ddp
elif ((gpus)); then
    settings=gpu
elif ((total > 1)); then
    settings=cpu2
else
    settings=cpu
fi
settings=${MEMSHARE_ACCELERATE:-$MEMSHARE_ROOT/configs/accelerate/$settings.yaml}

# torchrun's options that accelerate does not have itself.
export PET_RDZV_ENDPOINT=$head:$port
export PET_RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
PET_LOCAL_ADDR=$(address "$SLURMD_NODENAME")
export PET_LOCAL_ADDR

# With one process the launcher would die of SIGTERM (preemption with a grace time), upon which srun
# kills what is left of the step: its rank, before it can stop. With several it waits for them; ranks
# take the signal either way.
((total == 1)) && trap '' TERM

exec "${python[@]}" -m accelerate.commands.launch --config_file "$settings" \
    --num_machines "$SLURM_NNODES" --num_processes "$total" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$head" --main_process_port "$port" --rdzv_backend c10d \
    --rdzv_conf "is_host=$((SLURM_NODEID == 0))" \
    --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))" "$@"
