"""One run of training steps on the stand-in of `rmcore.bench nullgpu`.

Input: settings as JSON, in a process into which the stand-in is preloaded.
Output: one record: waits, launches, host milliseconds and bytes of the measured steps; and from one more step, the
time that a GPU would take at least (roofline.py).
Example: {"model": "1.4b", "strategy": "zero2", "waits": 0, "launches_per_layer": 102.3, "peak_gb": 64.2, ...}
"""

import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from rmcore.bench.gpu import SHAPES, TINY, neox
from rmcore.bench.gpu_train import rows_of_lengths
from rmcore.bench.measure import machine, report
from rmcore.bench.nullgpu.roofline import Trace, modelled
from rmcore.config.schema import Config
from rmcore.cost.dry_run import DryRun
from rmcore.cost.memory import choose_budget, keys_per_token, memory_of_step, token_bytes
from rmcore.data.batches.batch import AttentionLayout, RaggedBatch
from rmcore.data.batches.loader import Loader
from rmcore.data.batches.step_plan import Plan, work
from rmcore.model.backbone import turn_dropout_off
from rmcore.model.compiled import speed_up
from rmcore.model.reward_model import SHARED, RewardModel
from rmcore.parallel.make import make_strategy
from rmcore.parallel.world import World, running_world, use_deterministic_algorithms, use_expandable_segments

MEASURED = 2  # the last steps
MOST_TOKENS = 32768  # of a micro batch


