"""The balance of a mixture of experts equals DeepSeek-V3's formula on transformers' padded forward, value and gradient,
with shared prompts and without, and however a step is cut.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModel

from rmcore.bench.models import tiny_config
from rmcore.config import UserError, load_config
from rmcore.data.batches.batch import build_batch
from rmcore.data.synthetic import byte_tokenizer
from rmcore.model.backbone import recompute_activations, turn_dropout_off
from rmcore.model.objectives import Objective
from rmcore.model.reward_model import PADDED, PATHS, SHARED, RewardModel
from rmcore.model.router_balance import RouterBalance
from rmcore.parallel.world import running_world
from rmcore.training.assembly import assemble
from rmcore.validate import main as validate
from tests.harness.oracle import BOUND, GROUPED, PAD, SMALL, Items, Scored, Wide, assert_close, odd_items, tiny_model
from tests.harness.oracle import padded as padded_loss
from tests.harness.ranks import run_ranks
from tests.harness.small_run import arguments
from tests.parallel.test_recurrent import walk

WEIGHT = 0.7
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("Qwen3MoeConfig", {**GROUPED, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 24}),
    "softmax, fused weights": ("MixtralConfig", {**GROUPED, **EXPERTS}),
    "sigmoid, one dense layer": (
        "DeepseekV3Config",
        {**SMALL, **EXPERTS, **LATENT, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24}
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
}


def scored(kind: str, dtype: torch.dtype = torch.float64) -> Scored:
    config_class, arguments = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    model = Scored(AutoModel.from_config(config, dtype=dtype, experts_implementation="eager"))
    model.to(dtype)  # transformers makes some routers in fp32
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    turn_dropout_off(model)
    return model


def engine(model: Scored, path: str, name: str = "bradley_terry") -> RewardModel:
    objective = Objective(name, router_aux=WEIGHT)
    return RewardModel(model.base_model, model.score, pad_token_id=PAD, path=path, objective=objective)


def balances(model: Scored, items: Items) -> list[Tensor]:
    """For each comparison the balance of its texts [answers], from the router logits of a padded batch of all texts."""
    texts = [np.concatenate([one.prefix, tail]) for one in items for tail in one.tails]
    ids = torch.full((len(texts), max(map(len, texts))), PAD)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text)
    mask = torch.tensor([[int(column < len(text)) for column in range(ids.shape[1])] for text in texts])
    layers = model.base_model(ids, attention_mask=mask, use_cache=False, output_router_logits=True).router_logits
    sigmoid = "Deepseek" in type(model.base_model).__name__
    found = []
    for row, text in enumerate(texts):
        each = []
        for logits in layers:
            own = logits.view(*ids.shape, -1)[row, : len(text)]
            scores = own.sigmoid() if sigmoid else own.softmax(-1)
            chosen = scores.topk(2, dim=-1).indices
            f = torch.bincount(chosen.flatten(), minlength=6).double() / len(text)
            p = (scores / scores.sum(-1, keepdim=True)).mean(0)
            each.append(6 / 2 * (f * p).sum())
        found.append(torch.stack(each).mean())
    return list(torch.stack(found).split([len(one.tails) for one in items]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", MODELS)
def test_value_and_gradients_equal_the_formula_on_the_padded_forward(kind: str, path: str) -> None:
    items, model = odd_items(), scored(kind)
    ours = engine(model, path)
    assert not ours.can_prune
    ours.use(PADDED)
    with Wide():
        loss, _ = padded_loss(model, items)
        total = torch.zeros((), dtype=torch.float64)
        for one, balance in zip(items, balances(model, items), strict=True):
            assert (balance > 0.9).all(), "1 is the least possible mean of a text that uses all experts equally"
            each = torch.zeros(len(one.tails), dtype=torch.float64)
            for (winner, loser), weight in zip(one.pairs, one.weight, strict=True):
                each[winner] += weight / 2
                each[loser] += weight / 2
            total = total + (each * balance).sum()
        loss = loss + WEIGHT * total
        loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        ours.use(path)
        out = ours(build_batch(items, range(len(items)), share=path == SHARED))
        out.loss_sum.backward()
    assert out.balance_sum is not None and not out.balance_sum.requires_grad
    assert_close(out.balance_sum, total, BOUND[torch.float64], "balance")
    assert_close(out.loss_sum, loss, BOUND[torch.float64], f"loss {out.loss_sum.item()} {loss.item()}")
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], BOUND[torch.float64], name)


@pytest.mark.parametrize("masked", [False, True])
def test_the_cut_into_micro_batches_changes_nothing(masked: bool) -> None:
    """Sums over micro batches, one of them empty, with recomputed activations too."""
    items, model = odd_items(), scored("softmax")
    ours = engine(model, SHARED)
    ours.use(SHARED, masked=masked)
    whole = ours(build_batch(items, range(len(items))))
    whole.loss_sum.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.base_model.train()
    recompute_activations(model.base_model, "full")
    parts = [ours(build_batch(items, numbers)) for numbers in ([3, 0], [], [7, 6, 5, 4, 2], [1])]
    for part in parts:
        part.loss_sum.backward()
    assert_close(sum(part.loss_sum for part in parts), whole.loss_sum, 1e-6, "loss")  # the routers round to fp32
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-5, name)


@pytest.mark.parametrize("name", ["bradley_terry", "davidson", "plackett_luce", "regression"])
def test_texts_count_as_their_comparison_counts_in_the_loss(name: str) -> None:
    batch = build_batch(odd_items(), range(8))
    objective = Objective(name)
    assert float(objective.counted_A(batch).sum()) == pytest.approx(float(objective.counted(batch)), abs=1e-6)


def test_evaluation_does_not_compute_it() -> None:
    ours, batch = engine(scored("softmax"), SHARED), build_batch(odd_items(), range(8))
    with torch.no_grad():
        plain = ours(batch).loss_sum
    assert ours(batch).loss_sum > plain + 1.0


def test_models_without_routers_that_are_understood_are_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"loss\.router_aux: LlamaModel has no routers of experts"):
        RouterBalance(tiny_model("llama").base_model)
    phimoe = AutoModel.from_config(tiny_config("phimoe"))  # its weights are no function of one score per expert
    with pytest.raises(UserError, match=r"loss\.router_aux: rmcore does not know how PhimoeTopKRouter scores"):
        RouterBalance(phimoe)


def test_a_run_and_its_validation_refuse_a_model_without_routers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    keys = [*arguments(tmp_path), "loss.router_aux=0.1", f"run.dir={tmp_path / 'run'}"]
    assert validate(keys) == 2
    assert "loss.router_aux: LlamaModel has no routers" in "".join(capsys.readouterr())
    with running_world() as world, pytest.raises(UserError, match=r"loss\.router_aux: LlamaModel has no routers"):
        assemble(load_config(None, keys), world)


def test_it_excludes_compilation() -> None:
    keys = ["model.name=x", "data.train.path=y", "loss.router_aux=0.01", "parallel.compile=true"]
    with pytest.raises(UserError, match=r"loss\.router_aux.*parallel\.compile"):
        load_config(None, keys)


def test_every_objective_may_use_it() -> None:
    for name in ("hinge", "regression"):
        keys = ["model.name=x", "data.train.path=y", "loss.router_aux=0.01", f"loss.name={name}"]
        assert load_config(None, keys).loss.router_aux == 0.01


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    """With other micro batches and strategies; two ranks differ from one only by the order of fp32 sums (1e-5)."""
    tokenizer = byte_tokenizer()
    config_class, arguments = MODELS["softmax"]
    sizes = {**arguments, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    tokens = {"pad_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    getattr(transformers, config_class)(**sizes | tokens).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    common = [f"model.name={tmp_path / 'model'}", "loss.router_aux=0.3"]
    strategies = [["ddp"], ["zero2", "parallel.recompute=full", "batch.tokens=700"], ["zero3"]]
    variants = [[*common, f"parallel.strategy={name}", *more] for name, *more in strategies]
    off = [common[0], "loss.router_aux=0"]
    (alone,) = run_ranks(walk, 1, tmp_path / "one", [common, [*common, "model.attention=padded"], off])
    (_, expected), (_, by_padding), (_, without) = alone.value
    assert expected[0]["train/rm/loss"] > without[0]["train/rm/loss"] + 0.25
    assert expected[-1] != pytest.approx(without[-1], abs=1e-3)
    for ours in (by_padding, *(steps for _, steps in run_ranks(walk, 2, tmp_path / "two", variants)[0].value)):
        for a, b in zip(ours, expected, strict=True):
            assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
