#!/usr/bin/env bash
# Set-up, linter, formatter, type checker, then the whole test suite. Arguments go to pytest:
#
#   bash launch/test.sh
#   bash launch/test.sh tests/data/batches/test_step_plan.py -k balance
#
# Tests on real data read the folder $RMCORE_SHARED; they are skipped if it is missing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

python=${RMCORE_PYTHON:-$root/.venv/bin/python}
[ -n "${RMCORE_PYTHON:-}" ] || bash launch/setup.sh dev

say() { printf '[test] %s\n' "$*"; }

# One thread per process: distributed tests start several ranks, whose threads would compete for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# All four run, even if an earlier one fails; the last line lists those that failed.
failed=()
say "ruff check"
"$python" -m ruff check . || failed+=("ruff check")
say "ruff format"
"$python" -m ruff format --check . || failed+=("ruff format")
say "mypy"
"$python" -m mypy || failed+=(mypy)
say "pytest"
"$python" -m pytest -p no:cacheprovider -q "$@" || failed+=(pytest)

if [ ${#failed[@]} -gt 0 ]; then
    say "failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
    exit 1
fi
