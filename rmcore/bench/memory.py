"""Measures the peak memory of each rank while a large model is loaded, trained and exported.

Input: a Pythia shape, a number of ranks, a strategy.
Output: JSON with every rank's peak resident memory (the kernel's VmHWM) in each phase: start (imports only), load
(until the first step), train, export.
Example: pythia-1b under zero3 on 4 gloo ranks: 909 million parameters, 14.5 GB of fp32 state over all ranks.

The benchmark writes the shape with random weights, one weight at a time, as a directory of several safetensors files.
Then it runs torchrun on it: the embedded task, three steps, an export that is checked in parts. Each rank is a child
process; the mark of the kernel is reset between the phases, so that each peak belongs to its own phase. `--quick`
skips the self-test, which takes longer than some steps, and the export. The benchmark prints peaks only:
`rmcore.bench plan` compares them with predictions.
"""

import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import rmcore.training.assembly
import rmcore.training.publish
from rmcore.bench.measure import machine, own_child, parser, report, run_child, write_results
from rmcore.checkpoint.resume import choose_start
from rmcore.config import load_config
from rmcore.data.synthetic import byte_tokenizer
from rmcore.hf_export.weights import write_weights
from rmcore.model.reward_model import SHARED, RewardModel
from rmcore.parallel.world import all_gather_json, barrier, running_world
from rmcore.tracking.tracker import Tracker
from rmcore.train import train
from rmcore.training.assembly import assemble

# Model width, layers, heads, width of the MLP.
SHAPES = {
    "pythia-14m": (128, 6, 4, 512),
    "pythia-70m": (512, 6, 8, 2048),
    "pythia-160m": (768, 12, 12, 3072),
    "pythia-410m": (1024, 24, 16, 4096),
    "pythia-1b": (2048, 16, 8, 8192),
    "pythia-1.4b": (2048, 24, 16, 8192),
}


def main(arguments: list[str]) -> int:
    p = parser("memory", __doc__)
    p.add_argument("--shape", default="pythia-1b", choices=list(SHAPES))
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--strategy", default="zero3", choices=["ddp", "zero1", "zero2", "zero3", "hsdp"])
    p.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--pairs", type=int, default=8, help="pairs per step, over all ranks")
    p.add_argument("--tokens", type=int, default=512, help="budget of a micro batch")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings of the run")
    p.add_argument("--context", type=int, default=1, help="ranks that compute each row together")
    p.add_argument("--recompute", default="none", choices=["none", "selective", "full", "offload"])
    p.add_argument("--comparison", type=int, help="tokens of each comparison; default: the embedded task")
    p.add_argument("--quick", action="store_true", help="no self-test and no export: a few minutes for a 1b model")
    p.add_argument("--models", help="directory that keeps the written model; default: a temporary one")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/memory.json")
    options = p.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as scratch:
        model = Path(options.models or scratch) / options.shape
        if not (model / "tokenizer.json").exists():
            write_model(model, options.shape, options.comparison or 0)
        if options.comparison:
            write_comparisons(Path(scratch), options.comparison, options.steps * options.pairs)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc_per_node", str(options.ranks), *own_child("rmcore.bench.memory")[1:]]
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "models")}
        record = run_child(command, 1, {**settings, "model": str(model), "directory": scratch})
        record["files"] = len(list(model.glob("*.safetensors")))
    for rank in record["ranks"]:
        phases = ", ".join(f"{phase} {rank[phase] / 2**30:.2f}" for phase in ("start", "load", "train", "export"))
        print(f"rank {rank['rank']}: peak GiB {phases}")
    total = sum(max(rank["load"], rank["train"], rank["export"]) for rank in record["ranks"])
    print(f"all ranks: {total / 2**30:.2f} GiB; {record['parameters']:,} parameters; loss {record['losses']}")
    record = {"what": "memory", "machine": machine(), "settings": settings, **record, "sum_of_peaks": total}
    print(f"written: {write_results('memory', record, options.out)}")
    return 0


