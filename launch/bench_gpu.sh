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
# wheels) are installed into a folder of their own first. To fetch them elsewhere, for the Python version of that machine:
#
#   bash launch/bench_gpu.sh --fetch-wheels 3.12
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
if [ "${1:-}" = --fetch-wheels ]; then
    version=${2:?give the Python version of the GPU machine, such as 3.12}
    exec "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" -d "$wheels" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        pydantic pydantic_core annotated_types typing_inspection pyyaml safetensors rich jinja2 markupsafe \
        markdown_it_py mdurl pygments datasets dill multiprocess xxhash trl accelerate
fi
if [ -d "$wheels" ]; then
    extra=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --target "$extra" "$wheels"/*.whl
    PYTHONPATH=$PYTHONPATH:$extra
fi
exec "$python" -m rmcore.bench gpu "$@"
