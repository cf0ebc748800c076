#!/usr/bin/env bash
# Runs the tests of the C++ kernels under the address and undefined-behaviour sanitizers, in some minutes. Fails at the
# first access out of bounds. Needs GCC, whose sanitizer libraries are preloaded into Python, and `launch/setup.sh dev`.
#
#   bash launch/asan.sh
#   bash launch/asan.sh -k ragged      # arguments go to pytest
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${RMCORE_PYTHON:-$root/.venv/bin/python}
bin=$(dirname "$python")
export PATH="$bin:$PATH" OMP_NUM_THREADS=2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Copy the package and build its library with the sanitizers, under the name that rmcore.ops looks for.
cp -r rmcore tests pyproject.toml "$work"
rm -f "$work"/rmcore/ops/*.so
name=$("$python" -c 'from rmcore import ops; print(ops.cpu_library().stem)')
capability=$("$python" -c 'import sys; print(sys.argv[1].split("_")[2].upper())' "$name")
cmake -S . -B "$work/build" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRMCORE_CAPABILITY="$capability" -DRMCORE_NAME="$name" \
    -DRMCORE_TORCH_DIR="$("$python" -c 'import torch.utils; print(torch.utils.cmake_prefix_path)')" -DRMCORE_FIND_TORCH=OFF \
    -DRMCORE_OUTPUT_DIR="$work/rmcore/ops" -DRMCORE_SANITIZE=address,undefined >/dev/null
cmake --build "$work/build" --parallel 2

# No leak check: Python and torch keep memory until they exit. PYTHONMALLOC=malloc puts red zones around Python objects too.
cd "$work"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" PYTHONMALLOC=malloc \
    "$python" -m pytest -q -p no:cacheprovider tests/ops/test_pairwise.py tests/ops/test_ragged_attention.py \
    -k "${RMCORE_ASAN_TESTS:-not triton and not reference and not compile and not opcheck}" "$@"
echo "[asan] clean"
