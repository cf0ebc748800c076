#!/usr/bin/env bash
# Set-up, linter, type checker, then the whole test suite. Arguments go to pytest:
#
#   bash launch/test.sh
#   bash launch/test.sh tests/data/batches/test_step_plan.py -k balance
#
# Tests on real data look for the folder $RMCORE_SHARED and say that they skip when it is absent.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

python=${RMCORE_PYTHON:-$root/.venv/bin/python}
[ -n "${RMCORE_PYTHON:-}" ] || bash launch/setup.sh

say() { printf '[test] %s\n' "$*"; }

# One thread a process: distributed tests spawn ranks, and threads that wait for each other's cores spin.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# All three run, whatever the ones before say; each that fails is named at the end.
failed=()
say "ruff"
"$python" -m ruff check . || failed+=(ruff)
say "mypy"
"$python" -m mypy || failed+=(mypy)
say "pytest"
"$python" -m pytest -p no:cacheprovider -q "$@" || failed+=(pytest)

if [ ${#failed[@]} -gt 0 ]; then
    say "failed: ${failed[*]}"
    exit 1
fi
