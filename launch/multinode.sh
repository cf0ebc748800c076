#!/usr/bin/env bash
# Trains on several machines: start the same command on each of them. They meet at HEAD (torchrun's c10d rendezvous).
# The arguments are those of `python -m rmcore.train`. run.dir must be on a disk that all machines share.
#
#   NODES=2 HEAD=10.0.0.1 bash launch/multinode.sh configs/hh.yaml parallel.strategy=hsdp run.dir=/shared/runs/hh
#   DRY_RUN=1 NODES=2 HEAD=10.0.0.1 bash launch/multinode.sh configs/hh.yaml      # only prints the command
#
#   NODES         number of machines                 HEAD          name or address of one of them, as all see it
#   RANKS         ranks per machine (its GPUs)       PORT          port of the rendezvous on HEAD (29400)
#   JOB           name of this job (rmcore)          RESTARTS      restarts after a failure (3)
#   SAVE_SECONDS  how long a save may take after SIGTERM, before torchrun kills the ranks (170)
#   LOCAL         address of this machine, if the others cannot resolve its name
#   INTERFACE     network interface for gloo and NCCL, if there are several
#   OMP_NUM_THREADS  CPU threads per rank (cores / ranks)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${RMCORE_PYTHON:-python}
[ -n "${RMCORE_PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

nodes=${NODES:?how many machines}
ranks=${RANKS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
# torchrun would set 1 thread per rank, whatever the number of cores.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

command=("$python" -m torch.distributed.run --nproc_per_node "$ranks")
if [ "$nodes" = 1 ] && [ -z "${HEAD:-}" ]; then
    command+=(--standalone)
else
    head=${HEAD:?name or address of the machine where they meet}
    command+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29400}" --rdzv-id "${JOB:-rmcore}")
    [ -z "${LOCAL:-}" ] || command+=(--local-addr "$LOCAL")
fi
# torchrun passes the first four on to the ranks by itself, and dies of the others (torch older than the setting ignores it).
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
# By default torchrun kills the ranks 30 s after SIGTERM, but a save may take longer.
command+=(--max-restarts "${RESTARTS:-3}" --shutdown-timeout "${SAVE_SECONDS:-170}" -m rmcore.train "$@")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "OMP_NUM_THREADS=$OMP_NUM_THREADS" "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
