#!/bin/bash
# sbatch slurm.sh config.yaml [options of kdtrain fit, such as launch.config_file=fsdp2]
#SBATCH --job-name=kdtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one kdtrain on each machine; it starts a process for each of its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600          # ten minutes before the end kdtrain saves its state and ends
#SBATCH --requeue                  # and --resume auto goes on from there
set -euo pipefail
export HF_HOME="${HF_HOME:-$PWD/huggingface}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${machines%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))   # two jobs may share a machine
export first port
# In single quotes: SLURM_NODEID is known on each machine, not here.
srun --kill-on-bad-exit=1 bash -c 'exec kdtrain fit "$@" --resume auto launch.main_process_port=$port \
    --num-machines $SLURM_NNODES --machine-rank $SLURM_NODEID --main-process-ip $first' kdtrain "$@"
