"""Score heads of several outputs: attribute and quantile regression, several objectives at once, and the reward.

The oracle is plain transformers: each text by itself through a classifier of several labels, in fp64, and the formulas
of the papers written as sums over single cells.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from rmcore.config import UserError, config_from_values
from rmcore.config.loss import LossConfig
from rmcore.config.schema import ModelConfig
from rmcore.data.batches.batch import Judged, build_batch
from rmcore.data.batches.counting import counted_of, sizes_of
from rmcore.data.batches.step_plan import Plan
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons
from rmcore.evaluation.evaluate import objective_loss
from rmcore.model.objectives import Joint, Objective, objective_of
from rmcore.model.outputs import Outputs
from rmcore.model.reward_model import PACKED, PADDED, SHARED, RewardModel
from rmcore.parallel.world import World
from rmcore.training.metrics import Metrics
from tests.harness.oracle import PAD, tiny_model

NAMES = ("reward", "helpful", "brief")
JOINT = {
    "model": {"name": "m", "outputs": list(NAMES), "reward": {"reward": 1.0, "helpful": 0.5}},
    "data": {
        "train": [
            {"path": "pairs.jsonl", "loss": {"output": "reward", "margin": "data"}},
            {"path": "scores.jsonl", "loss": {"name": "regression", "output": ["brief", "helpful"], "weight": 0.25}},
        ]
    },
}


def mixed_rows(count: int = 8, seed: int = 0) -> list[EncodedRow]:
    """Comparisons of two objectives in turn: pairs with margins, and answers with two attributes of which some cells
    are missing, once all of them."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for number in range(count):
        answers_count = 2 + number % 3
        head = generator.integers(20, 61, size=5)
        answers = [np.concatenate([head, [2 + k], generator.integers(20, 61, size=3)]) for k in range(answers_count)]
        pairs = [(0, k) for k in range(1, answers_count)]
        margin, weight = generator.random((2, len(pairs)))
        cells = generator.integers(0, 5, size=(answers_count, 2)).astype(float)
        cells[generator.random(cells.shape) < (1.0 if number == 3 else 0.3)] = np.nan
        own = {"attributes": cells.tolist(), "objective": 1} if number % 2 else {}
        texts = [answer.astype(np.int32) for answer in answers]
        rows.append(EncodedRow(texts[0][:5], texts, pairs, margin.tolist(), weight.tolist(), **own))
    return rows


def mixed(count: int = 8, seed: int = 0) -> TokenizedComparisons:
    return TokenizedComparisons.of(mixed_rows(count, seed), report={"losses": 2})


def plain_outputs(hf: torch.nn.Module, data: TokenizedComparisons) -> Tensor:
    """[A, K]: each text by itself."""
    items = [data.comparison(number) for number in range(len(data))]
    texts = [torch.from_numpy(one.text(k).astype(np.int64))[None] for one in items for k in range(len(one.tails))]
    return torch.cat([hf(input_ids=text).logits for text in texts])


def wide_model(labels: int = 3) -> torch.nn.Module:
    model = tiny_model("llama", torch.float64)
    generator = torch.Generator().manual_seed(7)
    model.score = torch.nn.Linear(model.config.hidden_size, labels, bias=False, dtype=torch.float64)
    torch.nn.init.normal_(model.score.weight, generator=generator)
    model.config.num_labels = model.num_labels = labels
    return model


def joint_by_hand(outputs_AK: Tensor, data: TokenizedComparisons) -> Tensor:
    """Mean pairwise loss of output 0, plus a quarter of the mean squared error over the known cells of 2 and 1."""
    nll, weight, error, cells = [], 0.0, [], 0
    for number in range(len(data)):
        one, first = data.comparison(number), int(data.answer_offset[number])
        if number % 2:
            for k, row in enumerate(one.attribute.tolist()):
                for column, value in zip((2, 1), row, strict=True):
                    if not math.isnan(value):
                        error.append((outputs_AK[first + k, column] - value) ** 2)
                        cells += 1
        else:
            for (a, b), m, w in zip(one.pairs.tolist(), one.margin.tolist(), one.weight.tolist(), strict=True):
                d = outputs_AK[first + a, 0] - outputs_AK[first + b, 0] - m
                nll.append(w * (1 + (-d).exp()).log())
                weight += w
    return torch.stack(nll).sum() / weight + 0.25 * torch.stack(error).sum() / cells


