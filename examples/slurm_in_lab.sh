#!/usr/bin/env bash
# Run a job script of `mics new slurm`, as it stands, in a lab, where there is no Slurm:
#
#     mics lab up --nodes 2 --gpus-per-node 2 --name walk
#     bash examples/slurm_in_lab.sh walk job.sbatch
#
# The lab's nodes stand for those of the allocation. Slurm's warning before the time limit is
# `kill -USR1 "$(cat job.pid)"`. The functions do of Slurm's programs what such a script asks for.

# Run a program once in every node.
srun() {
    local step=() code=0
    while [[ $1 == --* ]]; do shift; done
    for node in $LAB_NODES; do
        mics lab exec "$node" --lab "$LAB" -- "$@" &
        step+=($!)
    done
    echo "${step[@]}" > job.step
    for process in "${step[@]}"; do
        wait "$process" || code=$?
    done
    return "$code"
}

scontrol() {
    case $1 in
        show) tr ' ' '\n' <<< "$LAB_NODES" ;;
        requeue) echo "Slurm would begin job $2 again: start it once more" ;;
    esac
}

# Asked for --signal=TERM alone.
scancel() { xargs kill -TERM < job.step; }

export -f srun scontrol scancel
nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$2")
LAB_NODES=$(seq -f 'node%g' -s ' ' 0 $((nodes - 1)))
export LAB=$1 LAB_NODES SLURM_JOB_ID=$$ SLURM_JOB_NODELIST=lab
SLURM_CPUS_ON_NODE=$(nproc)
export SLURM_CPUS_ON_NODE
echo $$ > job.pid
exec bash "$2"
