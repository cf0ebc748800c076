"""Checks report.html: well-formed, escaped, without network, with the right numbers; its failure does not end a run."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from rmcore.evaluate import main
from rmcore.evaluation.answer_metrics import AnswerArrays
from rmcore.evaluation.pair_metrics import PairArrays, pair_metrics
from rmcore.evaluation.samples import SampleRow
from rmcore.report.content import Report, read_history
from rmcore.report.draw import INK
from rmcore.report.write import OF_A_RUN, OF_PAIRS, write_report
from tests.harness.exporting import export
from tests.harness.paths import ROOT
from tests.harness.ranks import run_ranks, train_rank

NASTY = "<script>alert('1')</script> & <img src=x onerror=\"go()\"> $x^2$ \x1b[31m 日本 \ud800"
SVG_TAGS = {"svg", "defs", "g", "path", "use", "clippath", "rect", "style", "image"}
HTML_TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h4", "p", "b", "nav", "a", "main",
    "section", "div", "span", "strong", "small", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption",
    "article", "em", "pre", "footer",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would find: tags, attributes, the text outside style elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.text = "\n".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open != "style":
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def judged(rewards: np.ndarray, sources: tuple[str, ...] = ("one",)) -> dict[str, Any]:
    """Pairs [P, 2] of rewards as a report holds them, over sources in turn."""
    generator, count = np.random.Generator(np.random.PCG64(1)), len(rewards)
    lengths = generator.integers(1, 200, size=(count, 2))
    source = np.arange(count) % len(sources)
    pairs = PairArrays(
        chosen_P=rewards[:, 0], rejected_P=rewards[:, 1], weight_P=np.ones(count), chosen_length_P=lengths[:, 0],
        rejected_length_P=lengths[:, 1], comparison_P=np.arange(count), winner_P=2 * np.arange(count),
        loser_P=2 * np.arange(count) + 1, source_P=source, sources=sources,
    )  # fmt: skip
    answers = AnswerArrays(rewards.ravel(), lengths.ravel(), np.repeat(np.arange(count), 2), np.repeat(source, 2))
    return {"pairs": pairs, "answers": answers, "metrics": pair_metrics(pairs, answers)}


def a_report(name: str = "name", history: list[dict[str, Any]] | None = None, **found: Any) -> Report:
    nothing = {"pairs": None, "answers": None, "metrics": {}}
    return Report(
        title=name, facts={"model": name}, samples=[SampleRow(name, name, name, 0.5, -0.25)] * 2,
        drops={name: {"rows": 3, "kept": 2, "dropped": {name: 1}, "pairs": 2}}, notes=[name], config_yaml=name,
        history=history or [], environment={"command": name}, **(found or nothing),
    )  # fmt: skip


def log(evaluations: int = 2) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, 2 * evaluations + 1):
        rewards = {"chosen_rewards": 0.1 * step, "rejected_rewards": 0.0}
        train = {"loss": 0.7 - 0.01 * step, "accuracy": 0.5, "lr": 1e-5, **rewards}
        lines.append({"episode": 8 * step, "grad_norm": 1.5, **{f"train/rm/{k}": v for k, v in train.items()}})
        if step % 2 == 0:
            held_out = {"loss": 0.69, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, **rewards,
                        "length_accuracy": 0.5, "reward_mean": 0.1, "reward_std": 1.0}  # fmt: skip
            lines.append({"episode": 8 * step, **{f"eval/rm/{k}": v for k, v in held_out.items()}})
    return lines


def test_nothing_on_the_page_acts_or_loads(tmp_path: Path) -> None:
    """The page only shows text of data and config, wherever it contains such text."""
    found = judged(np.random.Generator(np.random.PCG64(2)).normal(size=(60, 2)), (NASTY, "other"))
    write_report(a_report(NASTY, log(), **found), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert set(page.tags) <= HTML_TAGS | SVG_TAGS
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("href", "xlink:href", "src", "action", "data")]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page.source))
    assert all(address.startswith("http://www.w3.org/") for address in addresses), "names of XML, nothing to load"
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    shown = NASTY.replace("\x1b", "\u241b").replace("\ud800", "\\ud800")
    # Title twice, model, source, three texts of two samples, part and reason of the drops, notes, config, command.
    assert page.text.count(shown) == 2 + 1 + 1 + 6 + 2 + 1 + 1 + 1
    ids = [value for name, value in page.attributes if name == "id"]
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    assert repeated == [], "pictures do not take each other's shapes"
    local = {link[1:] for link in links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert local <= set(ids)


def test_pictures_are_whole_and_take_the_pages_ink(tmp_path: Path) -> None:
    found = judged(np.random.Generator(np.random.PCG64(3)).normal(size=(300, 2)), tuple("abcdefgh"))
    write_report(a_report(history=log(), **found), tmp_path / "report.html", tmp_path / "plots")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    drawn = re.findall(r'<figure id="picture-(\w+)">(<svg.*?</svg>)', source, re.DOTALL)
    assert {name for name, _ in drawn} == {*OF_A_RUN, *OF_PAIRS} and len(drawn) == len(OF_A_RUN) + len(OF_PAIRS)
    for name, svg in drawn:
        element = ElementTree.fromstring(svg)
        assert not {"width", "height"} & set(element.keys()) and element.get("viewBox"), name
        assert "currentColor" in svg and INK not in svg, name
    for name in (*OF_A_RUN, *OF_PAIRS):
        picture = imread(tmp_path / "plots" / f"{name}.png")
        assert min(picture.shape[:2]) > 250 and picture[0, 0].tolist() == [1, 1, 1, 1], "on white"
        assert picture[..., :3].std() > 0.02, "something is drawn"
    assert len(source) < 1_500_000


@pytest.mark.parametrize(
    "rewards",
    [
        np.array([[1.0, 0.0]]),
        np.zeros((5, 2)),
        np.array([[1e30, -1e30], [0.0, 0.0]]),
        np.array([[np.nan, 0.0], [1.0, np.inf], [1.0, 0.0]]),
    ],
    ids=["one pair", "all tie", "huge", "not numbers"],
)
def test_odd_rewards_make_a_page(tmp_path: Path, rewards: np.ndarray) -> None:
    write_report(a_report(**judged(rewards)), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert ("not numbers" in page.text) == (not np.isfinite(rewards).all())
    assert 'id="picture-margins"' in page.source or "not numbers" in page.text


def test_a_run_without_evaluation_says_so(tmp_path: Path) -> None:
    write_report(a_report(), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "Nothing was evaluated" in page.text and "svg" not in page.tags


def test_half_a_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"episode": 8, "loss": 1.5}\n{"episode": 16, "loss": null}\n[]\n{"episode": 24, "loss": 2.5}\n{"epi'
    )
    x, y = a_report(history=read_history(path)).series("loss")
    assert (x.tolist(), y.tolist()) == ([8, 24], [1.5, 2.5])
    assert read_history(tmp_path / "none") == []


def run_arguments(directory: Path, *more: str) -> list[str]:
    return [
        str(ROOT / "configs" / "quickstart.yaml"), f"run.dir={directory}", "data.limit=64", "run.max_steps=2",
        "run.evals=2", "log.every=1", "log.tensorboard=false", *more,
    ]  # fmt: skip


def test_a_run_leaves_its_report(tmp_path: Path) -> None:
    run_ranks(train_rank, 1, tmp_path / "ranks", run_arguments(tmp_path / "run", "log.report=png"))
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    page = Page(tmp_path / "run" / "report.html")
    assert f"{status['eval']['accuracy']:.4f}" in page.text and f"{status['eval']['brier']:.3f}" in page.text
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["chosen"] in page.text for sample in samples[-10:])
    assert "max_steps: 2" in page.text and "data.eval" in page.text
    assert (tmp_path / "run" / "plots" / "drift.png").is_file()


@pytest.mark.distributed
def test_a_report_that_fails_ends_nothing(tmp_path: Path) -> None:
    """A directory has the name of the page; the run is completed on both ranks."""
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    run_ranks(train_rank, 2, tmp_path / "ranks", run_arguments(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["status"] == "completed"
    assert (tmp_path / "run" / "report.html").is_dir() and (tmp_path / "run" / "model" / "config.json").is_file()


def test_the_evaluate_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tmp_path / "model")
    rows = [{"prompt": f"What is {i}?", "chosen": "A <b>number</b>.", "rejected": "No" * i} for i in range(1, 12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), f"data.cache={tmp_path / 'cache'}", "--json"]
    assert main([*common, "--report", str(tmp_path / "out.html"), "--png", str(tmp_path / "plots")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    page = Page(tmp_path / "out.html")
    assert f"{metrics['accuracy']:.4f}" in page.text and "A <b>number</b>." in page.text
    assert {path.stem for path in (tmp_path / "plots").iterdir()} <= OF_PAIRS.keys()
    assert main([*common, "--report", str(tmp_path / "model")]) == 2, "a directory cannot be written as a file"
    assert "cannot write the report" in capsys.readouterr().err
