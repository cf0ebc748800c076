"""The model card, and the push to the hub: the calls of the client, and the messages when it fails."""

from pathlib import Path
from typing import Any

import pytest

from rmcore.config import UserError
from rmcore.config.schema import HubConfig
from rmcore.data.synthetic import byte_tokenizer
from rmcore.hf_export.card import model_card
from rmcore.hf_export.upload import PushError, push
from rmcore.scoring.normalisation import Normalisation
from tests.harness.exporting import export, run_config, texts


def test_the_card_says_where_it_comes_from() -> None:
    data = texts(byte_tokenizer())
    data.report["dropped"]["prompt too long"] = 1234
    metrics: dict[str, Any] = {
        "accuracy": 0.75,
        "accuracy_low": 0.7,
        "accuracy_high": 0.8,
        "length_accuracy": 0.55,
        "loss": 0.5,
        "ece": 0.03,
        "brier": 0.21,
        "count": 2000,
    }
    metrics["sources"] = {"helpful": metrics, "harmless": {**metrics, "count": 7}}
    config = run_config("model.name=EleutherAI/pythia-1b", "model.init=pretrained", "hub.repo=me/rm")
    card = model_card(config, wants_text=False, data=data, metrics=metrics, normalisation=Normalisation(0.5, 4.0))
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model: EleutherAI/pythia-1b\n" in card
    assert 'from_pretrained("me/rm")' in card and "apply_chat_template" in card and 'runner="pooling"' in card
    assert "- dropped, prompt too long: 1,234" in card
    assert "ECE 0.0300, Brier score 0.2100" in card and "Best of" not in card
    assert "| all | 2,000 | 0.7500 | 0.7000 to 0.8000 | 0.5500 | 0.5000 |" in card and "| harmless | 7 |" in card
    assert """--pooler-config '{"logit_mean": 0.5, "logit_sigma": 4.0}'""" in card
    local = model_card(run_config(), wants_text=True)
    assert "base_model" not in local and "had no evaluation" in local and "eos_token" in local
    assert "counts were not available" in local and "pooler" not in local.replace('runner="pooling"', "")


def test_a_push_that_fails_says_where_the_model_is(tmp_path: Path) -> None:
    export(tmp_path / "model")
    with pytest.raises(PushError, match=rf"could not push to me/rm: .*saved in {tmp_path / 'model'}"):
        push(tmp_path / "model", HubConfig(push=True, repo="me/rm"))  # the tests run with the hub offline
    with pytest.raises(UserError, match="not an exported model"):
        push(tmp_path, HubConfig(push=True, repo="me/rm"))


def test_a_push_makes_repository_and_branch_and_uploads_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of the hub's client; a test cannot reach the hub itself."""
    calls: list[tuple[str, Any]] = []

    class Client:
        def create_repo(self, repo: str, **how: Any) -> Any:
            calls.append(("create_repo", (repo, how)))
            return type("Repository", (), {"repo_id": repo})

        def create_branch(self, repo: str, **how: Any) -> None:
            calls.append(("create_branch", (repo, how)))

        def upload_folder(self, **how: Any) -> Any:
            calls.append(("upload_folder", how))
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr("huggingface_hub.HfApi", Client)
    (tmp_path / "config.json").write_text("{}")
    assert push(tmp_path, HubConfig(push=True, repo="me/rm", revision="v2", private=False)) == "https://hub/commit/1"
    assert calls[:2] == [
        ("create_repo", ("me/rm", {"private": False, "exist_ok": True})),
        ("create_branch", ("me/rm", {"branch": "v2", "exist_ok": True})),
    ]
    name, upload = calls[2]
    assert (name, upload["folder_path"], upload["repo_id"], upload["revision"]) == (
        "upload_folder",
        tmp_path,
        "me/rm",
        "v2",
    )
