"""The mistakes that a configuration reports, and their messages. Any input gives a Config or a UserError."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rmcore.config import Config, UserError, load_config
from rmcore.config.help import keys_of
from tests.harness.configs import NEEDED, mistakes


def test_all_mistakes_are_listed_at_once_each_with_its_place(tmp_path: Path) -> None:
    text = """\
model:
  name: no
  revison: abc
data:
  train: {path: x, splt: train}
  template: 5
  max_tokens: 1e3
optim:
  lr: 1e-5
  lr: 2
  schedule: liner
  eps: "1e-8"
optm:
  lr: 1
lr: 3
hub:
  push: true
log: 5
batch: {tokens: many, pairs: true}
3: x
"""
    overrides = ["optim.lrr=1", "loss.margin=yes", "data.shuffle='true'", "--run.seed=3", "run.seed.x=1", "foo"]
    assert mistakes(tmp_path, text, overrides) == [
        'c.yaml:2: model.name: expected text, got `no` (YAML reads it as false; quote it: "no")',
        "c.yaml:3: model.revison: unknown key; did you mean model.revision?",
        "c.yaml:5: data.train.splt: unknown key; did you mean data.train.split?",
        'c.yaml:6: data.template: expected text, got `5` (YAML reads it as a number; quote it: "5")',
        "c.yaml:7: data.max_tokens: expected whole number >= 1, got `1e3` (write 1000)",
        "c.yaml:10: optim.lr: given twice (first at c.yaml:9)",
        "c.yaml:11: optim.schedule: expected linear | cosine | wsd | constant, got `liner`; did you mean linear?",
        "c.yaml:12: optim.eps: expected number > 0, got `1e-8` (remove the quotes)",
        "c.yaml:13: optm: unknown key; did you mean optim?",
        "c.yaml:15: lr: unknown key; did you mean optim.lr?",
        "c.yaml:17: hub.push needs hub.repo, the user/name to push to",
        "c.yaml:18: log: expected mapping of keys, got `5`",
        "c.yaml:19: batch.pairs: expected whole number >= 1, got `true`",
        "c.yaml:19: batch.tokens: expected whole number >= 1 | auto, got `many`",
        "c.yaml:20: `3`: a key must be text: quote it",
        "override `optim.lrr=1`: optim.lrr: unknown key; did you mean optim.lr?",
        "override `loss.margin=yes`: loss.margin: expected none | data | number >= 0, got `yes` "
        "(YAML reads it as true; quote it: 'loss.margin=\"yes\"')",
        "override `data.shuffle='true'`: data.shuffle: expected true | false, got `'true'` (remove the quotes)",
        "override `--run.seed=3`: not of the form key.sub=value; remove the dashes: run.seed=3",
        "override `run.seed.x=1`: run.seed: expected whole number >= 0, < 2147483648, got a mapping",
        "override `foo`: not of the form key.sub=value",
    ]


BAD_VALUES = [
    *("optim.lr=0", "optim.lr=-1", "optim.lr=.nan", "optim.lr=.inf", "optim.lr=1e999", "optim.lr=true", "optim.lr=x"),
    *("optim.betas=[0.9, 1]", "optim.betas=[0.9]", "optim.betas=0.9", "optim.betas=[-0.1, 0.9]", "optim.eps=0"),
    *("optim.weight_decay=-1", "optim.max_grad_norm=-1", "optim.warmup_steps=-1", "optim.warmup_steps=0.5"),
    *("optim.warmup_ratio=1", "optim.decay_ratio=0", "optim.min_lr_ratio=1", "optim.head_lr=0"),
    *("batch.pairs=0", "batch.pairs=64.0", "batch.pairs=x", "batch.tokens=0", "batch.tokens=Auto"),
    *("data.max_tokens=0", "data.max_tokens=null", "data.max_prompt_tokens=0", "data.limit=0", "data.shuffle=1"),
    *("data.eval_fraction=1", "data.eval_fraction=-0.1", "data.train.amount=0", "data.train.amount=100.5"),
    *("data.train.amount=0.0", "data.train.amount=true", "data.train.columns=[a]", "data.train.columns={a: 1}"),
    *("data.train.path=", 'data.train.path=""', "data.train=x.jsonl", "data.train=[]", "data.train=5"),
    *("data.template=off", "data.length_policy=truncate", "data.cache=7", "model.init=none", "model.name=[a]"),
    *("loss.centering=-1", "loss.label_smoothing=0.5", "loss.margin=-1", "loss.name=hinges", "loss.margin=null"),
    *("parallel.strategy=zero4", "parallel.precision=fp16", "parallel.timeout_seconds=0", "parallel.compile=1"),
    *("run.epochs=0", "run.max_steps=0", "run.seed=-1", "run.seed=2147483648", "run.evals=-1", "run.save_every=0"),
    *("run.save_minutes=0", "run.keep=0", "run.keep_best=-1", "run.max_bad_steps=0", "run.resume=no", "run=5"),
    *("log.every=0", "log.samples=-1", "log.tensorboard=null", "hub.push=true", "hub.repo=5", "model.head=new"),
    *("batch.pairs=99999999999999999999", "model.trust_remote_code='true'"),
]


@pytest.mark.parametrize("override", BAD_VALUES)
def test_values_out_of_range_or_of_another_type(tmp_path: Path, override: str) -> None:
    (line,) = mistakes(tmp_path, None, [*NEEDED, override])
    assert line.startswith(f"override `{override}`: {override.partition('=')[0]}")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "did you mean optim.lr?"),
        ("optim.learning_rate", "did you mean optim.lr?"),
        ("optim.shedule", "did you mean optim.schedule?"),
        ("dat.template", "did you mean data?"),
        ("max_grad_nrom", "did you mean optim.max_grad_norm?"),
        ("push_to_hub", "did you mean hub.push?"),
        ("data.train.column", "did you mean data.train.columns?"),
        ("data.columns", "did you mean data.train.columns?"),
        ("xyzzy", "known sections: model, data, batch, optim, loss, parallel, run, log, export, hub"),
        ("hub.xyzzy", "known here: push, repo, revision, private"),
    ],
)
def test_an_unknown_key_and_what_was_meant(tmp_path: Path, key: str, meant: str) -> None:
    (line,) = mistakes(tmp_path, None, [*NEEDED, f"{key}=1"])
    assert line.startswith(f"override `{key}=1`: ")
    assert line.endswith(f"unknown key; {meant}")


def test_a_missing_required_key_is_reported(tmp_path: Path) -> None:
    assert [line.split(":")[:2] for line in mistakes(tmp_path, None, [])] == [
        ["command line", " model.name is missing"],
        ["command line", " data.train.path is missing"],
    ]
    assert [
        line.split(" is")[0]
        for line in mistakes(tmp_path, "model:\n  init: random\ndata:\n  train:\n    split: x\n", [])
    ] == [
        "c.yaml:1: model.name",
        "c.yaml:4: data.train.path",
    ]
    assert len(mistakes(tmp_path, None, ["model.name=m", "data.eval.split=test"])) == 1  # eval only follows from train


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim=[", "optim: not valid YAML: while parsing a flow node"),
        ("data.template='x", "data.template: not valid YAML: while scanning a quoted scalar"),
        ("model.name=[*a]", "model.name: not valid YAML: aliases (*name) are not read"),
        ("optim.lr.x.y=1", "optim.lr: expected number > 0, got a mapping"),
        ("data.train.2.path=x", "data.train is a list of 1 and has no `2`"),
        ("data.train.columns={a: b, a: c}", "data.train.0.columns.a: given twice"),
        (".lr=1", "not of the form key.sub=value"),
        ("=1", "not of the form key.sub=value"),
        ("", "not of the form key.sub=value"),
    ],
)
def test_an_override_that_cannot_be_read(tmp_path: Path, override: str, message: str) -> None:
    (line,) = mistakes(tmp_path, None, [*NEEDED, override])
    assert line.startswith(f"override `{override}`: {message}")


def test_an_override_of_a_key_that_does_not_exist(tmp_path: Path) -> None:
    two = "model: {name: m}\ndata: {train: [{path: a}, {path: b}]}\noptim: {lr: 1}\n"
    assert mistakes(tmp_path, two, ["data.train.path=X", "optim.lr.x=1"]) == [
        "override `data.train.path=X`: data.train is a list of 2: write data.train.0.path",
        "override `optim.lr.x=1`: optim.lr is a single value and has no key `x`",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": the file is empty"),
        (b"# all: of it\n", ": the file is empty"),
        (b"- a\n- b\n", ":1: expected a mapping of sections"),
        (b"\n\njust text", ":3: expected a mapping of sections"),
        (b"model:\n  name: [a\nrun: {}\n", ":3: not valid YAML: while parsing a flow sequence"),
        (b"model:\n\tname: a\n", ":2: not valid YAML: while scanning for the next token"),
        (b"model: {name: m}\n---\nrun: {}\n", ":2: not valid YAML: expected a single document"),
        (b"a: &a {x: 1}\nmodel: *a\n", ":2: not valid YAML: aliases (*name) are not read"),
        (b'model: {name: "\\UFFFFFFFF"}\n', ": not valid YAML:"),
        (b"[" * 5000, ": not valid YAML: nested too deeply"),
        (b"\x7fELF\x02\x00\x80\xff", ": not a text file in UTF-8 (byte 6)"),
        (b"model\x00: x\n", ": not a text file (control character at position 5)"),
        (b"#" * 1_000_001, ": larger than 1000000 bytes"),
    ],
)
def test_a_file_that_is_not_a_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_config(str(path), ["optim.lrr=1"])
    assert str(raised.value).startswith(f"{path}{message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "tag", ["!!python/name:os.system", "!!python/object/apply:os.getcwd []", "!x", "!!set {a}", "!!int x"]
)
def test_no_tag_builds_anything(tmp_path: Path, tag: str) -> None:
    (line,) = mistakes(tmp_path, f"model: {{name: m}}\ndata: {{train: {{path: p}}}}\nhub:\n  repo: {tag}\n", [])
    assert line.startswith("c.yaml:4: hub.repo: ")
    assert "YAML tag" in line


def test_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "hh.yaml").write_text("model: {}")
    for path, message in [
        (tmp_path / "hh.yml", f": no such file; did you mean {tmp_path}/hh.yaml?"),
        (tmp_path / "none" / "x.yaml", ": no such file"),
        (tmp_path, f": a directory; expected a YAML file such as {tmp_path}/config.yaml"),
        (tmp_path / "hh.yaml" / "x", ": cannot be read: Not a directory"),
        (tmp_path / "x\0", ": cannot be read: embedded null byte"),
    ]:
        with pytest.raises(UserError) as raised:
            load_config(str(path), [])
        assert str(raised.value) == f"{path}{message}"


def test_a_config_built_without_a_file_obeys_the_same_rules() -> None:
    data = {"train": {"path": "p"}, "eval": {"split": "test"}}
    assert Config.model_validate({"model": {"name": "m"}, "data": data}).data.eval[0].path == "p"
    for bad in [data | {"eval_fraction": 0.1}, {"train": []}, data | {"typo": 1}]:
        with pytest.raises(ValidationError):
            Config.model_validate({"model": {"name": "m"}, "data": bad})


words = st.sampled_from([word for key in keys_of(Config) for word in key.name.split(".")] + ["0", "1", "x", ""])
scalars = st.sampled_from(
    ["1", "1e-5", "no", "null", "auto", "x", "[]", "{}", "[1, 2]", "{path: p}", "'a'", "!!int 1", "*a", "|"]
)
lines = st.builds(
    "{}{}: {}".format, st.sampled_from(["", "  ", "    ", "- ", "  - ", "\t"]), words, scalars | st.text(max_size=8)
)
yaml_texts = st.lists(lines | st.text(max_size=20), max_size=12).map("\n".join) | st.text(max_size=60)
assignments = st.builds(
    "{}={}".format, st.lists(words, max_size=4).map(".".join), scalars | st.text(max_size=8)
) | st.text(max_size=12)


@settings(deadline=None, max_examples=400)
@given(yaml_texts, st.lists(assignments, max_size=4))
@example("data:\n  train:\n  - 5\n  eval: [{}, null, x]", ["data.eval.0.path=x"])
@example("data: [1]\nmodel: {name: {a: b}}\nrun: null", ["data.0.train=x", "data.train.path=p"])
@example("data: {eval: {}, eval_fraction: 0.5, train: {path: [1]}}", ["data.eval_fraction=yes"])
@example("!!set {a}", [])
@example("? [a]\n: b\n? {a: b}\n: c", [])
@example("optim: {lr: !!float x, eps: !!bool 1, betas: !!null 3}", ["batch.pairs=" + "9" * 5000])
@example('model: {name: "\\ud800"}\n', ["data.train.path=\ud800"])
def test_anything_gives_a_config_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, overrides: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for source in (str(path), None):
        try:
            config = load_config(source, overrides)
        except UserError as error:
            assert str(error)
        else:
            assert isinstance(config, Config)
            config.dump_yaml()
