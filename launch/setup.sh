#!/usr/bin/env bash
# Creates .venv in the root of the checkout, installs rmcore there and builds the C++ kernels. A second call returns at
# once if nothing has changed: .venv/rmcore-setup holds a hash of everything that the installation depends on, and the
# extras that are installed.
#
#   bash launch/setup.sh             # what training, evaluation and export need; quickstart.sh calls it first
#   bash launch/setup.sh dev         # with the tools for the tests; test.sh calls it first
#   bash launch/setup.sh serve lora  # any extras of setup.py
#   PYTHON=python3.12 bash launch/setup.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# Prints the first Python that is new enough. If $PYTHON is set, it is the only candidate.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "rmcore needs Python 3.10 or newer; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true)." \
        "Set another one: PYTHON=/path/to/python3.12 bash launch/setup.sh"
}

# Prints a hash of what the installation depends on: the place of the checkout, Python, torch, requirements, kernels.
fingerprint() {
    .venv/bin/python - "$root" <<'PYTHON'
import hashlib, importlib.metadata, pathlib, sys

root = pathlib.Path(sys.argv[1])
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    torch = "none"
digest = hashlib.sha256(f"{root}\n{sys.version}\n{torch}\n".encode())
files = [root / name for name in ("setup.py", "constraints.txt", "CMakeLists.txt")]
for path in files + sorted((root / "rmcore" / "csrc").rglob("*")):
    if path.is_file():
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
print(digest.hexdigest())
PYTHON
}

# Prints the requirements of the given extras of the installed rmcore, one per line.
requirements_of() {
    .venv/bin/python - "$@" <<'PYTHON'
import importlib.metadata, sys
from packaging.requirements import Requirement

for requirement in map(Requirement, importlib.metadata.requires("rmcore") or []):
    marker = requirement.marker
    if marker and "extra" in str(marker) and any(marker.evaluate({"extra": extra}) for extra in sys.argv[1:]):
        print(f"{requirement.name}{requirement.specifier}")
PYTHON
}

# $1: what is done; the rest: arguments of pip install. Prints only errors. pip would byte-compile every file of every
# package, one after the other, which takes longer than installing them.
install() {
    local start=$SECONDS what=$1
    shift
    say "$what ..."
    .venv/bin/python -m pip install -qq --no-input --disable-pip-version-check --no-compile -c constraints.txt "$@" \
        </dev/null || fail "$what failed (pip install $*); see pip's message above"
    say "$what: done in $((SECONDS - start)) s"
}

known=$(sed -n '/extras_require/,/^    }/s/^        "\([a-z0-9]*\)":.*/\1/p' setup.py | tr '\n' ' ')
for extra in "$@"; do
    case " $known" in
        *" $extra "*) ;;
        *) fail "setup.py has no extra $extra; it has: $known" ;;
    esac
done

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    say "creating .venv with $("$python" --version)"
    "$python" -m venv .venv || fail "$python -m venv failed: is the venv module installed (Debian: python3-venv)?"
fi
.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$root/.venv has $(.venv/bin/python --version 2>&1); rmcore needs Python 3.10 or newer: remove .venv and try again"
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null 2>&1 ||
    fail "$root/.venv has no pip: install the venv module (Debian: python3-venv), remove .venv and try again"

# The stamp: the fingerprint on its first line, the installed extras on its second.
stamp=.venv/rmcore-setup
stamped='' extras=''
if [ -f "$stamp" ]; then
    { read -r stamped && read -r extras; } <"$stamp" || true
fi
missing=()
for extra in "$@"; do
    case " $extras " in *" $extra "*) ;; *) missing+=("$extra") extras="${extras:+$extras }$extra" ;; esac
done

export PATH="$root/.venv/bin:$PATH" # the build finds ninja, and cmake if it comes from pip
# If the environment forbids Python to write byte code, every process would compile its modules again: write it here.
writes_none=${PYTHONDONTWRITEBYTECODE:-}
export PYTHONDONTWRITEBYTECODE=
if [ "$stamped" = "$(fingerprint)" ]; then
    [ ${#missing[@]} -gt 0 ] || exit 0
    mapfile -t requirements < <(requirements_of "${missing[@]}")
    install "installing the extras ${missing[*]}" "${requirements[@]}"
else
    tools=(setuptools wheel ninja)
    command -v cmake >/dev/null || tools+=(cmake)
    install "installing PyTorch (the largest download) and the build tools" torch "${tools[@]}"
    if ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
        say "no C++ compiler found: rmcore will run on its PyTorch reference kernels, which are slower on a CPU"
    fi
    install "installing rmcore and building its kernels" --no-build-isolation -e ".${extras:+[${extras// /,}]}"
    kernels=$(.venv/bin/python -c 'import rmcore.train; from rmcore import ops; print(ops.describe())')
    say "$kernels"
    case $kernels in
        *"not built"*) say "to see why: .venv/bin/python -m pip install -v --no-build-isolation -e ." ;;
    esac
fi
if [ -n "$writes_none" ] && [ ${#missing[@]} -gt 0 ]; then # the tests start hundreds of processes
    .venv/bin/python -m compileall -q -j 0 .venv/lib/python*/site-packages >/dev/null 2>&1 || true # some are templates
fi
printf '%s\n%s\n' "$(fingerprint)" "$extras" >"$stamp"
