"""What becomes of the score head of the model that a training begins with, and of outputs that no loss trains."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rmcore import validate
from rmcore.config import UserError
from rmcore.train import fit
from tests.harness.walks import STEPS_OF_SEVEN

UNUSED = "score.weight, a stored score head, is not used: model.head=fresh draws a new one; model.head=stored trains it"
UNTRAINED = "model.outputs has other, which no loss trains"
TWO = "model.outputs=[reward, other]"


def test_a_training_from_an_export_reports_what_becomes_of_its_head(tmp_path: Path, capsys: Any) -> None:
    def train(name: str, *more: str) -> str:
        fit(
            {},
            [*STEPS_OF_SEVEN, "run.max_steps=1", "run.evals=0", "log.report=none", *more, f"run.dir={tmp_path / name}"],
        )
        return " ".join(capsys.readouterr().out.split())

    fresh = ["model.name=synthetic", TWO]
    assert validate.main([*STEPS_OF_SEVEN, *fresh, f"run.dir={tmp_path / 'first'}"]) == 0
    assert UNTRAINED in " ".join(capsys.readouterr().out.split())
    said = train("first", *fresh)
    assert UNTRAINED in said and UNUSED not in said

    export = [f"model.name={tmp_path / 'first' / 'model'}", "model.init=pretrained"]
    said = train("fresh", *export)
    assert UNUSED in said and UNTRAINED not in said
    with pytest.raises(
        UserError, match=r"\[other, reward\]: the stored head of .* has \[reward, other\], in this order"
    ):
        train("renamed", *export, "model.head=stored", "model.outputs=[other, reward]")
    said = train("stored", *export, "model.head=stored", TWO)
    assert UNTRAINED not in said and UNUSED not in said
    assert AutoConfig.from_pretrained(tmp_path / "stored" / "model").id2label == {0: "reward", 1: "other"}

    single = [f"model.name={tmp_path / 'fresh' / 'model'}", "model.init=pretrained", "model.head=stored", TWO]
    with pytest.raises(
        UserError, match=r"score.weight \[1, .* \(expected \[2, .* another number of outputs than model"
    ):
        train("wider", *single)
