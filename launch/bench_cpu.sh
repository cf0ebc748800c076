#!/usr/bin/env bash
# The CPU benchmarks of the README, in turn, on a machine that does nothing else: about two hours with 3 repetitions.
# Results go to rmcore/bench/results; `python -m rmcore.bench tables` prints them.
#
#   RMCORE_BENCH=~/bench PEERS=~/peers bash launch/bench_cpu.sh             # made by `python -m rmcore.bench prepare`
#   REPEAT=1 SECTIONS="train-small score" bash launch/bench_cpu.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${RMCORE_PYTHON:-$root/.venv/bin/python}
data=${RMCORE_BENCH:?a directory made by python -m rmcore.bench prepare}
results=${RESULTS:-rmcore/bench/results}
repeat=${REPEAT:-3}
peers=(${PEERS:+--peers "$PEERS"})

for section in ${SECTIONS:-train-small train-70m train-tldr score scaling profile}; do
    printf '[bench] %s\n' "$section"
    case $section in
        train-small) "$python" -m rmcore.bench train --model "$data"/models/{pythia-14m,llama-small} --data "$data/data/hh256.jsonl" \
            "${peers[@]}" --repeat "$repeat" --out "$results/train_small.json" ;;
        train-70m) "$python" -m rmcore.bench train --model "$data/models/pythia-70m" --data "$data/data/hh256.jsonl" \
            "${peers[@]}" --repeat "${REPEAT_70M:-1}" --out "$results/train_70m.json" ;;
        train-tldr) "$python" -m rmcore.bench train --model "$data"/models/{pythia-14m,llama-small} --data "$data/data/tldr256.jsonl" \
            "${peers[@]}" --arms best --precision fp32 --repeat "$repeat" --out "$results/train_tldr.json" ;;
        score) "$python" -m rmcore.bench score --model "$data"/models/{pythia-14m,llama-small,pythia-70m} --data "$data/data/hh256.jsonl" \
            --repeat "$repeat" --passes 1 --out "$results/score.json" ;;
        scaling) "$python" -m rmcore.bench scaling --model "$data/models/llama-small" --data "$data/data/hh256.jsonl" \
            --out "$results/scaling.json" ;;
        profile) for model in pythia-14m pythia-70m llama-small; do for precision in fp32 bf16; do
            "$python" -m rmcore.bench profile --model "$data/models/$model" --data "$data/data/hh256.jsonl" \
                --precision "$precision" --out "$results/profile_${model}_$precision.json"
            done; done ;;
        *) printf '[bench] unknown section %s\n' "$section" >&2; exit 2 ;;
    esac
done
