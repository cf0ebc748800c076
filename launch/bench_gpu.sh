#!/usr/bin/env bash
# Runs the benchmarks of one GPU in one call, in less than 9 minutes, and writes one JSON file: exactness in bf16, peak
# rate of matrix products, errors of the ops, attention, training rates of Pythia shapes compared with a padded loop and
# (if trl and datasets are installed) with TRL's RewardTrainer, and memory. Needs torch, transformers, pydantic and
# PyYAML, but no network.
#
#   bash launch/bench_gpu.sh                       # rmcore/bench/results/gpu.json
#   bash launch/bench_gpu.sh --out /tmp/gpu.json --sections ceiling exactness
#   bash launch/bench_gpu.sh --peers ~/peers       # TRL from its own environment
#   bash launch/bench_gpu.sh --tiny                # every section on any machine, in seconds
#
# What a machine without network does not have can be carried along: the wheels in the folder RMCORE_WHEELS (default:
# wheels) are installed into a folder of their own first. To fetch them, with the Python version of that machine:
#
#   pip download --no-deps -d wheels pydantic pydantic_core annotated_types typing_inspection pyyaml datasets dill \
#       multiprocess xxhash trl accelerate
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${RMCORE_PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
wheels=${RMCORE_WHEELS:-$root/wheels}
if [ -d "$wheels" ]; then
    extra=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --target "$extra" "$wheels"/*.whl
    PYTHONPATH=$PYTHONPATH:$extra
fi
exec "$python" -m rmcore.bench gpu "$@"
