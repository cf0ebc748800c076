"""The model card, and the push to the hub: the calls of the client, and the messages when it fails."""

import json
import re
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from rmcore.config import UserError
from rmcore.config.schema import HubConfig
from rmcore.data.synthetic import byte_tokenizer
from rmcore.hf_export.card import model_card
from rmcore.hf_export.upload import PushError, exported_files, push
from rmcore.host.terminal import visible
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
    made = model_card(run_config(), wants_text=True, made=True)
    assert "classifier_class(AutoConfig.from_pretrained(" in made and "AutoModelForSequenceClassification" not in made
    local = model_card(run_config(), wants_text=True)
    assert "base_model" not in local and "had no evaluation" in local and "eos_token" in local
    assert "counts were not available" in local and "pooler" not in local.replace('runner="pooling"', "")


HOSTILE = [
    "<script>alert(1)</script>",
    "x | y | z",
    "a\n\n# heading\n\n- item",
    "[click](http://evil.example) ![i](http://evil.example/i.png)",
    "http://evil.example www.evil.example @someone",
    "``` \n<img src=x onerror=y>\n```",
    "`code` *bold* _it_ ~~gone~~ $x$ &amp; \\ \x1b[2J\x9b\u202e",
    "---\nlicense: mit\n---",
    "</details><b>",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_write_markup_into_the_card(name: str) -> None:
    """Rendered by a Markdown parser: the tags are those of a harmless name, and the name is there as text."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")

    def rendered(name: str) -> tuple[Counter[str], str]:
        metrics: dict[str, Any] = dict.fromkeys(
            ("accuracy_low", "accuracy_high", "length_accuracy", "loss", "ece"), 0.5
        )
        metrics |= {"accuracy": 0.75, "brier": 0.21, "count": 20}
        metrics["sources"] = {name: metrics, "other": metrics}
        config = run_config(f"model.name={json.dumps(name)}", f"data.train={json.dumps([{'path': name}])}")
        config = config.model_copy(update={"data": config.data.model_copy(update={"template": name})})
        data = texts(byte_tokenizer())
        data.report["dropped"][name] = 3
        card = model_card(config, wants_text=False, data=data, metrics=metrics)
        assert visible(card) == card
        html = parser.render(card.split("---\n", 2)[2])
        return Counter(re.findall(r"<(\w+)", html)), html

    tags, html = rendered(name)
    expected, _ = rendered("harmless")
    assert tags == expected, html
    shown = escape(visible(" ".join(name.split())), quote=False)
    assert html.count(f"<td>{shown}</td>") == 1 and f"dropped, {shown}" in html, html


def test_code_that_a_model_needs_is_part_of_the_push(tmp_path: Path) -> None:
    files = {
        "modeling.py": "from .helper import x\n",
        "helper.py": "from .deep import y\n",
        "deep.py": "",
        "keys.py": "",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text("{}")
    assert exported_files(tmp_path) == (["config.json"], sorted(files))
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.M", "AutoConfig": "a--b.C"}}))
    assert exported_files(tmp_path) == (["config.json", "deep.py", "helper.py", "modeling.py"], ["keys.py"])
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "../../x.M", "AutoConfig": [None, 3]}}))
    assert exported_files(tmp_path) == (["config.json"], sorted(files))


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
