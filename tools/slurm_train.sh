#!/usr/bin/env bash
#SBATCH --job-name=passl
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#
# passl-train on the nodes of a Slurm job; see usage below and docs/distributed.md.

set -uo pipefail

usage() {
    cat <<'TEXT'
usage: sbatch --nodes N --gpus-per-node G --cpus-per-task C --time T tools/slurm_train.sh -c CONFIG [-o KEY=VALUE ...]

Trains on all GPUs of a Slurm job: one launcher per node, one process per GPU (one on the CPU where there is none).
All arguments go to passl-train. Global.checkpoint=auto is always added, and Global.output_dir must be on storage that
all nodes share. Where the job is preempted or reaches its time limit, Slurm says so 120 s before; the run then saves,
and the job goes back to the queue, to go on from there. A run that fails stays failed.

  sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 tools/slurm_train.sh \
      -c configs/dino/dino_deit_small_patch16_224_pt_in1k_4n32c_dp_fp16o1.yaml

Environment: PYTHON (default: python), PASSL_TRAIN (default: passl-train on PATH, else tools/train.py of the folder that
sbatch was called in), PROCESSES_PER_NODE (default: the GPUs of each node).
TEXT
}

# Exit code of a run that was told to stop and saved: also passl-train's own, which the launcher hides.
readonly STOPPED=75

fail() {
    echo "slurm_train.sh: error: $1" >&2
    exit 2
}

# Waits for the process $1, however often a trap interrupts the waiting; sets $code.
wait_for() {
    while :; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || return 0
    done
}

# The part of one node, in a task of srun: the launcher. Told to stop, it returns STOPPED.
# shellcheck disable=SC2329 # srun calls it
run_node() {
    local processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}}}
    processes=${processes##*:} # a100:8
    local options=(--nproc_per_node "$processes" --log_dir "log/slurm-$SLURM_JOB_ID/node-$SLURM_NODEID")
    if [[ $SLURM_NNODES -gt 1 ]]; then
        options+=(--nnodes "$SLURM_NNODES" --rank "$SLURM_NODEID" --master "$PASSL_MASTER")
    fi
    local code=0 stopped=""
    # In a process group of its own: at a second signal the launcher would give its processes less time.
    set -m
    "$PYTHON" -m paddle.distributed.launch "${options[@]}" "$PASSL_TRAIN" "$@" &
    local launcher=$!
    trap '[[ -n $stopped ]] || kill -TERM "$launcher"; stopped=yes' TERM USR1
    wait_for "$launcher"
    [[ -n $stopped && $code -ne 0 ]] && return "$STOPPED"
    return "$code"
}

# Slurm says that the time is over. Through scancel: srun kills its tasks if it gets this signal itself.
# shellcheck disable=SC2329 # a trap calls it
on_signal() {
    [[ -n $interrupted ]] && return
    interrupted=yes
    echo "slurm_train.sh: told to stop; the run saves"
    scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || kill -TERM "$step"
}

if [[ $# -eq 0 ]]; then
    usage >&2
    exit 2
fi
for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        usage
        exit 0
    fi
done
[[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job: start it with sbatch, see --help"

export PYTHON=${PYTHON:-python} SLURM_NNODES=${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-1}}
PASSL_TRAIN=${PASSL_TRAIN:-$(command -v passl-train || echo "${SLURM_SUBMIT_DIR:-.}/tools/train.py")}
[[ -f $PASSL_TRAIN ]] || fail "no passl-train on PATH and no $PASSL_TRAIN: activate the environment, or set PASSL_TRAIN"
export PASSL_TRAIN

if [[ $SLURM_NNODES -gt 1 ]]; then
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol cannot expand $SLURM_JOB_NODELIST"
    first=${nodes%%$'\n'*}
    # By its address: Paddle's launcher compares that with its own to know where to listen.
    address=$("$PYTHON" -c 'import socket, sys; print(socket.gethostbyname(sys.argv[1]))' "$first") ||
        fail "the name of the first node, $first, has no address"
    # Below the ports that the system and the launcher take at random; another for each job on a node.
    export PASSL_MASTER=$address:$((10000 + SLURM_JOB_ID % 20000))
    echo "slurm_train.sh: $SLURM_NNODES nodes, master $first ($PASSL_MASTER), restart ${SLURM_RESTART_COUNT:-0}"
fi

export STOPPED
export -f run_node wait_for
options=(--nodes "$SLURM_NNODES" --ntasks-per-node 1 --export=ALL --kill-on-bad-exit=0)
# Nodes that are ready wait for the one that still saves; where one fails, the others end after this time.
options+=(--wait 300)
# srun no longer takes this from sbatch by itself.
[[ -n ${SLURM_CPUS_PER_TASK:-} ]] && options+=(--cpus-per-task "$SLURM_CPUS_PER_TASK")

interrupted=""
code=0
# shellcheck disable=SC2016 # expanded in the task
srun "${options[@]}" bash -c 'run_node "$@"' run_node "$@" -o Global.checkpoint=auto &
step=$!
trap on_signal TERM INT
wait_for "$step"

if [[ $code -eq 0 ]]; then
    echo "slurm_train.sh: finished"
elif [[ -n $interrupted || $code -eq $STOPPED ]]; then
    echo "slurm_train.sh: interrupted, back to the queue"
    scontrol requeue "$SLURM_JOB_ID" || fail "job $SLURM_JOB_ID was not requeued: submit it again, it goes on"
    code=$STOPPED
else
    echo "slurm_train.sh: failed with code $code, see log/slurm-$SLURM_JOB_ID" >&2
fi
exit "$code"