@pytest.mark.parametrize("path", [SHARED, PACKED, PADDED])
def test_a_joint_step_equals_the_formulas_however_it_is_cut(path: str) -> None:
    data, config = mixed(), config_from_values(JOINT)
    plain, ours = wide_model(), wide_model()
    expected = joint_by_hand(plain_outputs(plain, data), data)
    expected.backward()
    outputs = Outputs(NAMES, (1.0, 0.5, 0.0))
    model = RewardModel(
        ours.base_model, ours.score, pad_token_id=PAD, objective=objective_of(config, outputs), outputs=outputs
    )
    model.use(path, pruned=path != PADDED)
    counts = tuple(float(counted_N.sum()) for counted_N in counted_of(config, data))
    for cut in ([[*range(8)]], [[0, 5], [], [1, 2, 3], [7], [4, 6]]):  # an empty one, and ones of one objective
        model.zero_grad()
        total, counted = 0.0, torch.zeros(2, dtype=torch.float64)
        for numbers in cut:
            out = model(build_batch(data, numbers, share=path == SHARED))
            out.share(1, counts).backward()
            total, counted = total + out.share(1, counts).item(), counted + out.counted
        assert total == pytest.approx(expected.item(), rel=1e-12)
        assert counted.tolist() == pytest.approx(counts, rel=1e-7)
        for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            scale = max(1.0, p.grad.abs().max().item())
            assert (p.grad - q.grad).abs().max() <= 1e-11 * scale, name  # 3 layers of sums of 100 terms at 1.1e-16


def test_the_plan_counts_each_objective_for_itself() -> None:
    data, config = mixed(), config_from_values({**JOINT, "batch": {"pairs": 6}})
    plan = Plan.of(config, data, data.tokens_N, token_budget=200, world_size=2)
    assert sizes_of(config, data).tolist()[:4] == [1, len(data.comparison(1).tails), 3, 0]  # no cell of 3 is known
    steps = [plan.step(index) for index in range(plan.steps)]
    for step in steps:
        numbers = np.concatenate([batch for rank in step.ranks for batch in rank])
        pairs = sum(data.comparison(n).weight.sum(dtype=np.float64) for n in numbers if n % 2 == 0)
        cells = sum(np.isfinite(data.comparison(n).attribute).sum() for n in numbers if n % 2)
        assert step.counts == (pytest.approx(pairs), cells)
    assert plan.pairs_per_epoch == sizes_of(config, data).sum() == steps[-1].episode


def test_a_step_without_anything_that_an_objective_counts_adds_nothing_for_it() -> None:
    data, hf, outputs = mixed(), wide_model(), Outputs(NAMES, (1.0, 0.0, 0.0))
    objective = objective_of(config_from_values(JOINT), outputs)
    model = RewardModel(hf.base_model, hf.score, pad_token_id=PAD, objective=objective, outputs=outputs, path=SHARED)
    out = model(build_batch(data, [0, 2]))
    assert out.loss_sum[1].item() == out.counted[1].item() == 0.0
    share = out.share(1, (float(out.counted[0]), 0.0))
    assert share.item() == pytest.approx(out.loss_sum[0].item() / out.counted[0].item())
    share.backward()
    assert not hf.score.weight.grad[1:].any() and hf.score.weight.grad[0].any()


