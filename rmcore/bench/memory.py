"""python -m rmcore.bench memory: the peak memory of each rank while a large model is loaded, trained and exported.

Enters: a Pythia shape. Leaves: its random weights as a directory of several safetensors files, made a weight at a time;
then a real run under torchrun on it (the embedded task, three steps, the export checked in parts), of which every rank
tells its peak resident memory (the kernel's VmHWM) in three phases: until the first step, while training, while
exporting. Example: pythia-1b under zero3 on 4 gloo ranks: 909 million parameters, 14.5 GB of fp32 state over all ranks.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmcore.bench.measure import machine, own_child, run_child, write_results

SHAPES = {  # hidden, layers, heads, intermediate
    "pythia-14m": (128, 6, 4, 512),
    "pythia-70m": (512, 6, 8, 2048),
    "pythia-160m": (768, 12, 12, 3072),
    "pythia-410m": (1024, 24, 16, 4096),
    "pythia-1b": (2048, 16, 8, 8192),
    "pythia-1.4b": (2048, 24, 16, 8192),
}


def main(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m rmcore.bench memory", description="peak memory a rank")
    p.add_argument("--shape", default="pythia-1b", choices=list(SHAPES))
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--strategy", default="zero3", choices=["ddp", "zero1", "zero2", "zero3", "hsdp"])
    p.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--pairs", type=int, default=8, help="pairs a step, over all ranks")
    p.add_argument("--tokens", type=int, default=512, help="budget of a micro batch")
    p.add_argument("--models", help="directory to keep the made model in; default: a temporary one")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/memory.json")
    options = p.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as scratch:
        model = Path(options.models or scratch) / options.shape
        if not (model / "tokenizer.json").exists():
            write_model(model, options.shape)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc_per_node", str(options.ranks), *own_child("rmcore.bench.memory_rank")[1:]]
        asked = {key: value for key, value in vars(options).items() if key not in ("out", "models")}
        record = run_child(command, 1, {**asked, "model": str(model), "directory": scratch})
        record["files"] = len(list(model.glob("*.safetensors")))
    for rank in record["ranks"]:
        phases = ", ".join(f"{phase} {rank[phase] / 2**30:.2f}" for phase in ("start", "load", "train", "export"))
        print(f"rank {rank['rank']}: peak GiB {phases}")
    total = sum(max(rank["load"], rank["train"], rank["export"]) for rank in record["ranks"])
    print(f"all ranks: {total / 2**30:.2f} GiB; {record['parameters']:,} parameters; loss {record['losses']}")
    record = {"what": "memory", "machine": machine(), "settings": asked, **record, "sum_of_peaks": total}
    print(f"written: {write_results('memory', record, options.out)}")
    return 0


def write_model(directory: Path, shape: str) -> None:
    """A base model with random bf16 weights, a tokenizer of bytes, in files of at most 400 MB."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    from rmcore.data.synthetic import byte_tokenizer
    from rmcore.hf_export.weights import write_weights

    hidden, layers, heads, intermediate = SHAPES[shape]
    tokenizer = byte_tokenizer()
    more: dict[str, Any] = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    more["rotary_pct"] = 0.25
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=intermediate, max_position_embeddings=2048, architectures=["GPTNeoXForCausalLM"],
        dtype="bfloat16", **more,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    torch.manual_seed(1)

    def drawn() -> Iterator[tuple[str, torch.Tensor]]:
        for name, size in shapes.items():
            norm = "norm" in name and name.endswith("weight")
            yield name, torch.ones(size) if norm else torch.randn(size) * (0.02 if len(size) > 1 else 0.0)

    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, shapes, torch.bfloat16, drawn(), "400MB")
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    size = 2 * sum(math.prod(each) for each in shapes.values())
    print(json.dumps({"made": shape, "bytes": size}), flush=True)


def settings_of(record: dict[str, Any]) -> list[str]:
    """The overrides of the run that is measured."""
    directory = record["directory"]
    return [
        f"model.name={record['model']}", "data.train.path=synthetic", "data.template=simple_chat",
        "data.max_tokens=256", f"data.limit={record['steps'] * record['pairs']}", f"data.cache={directory}/cache",
        f"batch.pairs={record['pairs']}", f"batch.tokens={record['tokens']}", f"run.max_steps={record['steps']}",
        "run.evals=0", "run.save_minutes=null", f"run.dir={directory}/run", "log.every=1", "log.tensorboard=false",
        f"parallel.strategy={record['strategy']}", f"parallel.precision={record['precision']}",
    ]  # fmt: skip
