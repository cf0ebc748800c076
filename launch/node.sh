#!/usr/bin/env bash
# Trains on this machine with torchrun: one rank per GPU, or two ranks without GPUs. The arguments are those of
# `python -m rmcore.train`; the environment variables are those of multinode.sh.
#
#   bash launch/node.sh configs/hh.yaml optim.lr=1e-5
#   RANKS=4 bash launch/node.sh configs/hh.yaml
#   DRY_RUN=1 bash launch/node.sh configs/hh.yaml      # only prints the command
set -euo pipefail
unset HEAD
export NODES=1
exec bash "$(dirname "${BASH_SOURCE[0]}")/multinode.sh" "$@"
