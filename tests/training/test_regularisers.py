"""The regularisers next to several objectives equal one formula on the padded forward, however a step is cut."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmcore.config import UserError, load_config
from rmcore.data.batches.batch import build_batch
from rmcore.model.objectives import Joint, Objective, objective_of
from rmcore.model.reward_model import PACKED, PADDED, SHARED, RewardModel
from rmcore.parallel.world import World, all_reduce_sum, running_world
from rmcore.training.regularisers import Regularisers
from tests.harness.configs import NEEDED
from tests.harness.oracle import BOUND, PAD, Item, Items, Scored, Wide, assert_close, odd_items
from tests.harness.oracle import padded as padded_loss
from tests.harness.ranks import run_ranks
from tests.model.test_router_balance import balances, scored

ROUTER, SFT, DECORRELATION = 0.7, 0.3, 0.9
WORLD = World(0, 1, 0, 1, torch.device("cpu"))
SOURCES = ["data.train.0.path=a", "data.train.1.path=b", "data.train.1.loss={name: regression}"]
KEYS = [f"loss.router_aux={ROUTER}", f"loss.sft={SFT}", f"loss.length_decorrelation={DECORRELATION}"]


def items() -> Items:
    """Pairs, and behind them answers with scores of another source, which are ranked by them, too."""
    generator, found = np.random.Generator(np.random.PCG64(0)), odd_items()
    for number, one in enumerate(found):
        one = replace(one, prompt_length=min(6, len(one.prefix)))
        if number % 3 == 2:
            one = replace(one, objective=1, score=generator.normal(size=len(one.tails)).astype(np.float32))
        found[number] = Item(**vars(one))
    found.losses = 2  # type: ignore[attr-defined]
    return found


def chosen(one: Item) -> list[int]:
    return [k for k in range(len(one.tails)) if k in one.pairs[:, 0] and k not in one.pairs[:, 1]]


def language(model: Scored, head: nn.Linear, rows: Items) -> tuple[Tensor, int]:
    """The summed -log p of the tokens of the chosen answers, text by text."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in rows:
        for answer in chosen(one):
            text, first = torch.from_numpy(one.text(answer).astype(np.int64)), max(1, one.prompt_length)
            hidden = model.base_model(text[None], use_cache=False).last_hidden_state[0]
            total = total + F.cross_entropy(head(hidden)[first - 1 : -1], text[first:], reduction="sum")
            count += len(text) - first
    return total, count


def check_step(path: str, cut: list[list[int]], world: World) -> None:
    """Fails unless the mean over the ranks of the gradients of a step is the derivative of the formula.

    cut: the comparisons of each micro batch of this rank.
    """
    rows, model = items(), scored("softmax")
    torch.manual_seed(1)
    head = nn.Linear(32, 61, bias=False).double()
    joint = Joint((Objective(), Objective("regression")), ROUTER)
    ours = RewardModel(
        model.base_model, model.score, pad_token_id=PAD, path=PADDED, objective=joint, sft=True, lm_head=head
    )
    with Wide():
        pairs = Items(one for one in rows if one.objective == 0)
        bradley_terry, _ = padded_loss(model, pairs)
        _, rewards = padded_loss(model, rows)
        errors = [r - torch.from_numpy(one.score) for one, r in zip(rows, rewards, strict=True) if one.objective]
        tokens, count = language(model, head, rows)
        lengths = [float(len(one.text(k)) - one.prompt_length) for one in rows for k in range(len(one.tails))]
        both = torch.stack([torch.cat(rewards), torch.tensor(lengths, dtype=torch.float64)])
        pair_weight, scores = sum(float(one.weight.sum()) for one in pairs), sum(map(len, errors))
        expected = bradley_terry / pair_weight + (torch.cat(errors) ** 2).sum() / scores
        expected = expected + SFT * tokens / count + ROUTER * torch.cat(balances(model, rows)).mean()
        expected = expected + DECORRELATION * torch.corrcoef(both)[0, 1].abs()
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
        ours.zero_grad(set_to_none=True)
        ours.use(path)
        run: Any = SimpleNamespace(
            strategy=SimpleNamespace(model=ours, autocast=nullcontext),
            world=world,
            config=load_config(None, ["model.name=m", *SOURCES, *KEYS]),
        )
        regularisers = Regularisers(run)
        step: Any = SimpleNamespace(language_tokens=float(count), answers=float(len(lengths)))
        batches = [build_batch(rows, numbers, share=path == SHARED, language=True) for numbers in cut]
        for batch, _ in regularisers.begin(step, iter([(batch, True) for batch in batches])):
            out = ours(batch)
            (out.share(world.size, (pair_weight, float(scores))) + regularisers.loss(out, batch)).backward()
    assert len(gradients) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        mean = all_reduce_sum(world, parameter.grad) / world.size
        assert_close(mean, gradients[name], 20 * BOUND[torch.float64], name)


CUT = [[3, 0], [], [7, 6, 5, 4, 2], [1]]


@pytest.mark.parametrize("path", [SHARED, pytest.param(PACKED, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cut", [[list(range(8))], CUT], ids=["whole", "cut"])
def test_the_whole_step_equals_the_formula(path: str, cut: list[list[int]]) -> None:
    """One mean each: over the tokens of all chosen answers, over all texts, over all answers' rewards."""
    check_step(path, cut, WORLD)


def half_a_step(rendezvous: str) -> None:
    torch.set_num_threads(1)
    with running_world(60, init_method=rendezvous) as world:
        check_step(SHARED, CUT[2 * world.rank :][:2], world)


@pytest.mark.distributed
def test_two_ranks_take_the_step_of_the_formula(tmp_path: Path) -> None:
    """Rank 0 has two comparisons of eight, and an empty micro batch."""
    run_ranks(half_a_step, 2, tmp_path)


def test_they_are_those_of_the_section_loss() -> None:
    joint = objective_of(load_config(None, ["model.name=m", *SOURCES, *KEYS]))
    assert isinstance(joint, Joint) and joint.router_aux == ROUTER
    single = [source.replace("1.", "0.") for source in SOURCES[1:]]
    alone = objective_of(load_config(None, ["model.name=m", *single, *KEYS]))
    assert isinstance(alone, Objective) and (alone.name, alone.router_aux) == ("regression", ROUTER)
    for key in KEYS:
        name, _, value = key.removeprefix("loss.").partition("=")
        own = f"data.train.1.loss={{name: regression, {name}: {value}}}"
        with pytest.raises(UserError, match=rf"data.train.1.loss.{name} belongs into the section loss"):
            load_config(None, ["model.name=m", *SOURCES[:2], own])


@pytest.mark.parametrize("key", ["sft", "router_aux"])
def test_they_are_refused_where_a_rank_sees_a_part_of_a_text(key: str) -> None:
    with pytest.raises(UserError, match=rf"parallel.context and loss.{key} exclude each other: each rank sees only a"):
        load_config(None, [*NEEDED, f"loss.{key}=0.1", "parallel.context=2"])
