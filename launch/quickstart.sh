#!/usr/bin/env bash
# From a bare clone to a trained, exported and used reward model, in minutes on two CPU cores: set-up, training on the
# embedded task with one rank per GPU (two ranks without GPUs), evaluation, export, and rewards from the exported model
# in plain transformers. The arguments are overrides of configs/quickstart.yaml; paths start at the root of the checkout:
#
#   bash launch/quickstart.sh
#   bash launch/quickstart.sh run.seed=2 parallel.strategy=zero2 run.dir=runs/quickstart-zero2
#
# Exits with an error if the held-out accuracy is below 0.95.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

say() { printf '[quickstart] %s\n' "$*"; }

python=${RMCORE_PYTHON:-$root/.venv/bin/python}
[ -n "${RMCORE_PYTHON:-}" ] || bash launch/setup.sh

run_dir=runs/quickstart
overrides=()
for argument in "$@"; do
    case $argument in
        run.dir=*) run_dir=${argument#run.dir=} ;;
        *) overrides+=("$argument") ;;
    esac
done

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
ranks=$((gpus > 0 ? gpus : 2))
threads=$((cores / ranks > 0 ? cores / ranks : 1))
say "training on the embedded task: $ranks ranks, $gpus GPUs, $threads threads per rank; the run is in $run_dir"
OMP_NUM_THREADS=$threads "$python" -m torch.distributed.run --standalone --nproc_per_node "$ranks" \
    -m rmcore.train configs/quickstart.yaml "run.dir=$run_dir" run.resume=never ${overrides[@]+"${overrides[@]}"}

say "rewards of the exported model in plain transformers:"
OMP_NUM_THREADS=$cores "$python" -W ignore - "$run_dir" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
run = Path(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
tokenizer = AutoTokenizer.from_pretrained(run / "model")
for line in (run / "samples.jsonl").read_text().splitlines()[-3:]:  # from the last evaluation; the texts end in EOS
    sample = json.loads(line)
    texts = [sample["prompt"] + sample["chosen"], sample["prompt"] + sample["rejected"]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        rewards = model(**batch).logits[:, 0].tolist()
    for kind, text, reward in zip(("chosen", "rejected"), texts, rewards, strict=True):
        print(f"    {reward:9.4f}  {kind:8}  {text}")
accuracy = json.loads((run / "run_status.json").read_text())["eval"]["accuracy"]
print(f"[quickstart] held-out accuracy {accuracy:.4f}")
if accuracy < 0.95:
    sys.exit("[quickstart] error: held-out accuracy is below 0.95, so something is wrong with this installation or its settings")
PYTHON

cat <<EOF

What to look at next, in $root
    the report         $run_dir/report.html, in any browser
    the metrics        $run_dir/metrics.jsonl, one JSON object per log interval
    learning curves    $python -m tensorboard.main --host localhost --logdir $run_dir/tensorboard
    samples            $run_dir/samples.jsonl: held-out pairs with their rewards, at each evaluation
    the model          $run_dir/model, with its card in README.md there; in Python:
                       AutoModelForSequenceClassification.from_pretrained("$run_dir/model")
    more metrics       $python -m rmcore.evaluate $run_dir/model synthetic data.split=test
    your own data      $python -m torch.distributed.run --nproc_per_node $ranks -m rmcore.train \\
                           model.name=Qwen/Qwen3-0.6B data.train.path=pairs.jsonl data.eval_fraction=0.1
EOF
