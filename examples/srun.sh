#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=10
# A program and its cluster in one job: sbatch srun.sh SCRIPT [ARG]...
# On the first of the hosts zmqsched runs the script, whose Client() finds the cluster; each host is a node of it.

exec srun --cpus-per-task="$SLURM_CPUS_PER_TASK" zmqsched run "$@"