def shape_of(name: str) -> PretrainedConfig:
    """Pythia shapes by name; `7b` is Mistral's: 32 query heads share 8 key heads; `gemma2` has 2b and soft caps.

    `gpt_oss` has the attention and the width of gpt-oss 20b, sinks and windows of 128 included, but 6 layers with 4
    experts.
    """
    if name in SHAPES | TINY:
        return neox((SHAPES | TINY)[name])
    if name == "gemma2":
        return AutoConfig.for_model("gemma2", pad_token_id=1, num_labels=1)  # transformers' defaults are this shape
    if name == "gpt_oss":
        few = {"num_hidden_layers": 6, "num_local_experts": 4}
        return AutoConfig.for_model("gpt_oss", pad_token_id=1, num_labels=1, **few)
    if name != "7b":
        raise ValueError(f"unknown shape {name}: {', '.join(SHAPES)}, 7b, gemma2 or gpt_oss")
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes |= {"intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768}
    return AutoConfig.for_model("mistral", sliding_window=4096, pad_token_id=1, num_labels=1, **sizes)


@contextmanager
def one_of(ranks: int) -> Iterator[World]:
    """This process as rank 0 of `ranks`; the collectives of absent ranks return at once."""
    if ranks == 1:
        with running_world(600.0, 0) as world:
            yield world
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    use_expandable_segments(os.environ)  # as `running_world` does
    torch.cuda.set_device(0)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    yield World(0, ranks, 0, ranks, torch.device("cuda", 0), 600.0)
    dist.destroy_process_group()


class Counters:
    """What the stand-in counted."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.nullcuda_launches.restype = ctypes.c_uint64
        self._library.nullcuda_flops.restype = ctypes.c_double

    def reset(self) -> None:
        self._library.nullcuda_reset()
        self._library.nullcuda_flops(1)

    @property
    def launches(self) -> int:
        return self._library.nullcuda_launches()

    @property
    def flops(self) -> float:
        """Of matrix products since the last `reset`."""
        return self._library.nullcuda_flops(0)

    def by_name(self) -> dict[str, int]:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "counts"
            self._library.nullcuda_dump(str(path).encode())
            lines = [line.rstrip("\n").split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: int(count) for count, name in lines}


def visible_pairs(layout: AttentionLayout) -> int:
    """Pairs of tokens of which one attends to the other."""
    lengths = ((end - start, until - since) for start, end, since, until in layout.segments_S4.tolist())
    return sum(own * prefix + own * (own + 1) // 2 for own, prefix in lengths)


def run(settings: dict[str, Any], world: World) -> dict[str, Any]:
    device, hf_config = world.device, shape_of(settings["model"])
    lengths = json.loads((Path(__file__).parents[1] / "lengths.json").read_text(encoding="utf-8"))
    data = rows_of_lengths(lengths[settings["rows"]], hf_config.vocab_size).data
    pairs, steps = settings["pairs"] * world.size, settings["steps"]
    parallel = {name: settings[name] for name in ("strategy", "precision", "recompute")}
    config = Config.model_validate(
        {
            "model": {"name": "random"},
            "data": {"train": {"path": "random"}},
            "batch": {"pairs": pairs},
            "parallel": parallel | {"compile": settings["compiled"]},
        }
    )

    if settings["deterministic"]:
        use_deterministic_algorithms(world)

    # The plan of the run, as rmcore.training.assembly makes it.
    longest = int(data.tokens_N.max())
    keys = keys_per_token(config, data.tokens_N, data.logical_tokens_N, longest)
    of_step = float(data.tokens_N.mean()) * pairs
    chosen = choose_budget(config, hf_config, longest, device, world.size, of_step, keys=keys)
    budget = max(longest, min(MOST_TOKENS, chosen.tokens))
    dry = DryRun(hf_config)
    per_token = token_bytes(config, dry, chosen.recompute, keys=keys)
    plan = Plan(
        data.tokens_N,
        work(data.tokens_N),
        data.pairs_N,
        data.weight_N,
        pairs_per_step=pairs,
        token_budget=budget,
        world_size=world.size,
        epochs=(steps + 1) * pairs // len(data) + 1,
        max_steps=steps + 1,  # the last one is traced
    )

    with torch.device(device):
        hf_model = AutoModelForSequenceClassification.from_config(hf_config, dtype=torch.float32)
    turn_dropout_off(hf_model)
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
    model.train()
    model.use(SHARED, pruned=True)
    speed_up(model.backbone, recompute=chosen.recompute, compiled=settings["compiled"])
    strategy = make_strategy(config, model, world)

    def learn(batch: RaggedBatch, is_last: bool, weight: float) -> None:
        with strategy.gradient_sync(is_last):
            with strategy.autocast():
                out = strategy.model(batch)
            (out.loss_sum * (world.size / weight)).backward()

    def update() -> None:
        strategy.clip_grad_norm(1.0)
        strategy.optimizer.step()
        strategy.optimizer.zero_grad(set_to_none=True)

    counted, layers = Counters(), dry.sizes.layers
    batches = tokens = launches = most = deferred = compilations = 0
    seconds = update_seconds = 0.0
    with Loader(data, plan.steps_from(0), world.rank, device) as loader:
        work_of_steps = iter(loader)
        for step, micro_batches in islice(work_of_steps, steps):
            if step.index == steps - MEASURED:
                counted.reset()
                torch.cuda.reset_peak_memory_stats()
                compilations = counters["stats"]["unique_graphs"]
                torch.cuda.set_sync_debug_mode("error")
            measured = step.index >= steps - MEASURED
            for batch, is_last in micro_batches:
                before, began = counted.launches, time.process_time()
                learn(batch, is_last, step.global_weight)
                if measured:
                    batches, tokens = batches + 1, tokens + batch.computed_tokens
                    most = max(most, batch.computed_tokens)
                    launches += counted.launches - before
                    seconds += time.process_time() - began
                deferred = deferred or not is_last
            began = time.process_time()
            update()
            if measured:
                update_seconds += time.process_time() - began
        torch.cuda.set_sync_debug_mode("default")
        record = settings | {
            "recompute": chosen.recompute,
            "tokens": tokens / batches,
            "most_tokens": most,
            "micro_batches": batches / MEASURED,
            "launches_per_layer": launches / batches / layers,
            "host_ms": 1e3 * seconds / batches,
            "update_ms": 1e3 * update_seconds / MEASURED,
            "product_tflop": counted.flops / MEASURED / 1e12,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "graph_breaks": sum(counters["graph_break"].values()),
            "late_compilations": counters["stats"]["unique_graphs"] - compilations,
        }
        found = counted.by_name()
        record |= {
            "copies": found.get("memcpy async H2D, own stream", 0) / MEASURED,
            "copies_in_line": found.get("memcpy async H2D", 0) / MEASURED,  # on the stream of the model
        }

        trace, traced, visible = Trace(), 0, 0
        counted.reset()
        step, micro_batches = next(work_of_steps)
        with trace.recording():
            for batch, is_last in micro_batches:
                learn(batch, is_last, step.global_weight)
                traced, visible = traced + batch.computed_tokens, visible + visible_pairs(batch.layout)
            update()
        # FLOPs of a step without recompute, as rmcore.cost.flops counts them; and those of attention, with it.
        sizes, pair = dry.sizes, 12.0 * dry.sizes.width * (layers - 1)
        useful = 6.0 * traced * (sizes.products + sizes.last) + pair * visible
        again = {"none": 0.0}.get(chosen.recompute, pair * visible / 3.0)

        model_of_time = modelled(trace, products=counted.flops, attention=pair * visible + again, useful=useful)
    found = counted.by_name()
    predicted = memory_of_step(config, dry.sizes, per_token, tokens=most, ranks=world.size, deferred=bool(deferred))
    return record | {
        "waits": sum(count for name, count in found.items() if name.startswith("SYNC")),
        "predicted_gb": predicted.total / 1e9,
        "modelled": model_of_time,
        "kernels": dict(sorted(found.items(), key=lambda item: -item[1])[:15]),
        "machine": machine(),
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    with one_of(asked["ranks"]) as world:
        report(run(asked, world))
