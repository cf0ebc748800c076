"""Decoders in which padding or a neighbor changes the values of a text are computed one text at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmcore.bench.models import exact, tiny_config
from rmcore.config import UserError, load_config
from rmcore.data.batches.batch import build_batch
from rmcore.hf_export.card import model_card
from rmcore.model.backbone import turn_dropout_off
from rmcore.model.classifier import decoder_class, new_classifier, text_model
from rmcore.model.meta_model import set_padding
from rmcore.model.reward_model import ALONE, PADDED, RewardModel
from rmcore.model.selftest import choose_path
from tests.harness.oracle import BOUND, Items, Scored, Wide, assert_close, odd_items, padded

CPU = torch.device("cpu")
FAMILIES = ["cpmant", "paligemma"]  # a learned prefix that padding moves; a mask that is causal only next to padding


def built(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, RewardModel]:
    """Transformers' base model with a score head, and rmcore's model of the same weights, on the path `PADDED`."""
    config = tiny_config(family)
    config.num_labels = 1
    set_padding(config, 0)
    torch.manual_seed(0)
    plain = Scored(text_model(new_classifier(config, dtype)))
    for parameter in plain.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    turn_dropout_off(plain)
    return plain, RewardModel(plain.base_model, plain.score, pad_token_id=0, path=PADDED)


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_gradients_equal_those_of_each_text_by_itself(family: str) -> None:
    """In fp64. The oracle is transformers' forward of a batch of one, and the sum of its losses."""
    plain, ours = built(family)
    items = odd_items()
    ours.use(ALONE)
    rewards, loss = [], torch.zeros((), dtype=torch.float64)
    with Wide():
        for one in items:
            reward = torch.cat([_alone(plain, np.concatenate([one.prefix, tail])) for tail in one.tails])
            rewards.append(reward)
            difference = reward[one.pairs[:, 0]] - reward[one.pairs[:, 1]]
            loss = loss - (torch.from_numpy(one.weight) * torch.nn.functional.logsigmoid(difference)).sum()
        loss.backward()
        expected = {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}
        plain.zero_grad(set_to_none=True)
        out = ours(build_batch(items, range(len(items)), share=False))
        out.loss_sum.backward()
        together = torch.cat(padded(plain, items)[1])
    assert (together - torch.cat(rewards)).abs().max() > 1e-3, "padding changes this model, or the test is needless"
    assert_close(out.rewards_A, torch.cat(rewards), BOUND[torch.float64], "rewards")
    assert_close(out.loss_sum, loss, BOUND[torch.float64], "loss")
    assert len(expected) > 10
    for name, parameter in plain.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], BOUND[torch.float64], name)


def _alone(plain: Scored, text: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(text)[None]
    return plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]


def test_the_self_test_takes_it_where_padding_is_not_exact_and_only_there() -> None:
    _, ours = built("cpmant", torch.float32)
    path, line = choose_path(ours, odd_items(), [0, 1, 2], CPU, gradients=True)
    assert (path, ours.path) == (ALONE, ALONE)
    assert line.startswith("attention alone: rewards equal") and "not padded: rewards differ" in line
    with pytest.raises(UserError, match=r"model\.attention=padded"):
        choose_path(ours, odd_items(), [0, 1, 2], CPU, wanted=PADDED)


def test_a_rank_with_fewer_texts_computes_more_forwards_that_change_nothing() -> None:
    """As often as the other ranks, whose forwards have collectives; a rank without comparisons too."""
    plain, ours = built("cpmant")
    ours.use(ALONE)
    calls: list[int] = []
    plain.base_model.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for more in (0, 3):
        ours.most = lambda number, more=more: number + more
        out = ours(build_batch(odd_items(), [0, 6], share=False))
        out.loss_sum.backward()
        found.append([out.rewards_A, *(p.grad.clone() for p in plain.parameters() if p.grad is not None)])
        plain.zero_grad(set_to_none=True)
    assert len(calls) == 9 + 12
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    empty = ours(build_batch(Items(), [], share=False))
    empty.loss_sum.backward()
    assert empty.loss_sum == 0.0 and len(calls) == 21 + 4
    assert all(p.grad is not None and not p.grad.any() for p in ours.backbone.encoder.parameters())


@pytest.mark.parametrize("family", ["cpmant", pytest.param("paligemma", marks=pytest.mark.slow)])
def test_it_loads_trains_and_exports(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    set_padding(config, 0)
    decoder_class(type(config))._from_config(config).save_pretrained(tmp_path / "base")
    result = exact(family, tmp_path / "base", tmp_path / "model")
    assert result.path == ALONE and result.export.startswith("exported")


def test_its_model_card_warns_of_padding() -> None:
    config = load_config(None, ["model.name=x", "data.train.path=y"])
    usual, alone = (model_card(config, wants_text=True, alone=alone) for alone in (False, True))
    assert "You may pad on the right" in usual and "Never pad" not in usual
    assert "Never pad" in alone and "You may pad" not in alone


def test_a_split_row_excludes_it() -> None:
    keys = ["model.name=x", "data.train.path=y", "parallel.context=2", "model.attention=alone"]
    with pytest.raises(UserError, match=r"parallel\.context.*model\.attention cannot be alone"):
        load_config(None, keys)
