#!/usr/bin/env bash
# One GPU, one call, under 9 minutes: exactness in bf16, the matrix ceiling, attention, training rates of Pythia shapes
# beside a padded loop and, where trl and datasets are installed, TRL's RewardTrainer, memory; written as one JSON file.
# Needs torch, transformers, pydantic and PyYAML, no network.
#
#   bash launch/bench_gpu.sh                       # rmcore/bench/results/gpu.json
#   bash launch/bench_gpu.sh --out /tmp/gpu.json --sections ceiling exactness
#   bash launch/bench_gpu.sh --peers ~/peers       # TRL from an environment of its own
#   bash launch/bench_gpu.sh --tiny                # every section on any machine, in seconds
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${RMCORE_PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec "$python" -m rmcore.bench gpu "$@"