def test_quantiles_are_trained_by_the_pinball_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = mixed_rows(5)
    for row in rows:
        row.scores = [float(k) if k != 1 else math.nan for k in range(len(row.answers))]
        row.objective, row.attributes = 0, ()
    data = TokenizedComparisons.of(rows)
    outputs_AK = torch.randn(len(data.score), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = LossConfig(name="quantile_regression", output=["a", "b", "c"])
    objective = Objective.of(loss, Outputs(("a", "b", "c"), (0.0, 1.0, 0.0)))
    found = objective.loss_sum(outputs_AK[:, 1], Judged.of(data), outputs_AK)
    expected = torch.zeros((), dtype=torch.float64)
    for a, score in enumerate(data.score.tolist()):
        for k, level in enumerate((0.25, 0.5, 0.75)):
            above = score - outputs_AK[a, k]
            if not math.isnan(score):
                expected = expected + (level if above > 0 else 1 - level) * above.abs() / 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(*(torch.autograd.grad(x, outputs_AK)[0] for x in (found, expected)), rtol=0, atol=1e-15)
    assert objective.counted(Judged.of(data)).item() == np.isfinite(data.score).sum()


def test_the_quantiles_of_a_constant_answer_become_those_of_its_scores() -> None:
    """The outputs that make the pinball loss least are the quantiles of the scores, at levels k / (K + 1)."""
    scores = np.random.Generator(np.random.PCG64(0)).normal(size=999)
    rows = [EncodedRow(np.array([5]), [np.array([5, 6])], (), (), (), scores=[score]) for score in scores.tolist()]
    judged, objective = (
        Judged.of(TokenizedComparisons.of(rows)),
        Objective("quantile_regression", outputs=(0, 1, 2), several=True),
    )
    level_K = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([level_K], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (objective.loss_sum(level_K[:1].expand(999), judged, level_K.expand(999, 3)) / 999).backward()
        optimizer.step()
    np.testing.assert_allclose(level_K.detach(), np.quantile(scores, [0.25, 0.5, 0.75]), atol=0.05)


def test_the_reward_is_an_output_or_a_weighted_sum() -> None:
    config = ModelConfig(name="m", outputs=["a", "b"], reward={"a": 0.25, "b": -1.0})
    assert Outputs.of(config, LlamaConfig()) == Outputs(("a", "b"), (0.25, -1.0))
    rewards_A = Outputs.of(config, LlamaConfig()).reward(torch.tensor([[4.0, 1.0], [0.0, 2.0]]))
    assert rewards_A.tolist() == [0.0, -2.0]
    assert Outputs.of(ModelConfig(name="m", outputs=["a", "b"]), LlamaConfig()) == Outputs(("a", "b"), (1.0, 0.0))
    assert Outputs.of(ModelConfig(name="m"), LlamaConfig()) == Outputs()


def test_an_exported_config_gives_its_outputs_back() -> None:
    stored = LlamaConfig()
    Outputs(("a", "b"), (0.25, -1.0)).store(stored)
    assert stored.id2label == {0: "a", 1: "b"} and stored.label2id == {"a": 0, "b": 1}
    assert stored.rmcore == {"reward": {"a": 0.25, "b": -1.0}}
    again = LlamaConfig.from_dict(stored.to_dict())
    assert (
        Outputs.stored(again)
        == Outputs.of(ModelConfig(name="m", head="stored"), again)
        == Outputs(("a", "b"), (0.25, -1.0))
    )
    assert Outputs.of(ModelConfig(name="m", head="stored", reward="b"), again) == Outputs(("a", "b"), (0.0, 1.0))
    with pytest.raises(UserError, match=r"loss\.output has c, but the model's outputs are a, b"):
        Objective.of(LossConfig(output="c"), Outputs.stored(again))
    fresh = Outputs.settled(ModelConfig(name="m", head="stored"), again).model_copy(update={"head": "fresh"})
    assert Outputs.of(fresh, LlamaConfig()) == Outputs.stored(again)  # as an export from a checkpoint builds the model
    assert Outputs.settled(ModelConfig(name="m"), again) == ModelConfig(name="m")
    Outputs().store(again)
    assert not hasattr(again, "rmcore") and again.id2label == {0: "reward"}


@pytest.mark.parametrize("outputs", [["b", "a"], ["a", "c"], ["a"], ["a", "b", "c"]])
def test_a_stored_head_keeps_its_outputs(outputs: list[str]) -> None:
    """Other names, or another order, would be labels over the rows of others."""
    stored = LlamaConfig()
    Outputs(("a", "b"), (0.25, -1.0)).store(stored)
    own = ModelConfig(name="runs/m", head="stored", outputs=["a", "b"])
    assert Outputs.of(own, stored) == Outputs(("a", "b"), (0.25, -1.0))
    with pytest.raises(
        UserError, match=r"^model\.outputs=\[.*\]: the stored head of runs/m has \[a, b\], .*fresh"
    ) as error:
        Outputs.of(own.model_copy(update={"outputs": outputs}), stored)
    assert f"[{', '.join(outputs)}]" in str(error.value) and "\n" not in str(error.value)
    names = ModelConfig(name="m", head="stored", outputs=outputs)
    assert Outputs.of(names, LlamaConfig()).names == tuple(
        outputs
    )  # the head of another trainer has no names of its own


def test_the_objectives_loss_of_an_evaluation_is_the_sum_of_their_means() -> None:
    data, config = mixed(), config_from_values(JOINT)
    outputs_AK = torch.randn(len(data.score), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    joint = objective_of(config, Outputs(NAMES, (1.0, 0.5, 0.0)))
    assert isinstance(joint, Joint)
    found = objective_loss(joint, data, outputs_AK[:, 0].numpy(), outputs_AK.numpy())
    assert found["objective_loss"] == pytest.approx(joint_by_hand(outputs_AK, data).item(), rel=1e-12)


def test_metrics_log_each_objective_and_their_sum() -> None:
    metrics = Metrics(World(0, 1, 0, 1, torch.device("cpu")), losses=("bradley_terry", "regression"))
    data, hf, outputs = mixed(), wide_model(), Outputs(NAMES, (1.0, 0.0, 0.0))
    objective = objective_of(config_from_values(JOINT), outputs)
    model = RewardModel(hf.base_model, hf.score, pad_token_id=PAD, objective=objective, outputs=outputs, path=SHARED)
    for numbers in ([0, 1, 2], [3, 4, 5, 6, 7]):
        metrics.add(model(build_batch(data, numbers)), build_batch(data, numbers))
    expected = joint_by_hand(plain_outputs(wide_model(), data), data).item()
    found = metrics.reduce()
    assert found["train/rm/loss"] == pytest.approx(expected, rel=1e-7)
    assert found["train/rm/loss"] == pytest.approx(found["train/loss/bradley_terry"] + found["train/loss/regression"])
