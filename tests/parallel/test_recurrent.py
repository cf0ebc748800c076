"""A hybrid of attention and recurrent layers shares its prompts under every strategy, with recompute too."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rmcore.config import load_config
from rmcore.data.synthetic import byte_tokenizer
from tests.harness.ranks import run_ranks
from tests.harness.recurrent_models import RECURRENT

RUN = [
    "model.init=random",
    "data.train.path=synthetic",
    "data.template=none",
    "data.max_tokens=512",
    "data.limit=28",
    "data.eval_fraction=0.25",
    "optim.lr=1e-3",
    "batch.pairs=7",
    "batch.tokens=400",
    "parallel.precision=fp32",
    "run.save_minutes=null",
    "log.every=1",
    "log.samples=0",
    "log.tensorboard=false",
]


def walk(rendezvous: str, variants: list[list[str]]) -> list[tuple[str, list[dict[str, float]]]]:
    """For each variant, one after the other: its attention, and the metrics of every step and evaluation."""
    from rmcore.parallel.world import running_world
    from rmcore.tracking.tracker import Tracker
    from rmcore.train import train
    from rmcore.training.assembly import assemble

    class Kept(Tracker):
        def __init__(self) -> None:
            super().__init__()
            self.figures: list[dict[str, float]] = []

        def log(self, at: Any, figures: Any) -> None:
            names = ("train/rm/loss", "grad_norm", "eval/rm/loss")
            self.figures.append({name: figures[name] for name in names if name in figures})

    torch.set_num_threads(1)
    walks = []
    with running_world(120.0, 1, init_method=rendezvous) as world:
        for variant in variants:
            run = assemble(load_config(None, [*RUN, *variant]), world)
            tracker = Kept()
            train(run, tracker)
            (line,) = (line for line in run.lines if "; attention " in line)
            walks.append((line.split("; ")[1].split(":")[0], tracker.figures))
    return walks


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    """Two ranks differ from one only by the order of fp32 sums (1e-5, see tests/training/test_world_sizes.py)."""
    config_class, arguments = RECURRENT["qwen3_5"]
    tokenizer = byte_tokenizer()
    sizes = {**arguments, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    tokens = {"pad_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    getattr(transformers, config_class)(**sizes | tokens).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = f"model.name={tmp_path / 'model'}"
    strategies = [["ddp"], ["zero2", "parallel.recompute=full"], ["zero3", "parallel.recompute=selective"]]
    variants = [[model, f"parallel.strategy={name}", *more] for name, *more in strategies]
    (alone,) = run_ranks(walk, 1, tmp_path / "one", [[model], [model, "model.attention=padded"]])
    (path, expected), by_padding = alone.value
    assert path == "attention shared" and by_padding[0] == "attention padded"
    two = run_ranks(walk, 2, tmp_path / "two", variants)[0].value
    assert all(path == "attention shared" for path, _ in two)
    for path, ours in [by_padding, *two]:
        assert len(ours) == len(expected) > 2, path
        for a, b in zip(ours, expected, strict=True):
            assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
