"""Attributes, probabilities, signed preferences and weights of rows: what each published layout becomes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rmcore.config import UserError, config_from_values
from rmcore.config.loss import LossConfig
from rmcore.data.formats.comparison import Comparison, comparison_from_row
from rmcore.data.formats.requirements import fitted
from rmcore.data.formats.row_format import attribute_columns, detect_format, needed_columns
from rmcore.data.formats.selection import Reads, merged
from rmcore.data.prepare import PreparedData, prepare_data
from rmcore.data.synthetic import byte_tokenizer

NAN = math.nan
HELPSTEER2 = {"prompt": "Why?", "response": "So.", "helpfulness": 3, "correctness": 4, "verbosity": 1}
ULTRAFEEDBACK = {
    "instruction": "Why?",
    "completions": [
        {
            "response": "So.",
            "overall_score": 7.5,
            "annotations": {"honesty": {"Rating": "4"}, "truth": {"Rating": "5"}},
        },
        {
            "response": "No.",
            "overall_score": 2.0,
            "annotations": {"honesty": {"Rating": "N/A"}, "truth": {"Rating": "1"}},
        },
    ],
}
HELPSTEER3 = {"prompt": "Why?", "response1": "So.", "response2": "No.", "overall_preference": -2}


def read(row: dict, loss: LossConfig, columns: dict | None = None, margins: bool = False) -> Comparison:
    columns = columns or {}
    cut = [*needed_columns([*row], {k: v for k, v in columns.items() if k not in loss.attributes})]
    seen = {name: row[name] for name in row if name in {*cut, *attribute_columns(loss.attributes, columns)}}
    format = detect_format([seen], columns, origin="f.jsonl", need_margin=margins, attributes=loss.attributes)
    format = fitted(format, loss, origin="f.jsonl", key="data.train")
    return comparison_from_row(seen, format, wants_text=False, source="s", where="f.jsonl:1")


def regression(*attributes: str) -> LossConfig:
    return LossConfig(name="regression", output=list(attributes))


def test_helpsteer2_has_its_attributes_in_columns() -> None:
    loss = regression("verbosity", "helpfulness")
    one = read(HELPSTEER2, loss)
    assert one.attributes == ((1.0, 3.0),) and one.scores == (3.0,)
    other = read({**HELPSTEER2, "response": "No.", "helpfulness": None, "verbosity": ""}, loss)
    np.testing.assert_array_equal(other.attributes, [[NAN, NAN]])
    both = merged([one, other], Reads())
    np.testing.assert_array_equal(both.attributes, [[1.0, 3.0], [NAN, NAN]])
    assert (both.pairs, both.scores) == ((), ())  # an unknown score makes no pair


def test_ultrafeedback_has_them_in_nested_records() -> None:
    columns = {"honesty": "annotations.honesty.Rating", "truth": "annotations.truth.Rating"}
    found = read(ULTRAFEEDBACK, regression("honesty", "truth"), columns)
    np.testing.assert_array_equal(found.attributes, [[4.0, 5.0], [NAN, 1.0]])
    assert found.pairs == ((0, 1),)


def test_other_layouts_have_a_column_per_answer_or_lists() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "calm_chosen": 2, "calm_rejected": 1}
    assert read(pair, regression("calm")).attributes == ((2.0,), (1.0,))
    two = {"prompt": "q", "answer_a": "a", "answer_b": "b", "winner": "b", "calm_a": 2, "calm_b": None}
    np.testing.assert_array_equal(read(two, regression("calm")).attributes, [[2.0], [NAN]])
    many = {"prompt": "q", "answers": ["a", "b"], "scores": [1, 2], "calm": [0, 4]}
    assert read(many, regression("calm")).attributes == ((0.0,), (4.0,))


def test_what_is_not_an_attribute_is_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"f\.jsonl: loss\.output=\['zeal'\] needs the attributes of each answer"):
        read(HELPSTEER2, regression("zeal"))
    with pytest.raises(UserError, match=r"f\.jsonl:1: verbosity must be a finite number, not 'much'"):
        read({**HELPSTEER2, "verbosity": "much"}, regression("verbosity"))


def test_a_signed_preference_gives_the_winner_and_the_margin() -> None:
    scaled = LossConfig(name="scaled_bradley_terry")
    first = read(HELPSTEER3, scaled, margins=True)
    assert (first.pairs, first.margin) == (((0, 1),), (2.0,))
    second = read({**HELPSTEER3, "overall_preference": 3}, scaled, margins=True)
    assert (second.pairs, second.margin) == (((1, 0),), (3.0,))
    assert read({**HELPSTEER3, "overall_preference": 0}, scaled, margins=True).pairs == ()
    tie = read({**HELPSTEER3, "overall_preference": 0}, LossConfig(name="rao_kupper"))
    assert tie.ties == ((0, 1),)


def test_options_have_probabilities_or_the_softmax_of_their_scores() -> None:
    row = {"prompt": "q", "answers": [f"{k}" for k in range(20)], "probabilities": [4.0] + [2.0] * 19}
    found = read(row, LossConfig(name="listwise"))
    assert found.scores == pytest.approx([4 / 42] + [2 / 42] * 19) and len(found.pairs) == 19
    scored = {"prompt": "q", "answers": ["a", "b"], "scores": [math.log(3.0), 0.0]}
    assert read(scored, LossConfig(name="listwise")).scores == pytest.approx((0.75, 0.25))
    with pytest.raises(UserError, match="probabilities must not be negative"):
        read({**row, "probabilities": [-1.0] + [2.0] * 19}, LossConfig(name="listwise"))


def test_the_weight_of_a_row_is_read_only_if_it_is_mapped() -> None:
    row = {"prompt": "q", "answers": ["a", "b", "c"], "scores": [3, 2, 1], "weight": 0.5}
    assert read(row, LossConfig()).weight == (1 / 3,) * 3
    assert read(row, LossConfig(), {"weight": "weight"}).weight == pytest.approx((1 / 6,) * 3)
    assert read({**row, "weight": 0}, LossConfig(), {"weight": "weight"}).pairs == ()
    with pytest.raises(UserError, match="the weight of a row must not be negative"):
        read({**row, "weight": -1}, LossConfig(), {"weight": "weight"})
    with pytest.raises(UserError, match=r"maps weight, which objectives over pairs read; loss\.name=listwise does not"):
        read(row, LossConfig(name="listwise"), {"weight": "weight"})


def prepared(tmp_path: Path, more: dict) -> PreparedData:
    pairs = [{"prompt": f"q{k}", "chosen": "yes", "rejected": "no", "margin": k} for k in range(3)]
    scored = [{"prompt": f"r{k // 2}", "response": f"a{k}", "score": k % 2, "calm": k or None} for k in range(4)]
    for name, rows in (("pairs", pairs), ("scored", scored)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / "pairs.jsonl")}, {"path": str(tmp_path / "scored.jsonl"), **more}]
    values = {"train": sources, "cache": str(tmp_path / "cache"), "template": "none"}
    config = config_from_values({"model": {"name": "m", "outputs": ["reward", "calm"]}, "data": values})
    return prepare_data(config, byte_tokenizer(), None)


def test_an_attribute_that_no_answer_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: no answer has the attribute reward, which loss\.output lists"):
        prepared(tmp_path, {"loss": {"name": "regression", "output": ["calm", "reward"]}})


def test_the_cache_keeps_attributes_and_objectives_and_only_where_they_are_read(tmp_path: Path) -> None:
    train = prepared(tmp_path, {"loss": {"name": "regression", "output": ["calm"]}}).train
    again = prepared(tmp_path, {"loss": {"name": "regression", "output": ["calm"]}}).train  # from the cache
    for data in (train, again):
        assert data.objective.tolist() == [0, 0, 0, 1, 1] and data.losses == 2
        np.testing.assert_array_equal(data.attribute[:, 0], [NAN] * 6 + [NAN, 1.0, 2.0, 3.0])
        assert data.of_objective(1).tolist() == [False] * 3 + [True] * 2
    plain = prepared(tmp_path, {}).train
    assert plain.attribute.shape == (0, 0) and plain.objective.shape == (0,)
    found = sorted(path.name for path in (tmp_path / "cache" / "tokens").glob("*/attribute.npy"))
    assert found == ["attribute.npy"] and plain.fingerprint != train.fingerprint