def write_comparisons(directory: Path, tokens: int, rows: int) -> None:
    """Writes pairs.jsonl: comparisons of so many computed tokens (bytes), in two answers of 256 and their prompt.

    One more row is short: on it the self-test compares gradients, in seconds.
    """
    draw = random.Random(1)
    letters = "abcdefgh "
    with (directory / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows + 1):
            lengths = (tokens - 512, 255, 255) if row else (64, 64, 64)
            prompt, chosen, rejected = (
                first + "".join(draw.choices(letters, k=length - 1))
                for first, length in zip("pcr", lengths, strict=True)
            )
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def write_model(directory: Path, shape: str, positions: int) -> None:
    """Writes a base model with random bf16 weights, in files of at most 400 MB, with a tokenizer of bytes.

    positions: at least so many, or 2,048.
    """
    hidden, layers, heads, intermediate = SHAPES[shape]
    tokenizer = byte_tokenizer()
    more: dict[str, Any] = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    more |= {"rotary_pct": 0.25, "dtype": "bfloat16"}
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=max(2048, positions),
        architectures=["GPTNeoXForCausalLM"],
        **more,
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    torch.manual_seed(1)

    def random_weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, size in shapes.items():
            norm = "norm" in name and name.endswith("weight")
            yield name, torch.ones(size) if norm else torch.randn(size) * (0.02 if len(size) > 1 else 0.0)

    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, shapes, torch.bfloat16, random_weights(), "400MB")
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    size = 2 * sum(math.prod(each) for each in shapes.values())
    print(f"written: {shape}, {size:,} bytes", flush=True)


def overrides_of(settings: dict[str, Any]) -> list[str]:
    """The config of the run that is measured."""
    directory, comparison = settings["directory"], settings.get("comparison")
    data = ["data.train.path=synthetic", "data.template=simple_chat", "data.max_tokens=256"]
    if comparison:
        data = [f"data.train.path={directory}/pairs.jsonl", "data.template=none", f"data.max_tokens={comparison}"]
    return [
        f"model.name={settings['model']}",
        *data,
        f"data.limit={settings['steps'] * settings['pairs'] + bool(comparison)}",
        f"data.cache={directory}/cache",
        f"batch.pairs={settings['pairs']}",
        f"batch.tokens={settings['tokens']}",
        f"run.max_steps={settings['steps']}",
        "run.evals=0",
        "run.save_minutes=null",
        f"run.dir={directory}/run",
        "log.every=1",
        "log.tensorboard=false",
        f"parallel.strategy={settings['strategy']}",
        f"parallel.precision={settings['precision']}",
        f"parallel.context={settings.get('context', 1)}",
        f"parallel.recompute={settings.get('recompute', 'none')}",
        *settings.get("set", []),
    ]


# --- the child: one rank of the run ----------------------------------------------------------------------------------


class Losses(Tracker):
    """A tracker that keeps the losses and writes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def log(self, moment: Any, metrics: Any) -> None:
        self.losses += [metrics["train/rm/loss"]] if "train/rm/loss" in metrics else []


def peak() -> dict[str, int]:
    """Resident bytes of this process, the most since the last call and now; resets the mark (Linux only)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return {"peak": found["VmHWM"], "now": found["VmRSS"]}


def shared_path(model: RewardModel, *_: Any, **__: Any) -> tuple[str, str]:
    """The path that the self-test finds for these models, without the test."""
    model.use(SHARED, pruned=True)
    return SHARED, "not tested"


def measure_rank(settings: dict[str, Any]) -> None:
    """One rank of the run. Rank 0 prints the peaks of all ranks."""
    config = load_config(None, overrides_of(settings))
    rmcore.training.publish.RELOAD_SHARE = 0.0  # the export is checked in parts, even if there is memory for more
    if settings.get("quick"):
        rmcore.training.assembly.choose_path = shared_path
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    with running_world(config.parallel.timeout_seconds, config.run.seed) as world:
        marks = {"start": peak()}
        state = assemble(config, world, choose_start(config, world))
        barrier(world)
        marks["load"] = peak()
        tracker = Losses()
        train(state, tracker)
        barrier(world)
        marks["train"] = peak()
        if not settings.get("quick"):
            rmcore.training.publish.publish(state, None, tracker)
        barrier(world)
        marks["export"] = peak()
        mine: dict[str, Any] = {"rank": world.rank, **{phase: mark["peak"] for phase, mark in marks.items()}}
        mine |= {f"{phase}_end": mark["now"] for phase, mark in marks.items()}
        ranks = all_gather_json(world, mine)
        if world.is_main:
            parameters = sum(p.numel() for p in state.strategy.named_parameters().values())
            batch = {"token_budget": state.token_budget, "lines": list(state.lines)}
            report({"ranks": ranks, "parameters": parameters, "losses": tracker.losses, **batch})


if __name__ == "__main__":
    measure_rank(json.loads(sys.argv[1]))
