#!/usr/bin/env bash
# Runs other programs on rmcore's models, each in a Python environment of its own, and prints one table of the largest
# differences of rewards. A peer NAME is tests/peers/NAME.py, its environment .peers/NAME, made from tests/peers/NAME.txt:
# requirements of pip, and four kinds of comments: `# alone: PKG ...` (installed without its own requirements),
# `# python: PKG ...` (the same, without its CUDA extension), `# remove: PKG ...` (uninstalled at the end) and
# `# aside: PKG ...` (installed alone into the folder `aside` of the environment, which is not on Python's path). pip's
# own variables, such as PIP_INDEX_URL, are respected.
#
#   bash launch/peers.sh                # all peers
#   bash launch/peers.sh trl openrlhf   # some
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${RMCORE_PYTHON:-$root/.venv/bin/python}
[ -n "${RMCORE_PYTHON:-}" ] || bash launch/setup.sh dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say() { printf '[peers] %s\n' "$*"; }
# Prints the packages of the comments `# KIND: PKG ...` of a requirements file.
packages() { sed -n "s/^# *$1: *//p" "$2"; }

# Makes the environment of a peer, unless it was made from the same requirements.
prepare() {
    local place=.peers/$1 list=tests/peers/$1.txt
    cmp -s "$list" "$place/requirements.txt" && return
    say "$1: making $place"
    rm -rf "$place"
    "$python" -m venv "$place"
    local pip=("$place/bin/python" -m pip)
    "${pip[@]}" install -qq --no-input --no-compile -r "$list" || return 1
    local words
    read -ra words <<<"$(packages alone "$list" | tr '\n' ' ')"
    [ ${#words[@]} -eq 0 ] || "${pip[@]}" install -qq --no-input --no-compile --no-deps "${words[@]}" || return 1
    read -ra words <<<"$(packages python "$list" | tr '\n' ' ')"
    [ ${#words[@]} -eq 0 ] || env {MAMBA,CAUSAL_CONV1D}_{SKIP_CUDA,FORCE}_BUILD=TRUE \
        "${pip[@]}" install -qq --no-input --no-compile --no-deps --no-build-isolation "${words[@]}" || return 1
    read -ra words <<<"$(packages remove "$list" | tr '\n' ' ')"
    [ ${#words[@]} -eq 0 ] || "${pip[@]}" uninstall -qq -y "${words[@]}" || return 1
    read -ra words <<<"$(packages aside "$list" | tr '\n' ' ')"
    [ ${#words[@]} -eq 0 ] || "${pip[@]}" install -qq --no-input --no-compile --no-deps --target "$place/aside" "${words[@]}" || return 1
    cp "$list" "$place/requirements.txt"
}

names=("$@")
if [ ${#names[@]} -eq 0 ]; then
    for list in tests/peers/*.txt; do names+=("$(basename "$list" .txt)"); done
fi
failed=() results=()
for name in "${names[@]}"; do
    if [ ! -f "tests/peers/$name.txt" ]; then
        say "there is no tests/peers/$name.txt"
        exit 2
    fi
    work=.peers/work/$name
    rm -rf "$work"
    mkdir -p "$work"
    if ! prepare "$name"; then
        failed+=("$name (not installed)")
        continue
    fi
    say "$name"
    "$python" -m "tests.peers.$name" "$work" "$root/.peers/$name/bin/python" || failed+=("$name")
    results+=("$work/$name.jsonl")
done

"$python" -m tests.peers.table "${results[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    say "failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
    exit 1
fi
