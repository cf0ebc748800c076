#!/usr/bin/env bash
# Runs the benchmarks of one GPU in one call, in less than 9 minutes, and writes one JSON file: exactness in bf16, peak
# rate of matrix products, attention, training rates of Pythia shapes compared with a padded loop and (if trl and
# datasets are installed) with TRL's RewardTrainer, and memory. Needs torch, transformers, pydantic and PyYAML, but no
# network.
#
#   bash launch/bench_gpu.sh                       # rmcore/bench/results/gpu.json
#   bash launch/bench_gpu.sh --out /tmp/gpu.json --sections ceiling exactness
#   bash launch/bench_gpu.sh --peers ~/peers       # TRL from its own environment
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
exec "$python" -m rmcore.bench gpu "$@"
