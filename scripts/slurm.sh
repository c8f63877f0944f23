#!/usr/bin/env bash
# Trains on several nodes under Slurm: one torchrun per node, one process per GPU (docs/scaling.md).
#
#     sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh --config configs/7b_reason_seg.yaml --exp_name first
#
# Arguments are those of train_ds.py. Run it from the repository, on a file system that all nodes share.
# A job that is preempted, loses a node or nears its time limit is queued again, and resumes from its last checkpoint
# (--auto_resume); save often, with --save_every. Not run on a cluster here.
#
#SBATCH --job-name=uground
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"
# shellcheck source=/dev/null
source .venv/bin/activate

# five minutes before the time limit; without this a job that is too long would end for good
requeue() {
    echo "the time limit is near: job $SLURM_JOB_ID is queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}
cpus=${SLURM_CPUS_PER_TASK:-$gpus}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cpus + gpus - 1) / gpus))}

# One port per job, so that two jobs on a node do not meet. SLURM_NODEID is set by srun on each node, not here.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task "$cpus" bash -c '
    exec torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$1" \
        --master_addr "$2" --master_port "$3" "${@:4}"
' torchrun "$gpus" "${nodes%%$'\n'*}" "$((20000 + SLURM_JOB_ID % 20000))" \
    train_ds.py --auto_resume true "$@" &
wait $! # in the background, as a trap runs only between commands
