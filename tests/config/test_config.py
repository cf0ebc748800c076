"""The configuration: its keys, the values that it accepts, the evaluation data, and dumps that load again."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rmcore.config import Config, SourceConfig, config_from_argv, load_config
from rmcore.config.help import keys_of
from tests.harness.configs import NEEDED, load_text, mistakes

NAMES = (
    "bradley_terry | hinge | rao_kupper | davidson | plackett_luce | regression | scaled_bradley_terry | focal | "
    "listwise | quantile_regression | module:function"
)
# name | type | default. Scripts of users rely on these: add lines, but do not change them.
KEYS = """
model.name | text | (required)
model.revision | text | null | null
model.init | pretrained | random | pretrained
model.trust_remote_code | true | false | false
model.attention | auto | shared | packed | padded | alone | auto
model.head | fresh | stored | fresh
model.outputs | list of text | null | null
model.reward | text | mapping of text to number | null | null
model.weights | fp32 | bf16 | fp32
model.lora.rank | whole number >= 1 | null | null
model.lora.alpha | number > 0 | null | null
model.lora.targets | all-linear | list of text | all-linear
model.lora.base | fp32 | bf16 | int8 | nf4 | fp32
model.lora.dora | true | false | false
model.lora.rslora | true | false | false
data.train | source or list of sources | (required)
data.train.path | text | (required)
data.train.name | text | null | null
data.train.split | text | train
data.train.revision | text | null | null
data.train.amount | whole number >= 1 | number > 0, <= 100 | null | null
data.train.columns | mapping of text to text | {}
data.train.keep | text | null | null
data.train.format | module:function | null | null
data.train.set | text | null | null
data.train.loss | mapping of keys | null | null
data.eval | source or list of sources | null
data.template | text | tokenizer
data.chat_template_kwargs | mapping of text to anything | {}
data.date | text | null | null
data.max_tokens | whole number >= 1 | 1024
data.max_prompt_tokens | whole number >= 1 | null | null
data.length_policy | drop | truncate_left | drop
data.group_by_prompt | true | false | false
data.drop_repeated | true | false | false
data.drop_contradicted | true | false | false
data.limit | whole number >= 1 | null | null
data.shuffle | true | false | true
data.eval_fraction | number >= 0, < 1 | 0
data.cache | text | null | null
data.workers | whole number >= 1 | null | null
batch.pairs | whole number >= 1 | 64
batch.tokens | whole number >= 1 | auto | auto
batch.shrink | true | false | false
optim.lr | number > 0 | 3e-06
optim.head_lr | number > 0 | null | null
optim.schedule | linear | cosine | wsd | constant | linear
optim.warmup_steps | whole number >= 0 | 0
optim.warmup_ratio | number >= 0, < 1 | 0
optim.decay_ratio | number > 0, <= 1 | 0.1
optim.min_lr_ratio | number >= 0, < 1 | 0
optim.betas | list of 2: number >= 0, < 1 | [0.9, 0.999]
optim.eps | number > 0 | 1e-05
optim.weight_decay | number >= 0 | 0
optim.states | fp32 | bf16 | int8 | fp32
optim.ema | number > 0, < 1 | null | null
optim.max_grad_norm | number >= 0 | 1
loss.name | NAMES | bradley_terry
loss.output | text | list of text | null | null
loss.weight | number > 0 | 1
loss.centering | number >= 0 | 0
loss.label_smoothing | number >= 0, < 0.5 | 0
loss.log_barrier | number >= 0 | 0
loss.margin | none | data | number >= 0 | none
loss.sft | number >= 0 | 0
loss.length_decorrelation | number >= 0 | 0
loss.tie_rate | number > 0, < 1 | 0.25
loss.gamma | number >= 0 | 2
loss.brier | number >= 0 | 0
loss.rps | number >= 0 | 0
loss.router_aux | number >= 0 | 0
parallel.strategy | ddp | zero1 | zero2 | zero3 | hsdp | ddp
parallel.precision | auto | bf16 | fp32 | auto
parallel.recompute | auto | none | selective | full | offload | auto
parallel.context | whole number >= 1 | 1
parallel.compile | true | false | false
parallel.offload | true | false | false
parallel.fp8 | true | false | false
parallel.deterministic | true | false | false
parallel.timeout_seconds | whole number >= 1 | 600
run.dir | text | runs/default
run.epochs | whole number >= 1 | 1
run.max_steps | whole number >= 1 | null | null
run.seed | whole number >= 0, < 2147483648 | 1
run.evals | whole number >= 0 | 1
run.metrics | list of module:function | []
run.save_every | whole number >= 1 | null | null
run.save_minutes | number > 0 | null | 30
run.background_save | true | false | true
run.keep | whole number >= 1 | 2
run.keep_best | whole number >= 0 | 0
run.best_metric | text | null | null
run.patience | whole number >= 1 | null | null
run.resume | text | auto
run.allow_changes | list of text | []
run.weights | trained | ema | trained
run.max_bad_steps | whole number >= 1 | 3
log.every | whole number >= 1 | 10
log.tensorboard | true | false | true
log.wandb | true | false | false
log.trackio | true | false | false
log.mlflow | true | false | false
log.samples | whole number >= 0 | 10
log.report | none | html | png | html
export.adapter | true | false | false
export.lm_head | true | false | false
export.towers | true | false | true
hub.push | true | false | false
hub.repo | text | null | null
hub.revision | text | null | null
hub.private | true | false | true
"""


def test_the_keys_their_types_and_defaults_are_frozen() -> None:
    found = [f"{key.name} | {key.kind} | {key.default}" for key in keys_of(Config)]
    assert found == KEYS.replace("NAMES", NAMES).strip().splitlines()


def test_every_key_has_a_meaning_and_a_default_that_applies() -> None:
    config = load_config(None, NEEDED)
    for key in keys_of(Config):
        assert len(key.meaning) > 10, key.name
        value: Any = config
        for part in key.name.split("."):
            value = getattr(value[0] if isinstance(value, tuple) else value, part)
        if key.default != "(required)":
            shown = () if key.name == "data.eval" else yaml.safe_load(key.default)
            written = float(shown) if isinstance(value, float) else tuple(shown) if isinstance(value, tuple) else shown
            assert value == written, key.name


def test_a_config_cannot_be_changed() -> None:
    config = load_config(None, NEEDED)
    with pytest.raises(ValidationError):
        config.optim.lr = 1.0  # type: ignore[misc]


# ---- what is accepted


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-5", 1e-5),
        ("optim.lr=1E-5", 1e-5),
        ("optim.lr=.5", 0.5),
        ("optim.lr=1", 1.0),
        ("optim.lr=1_000", 1000.0),
        ("optim.betas=[0.8, 9e-1]", (0.8, 0.9)),
        ("batch.tokens=auto", "auto"),
        ("batch.tokens=4096", 4096),
        ("loss.margin=data", "data"),
        ("loss.margin=2", 2.0),
        ("data.limit=null", None),
        ("data.limit=", None),
        ("data.shuffle=off", False),
        ("data.shuffle=Yes", True),
        ("data.template=none", "none"),
        ('data.template="no"', "no"),
        ("data.template='1e5'", "1e5"),
        ("data.template=*.jinja", "*.jinja"),
        ("data.template=a: b # c", "a: b # c"),
        ("data.template=2024-01-31", "2024-01-31"),
        ("data.template=12:30", "12:30"),
        ("model.revision=010", "010"),
        ("model.revision=a=b", "a=b"),
        ("run.dir= runs/x ", "runs/x"),
    ],
)
def test_the_value_of_an_override(override: str, value: Any) -> None:
    section, key = override.partition("=")[0].split(".")
    found = getattr(getattr(load_config(None, [*NEEDED, override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_an_amount_is_rows_or_a_share() -> None:
    assert [
        type(load_config(None, [*NEEDED, f"data.train.amount={n}"]).data.train[0].amount) for n in ("1", "1.0")
    ] == [
        int,
        float,
    ]


def test_a_file_and_overrides(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        "model:\n  name: m\n  revision: 'no'\ndata: {train: {path: p, columns: {chosen: better}}}\n"
        "optim:\n  lr: 1e-5\n  betas: [0.5, 0.6]\nrun:\nlog:\n  # every: 3\n",
        ["optim.lr=2e-5", "optim.betas.1=0.7", "data.train.columns.rejected=worse", "hub={push: yes, repo: a/b}"],
    )
    assert (config.model.revision, config.optim.lr, config.optim.betas) == ("no", 2e-5, (0.5, 0.7))
    assert config.data.train == (SourceConfig(path="p", columns={"chosen": "better", "rejected": "worse"}),)
    assert (config.hub.push, config.hub.repo) == (True, "a/b")
    assert config.run.dir == "runs/c"


def test_a_file_may_begin_with_a_byte_order_mark_and_have_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfmodel: {name: m}\r\ndata:\r\n  train: {path: p}\r\n")
    assert load_config(str(tmp_path / "c.yaml"), []).data.train[0].path == "p"


def test_one_source_or_a_list(tmp_path: Path) -> None:
    one, two = "{path: a}", "[{path: a}, {path: b, split: x}]"
    for text, override, paths in [
        (one, "data.train.path=X", ["X"]),
        (one, "data.train.0.path=X", ["X"]),
        (one, "data.train.1.path=X", ["a", "X"]),
        (two, "data.train.1.path=X", ["a", "X"]),
        (two, "data.train=[{path: c}, {path: d}, {path: e}]", ["c", "d", "e"]),
        (two, "data.train={path: c}", ["c"]),
        ("[{path: a}]", "data.train.path=X", ["X"]),
        ("null", "data.train.path=X", ["X"]),
    ]:
        config = load_text(tmp_path, f"model: {{name: m}}\ndata:\n  train: {text}\n", [override])
        assert [source.path for source in config.data.train] == paths, (text, override)
    assert load_text(tmp_path, f"model: {{name: m}}\ndata:\n  train: {two}\n", ["data.train.1.split=y"]).data.train == (
        SourceConfig(path="a"),
        SourceConfig(path="b", split="y"),
    )


# ---- evaluation data


WITHOUT_EVAL_PATH = (
    "model: {name: m}\ndata:\n  train: {path: p, name: n, revision: r, columns: {chosen: c}}\n  eval: {split: test}\n"
)


def test_an_eval_source_without_a_path_uses_the_data_set_of_train(tmp_path: Path) -> None:
    held = SourceConfig(path="p", name="n", revision="r", columns={"chosen": "c"}, split="test")
    assert load_text(tmp_path, WITHOUT_EVAL_PATH).data.eval == (held,)
    moved = load_text(tmp_path, WITHOUT_EVAL_PATH, ["data.train.path=X", "data.eval.name=other"]).data.eval
    assert moved == (held.model_copy(update={"path": "X", "name": "other"}),)
    own = load_text(tmp_path, WITHOUT_EVAL_PATH, ["data.eval.path=own"]).data.eval
    assert own == (SourceConfig(path="own", split="test"),)  # its own data set takes nothing from train
    assert load_text(tmp_path, WITHOUT_EVAL_PATH, ["data.eval=null"]).data.eval == ()


def test_an_eval_source_is_never_the_training_rows_by_default(tmp_path: Path) -> None:
    message = (
        "data.eval.path is missing: set a data set, or (with one train source) set data.eval.split to another split "
        "of it"
    )
    assert mistakes(tmp_path, WITHOUT_EVAL_PATH, ["data.eval.split=train"]) == [f"c.yaml:4: {message}"]
    assert mistakes(tmp_path, None, [*NEEDED, "data.eval.amount=5"]) == [f"override `data.eval.amount=5`: {message}"]
    two = "data.train=[{path: a}, {path: b}]"
    assert mistakes(tmp_path, WITHOUT_EVAL_PATH, [two]) == [f"c.yaml:4: {message}"]
    explicit = load_config(None, [*NEEDED, "data.eval.path=p"])  # an explicit path is allowed
    assert explicit.data.eval == explicit.data.train


def test_the_later_of_eval_and_eval_fraction_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_text(tmp_path, WITHOUT_EVAL_PATH, ["data.eval_fraction=0.1"])
    assert (config.data.eval, config.data.eval_fraction) == ((), 0.1)
    assert config_from_argv([str(tmp_path / "c.yaml"), "data.eval_fraction=0.1"], "prog") == config
    noted = capsys.readouterr()
    assert (noted.out, noted.err.replace(f"{tmp_path}/", "")) == (
        "",
        "prog: override `data.eval_fraction=0.1` replaces data.eval (c.yaml:4)\n",
    )
    fraction = WITHOUT_EVAL_PATH.replace("eval: {split: test}", "eval_fraction: 0.2")
    config = load_text(tmp_path, fraction, ["data.eval.split=test"])
    assert (config.data.eval[0].path, config.data.eval_fraction) == ("p", 0.0)

    assert mistakes(tmp_path, WITHOUT_EVAL_PATH + "  eval_fraction: 0.2\n", []) == [
        "c.yaml:5: data.eval_fraction and data.eval (c.yaml:4) exclude each other"
    ]
    assert mistakes(tmp_path, WITHOUT_EVAL_PATH, ["data.eval_fraction=0.1", "data.eval.amount=5"]) == [
        "override `data.eval_fraction=0.1`: data.eval_fraction and data.eval (override `data.eval.amount=5`) "
        "exclude each other"
    ]
    assert load_text(tmp_path, WITHOUT_EVAL_PATH, ["data.eval_fraction=0"]).data.eval != ()


SETS = "model: {name: m}\ndata:\n  train: {path: p}\n  eval:\n  - {path: a, set: one}\n  - {path: b, set: two}\n"


def test_sources_with_a_set_are_evaluated_apart(tmp_path: Path) -> None:
    assert load_text(tmp_path, SETS).data.eval_sets == {"one": (0,), "two": (1,)}
    third = ["data.eval.2={path: c, set: one}"]
    assert load_text(tmp_path, SETS, third).data.eval_sets == {"one": (0, 2), "two": (1,)}
    third = ["data.eval.2.path=c"]
    assert load_text(tmp_path, SETS, third).data.eval_sets == {"rm": (2,), "one": (0,), "two": (1,)}
    assert load_text(tmp_path, WITHOUT_EVAL_PATH).data.eval_sets == {"rm": (0,)}
    assert load_config(None, NEEDED).data.eval_sets == {}

    held_out = load_text(tmp_path, SETS + "  eval_fraction: 0.2\n")
    assert held_out.data.eval_sets == {"rm": (), "one": (0,), "two": (1,)}, "rows of train, and two sets"
    assert load_text(tmp_path, SETS, ["data.eval_fraction=0.2"]) == held_out, "replaces nothing"
    assert load_text(tmp_path, held_out.dump_yaml()) == held_out
    assert mistakes(tmp_path, SETS + "  - {path: c}\n  eval_fraction: 0.2\n", []) == [
        "c.yaml:8: data.eval_fraction and data.eval (c.yaml:4) exclude each other"
    ]


def test_the_name_of_a_set(tmp_path: Path) -> None:
    for name in ("rm", "a/b", "a b", "-a", '"\\n"'):
        [message] = mistakes(tmp_path, SETS, [f"data.eval.1.set={name}"])
        assert message.startswith("override") and "data.eval.1.set cannot be" in message, message
    assert mistakes(tmp_path, SETS, ["data.train.set=one"]) == [
        "override `data.train.set=one`: data.train.0.set divides data.eval only; data.train mixes all of its sources"
    ]


def test_a_source_without_a_set_is_dumped_as_before_there_were_sets(tmp_path: Path) -> None:
    """A checkpoint keeps the dump, and a resumed run compares it with its own."""
    [source] = load_text(tmp_path, WITHOUT_EVAL_PATH).model_dump(mode="json")["data"]["eval"]
    assert list(source) == ["path", "name", "split", "revision", "amount", "columns"]


def test_the_only_split_of_rewardbench_is_the_default(tmp_path: Path) -> None:
    for path, split in (("allenai/reward-bench", "filtered"), ("allenai/reward-bench-2", "test"), ("other", "train")):
        [source] = load_config(None, [*NEEDED, f"data.eval={{path: {path}, set: bench}}"]).data.eval
        assert (source.split, source.set) == (split, "bench")
    [source] = load_config(None, [*NEEDED, "data.eval={path: allenai/reward-bench, split: raw}"]).data.eval
    assert source.split == "raw"


# ---- dumps


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12) | st.sampled_from(
    ["no", "1e5", "null", "~", "12", "a: b", "- x", "2024-01-01", "=", "<<"]
)
sources = st.builds(
    SourceConfig,
    path=texts,
    name=st.none() | texts,
    split=texts,
    amount=st.none() | st.integers(1, 2**40) | st.floats(0, 1, exclude_min=True),
    columns=st.dictionaries(texts, texts, max_size=3),
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(sources, min_size=1, max_size=3),
    st.lists(sources, max_size=2),
    st.builds(dict, name=texts, revision=st.none() | texts),
    st.builds(dict, lr=st.floats(0, exclude_min=True, allow_infinity=False), betas=st.just((0.0, 1e-300))),
    st.builds(dict, dir=texts, seed=st.integers(0, 2**31 - 1), save_minutes=st.none() | st.floats(1e-9, 1e9)),
)
def test_a_dump_loads_to_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, train: list, held: list, model: dict, optim: dict, run: dict
) -> None:
    config = Config.model_validate(
        {"model": model, "data": {"train": train, "eval": held}, "optim": optim, "run": run, "loss": {"margin": 1}}
    )
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(config.dump_yaml(), encoding="utf-8")
    again = load_config(str(path), [])
    assert again == config
    assert again.dump_yaml() == config.dump_yaml()


def test_a_dump_of_one_source_takes_overrides(tmp_path: Path) -> None:
    dumped = load_text(tmp_path, WITHOUT_EVAL_PATH).dump_yaml()
    assert load_text(tmp_path, dumped, ["data.train.path=X"]).data.train[0].path == "X"
    assert set(yaml.safe_load(dumped)) == set(Config.model_fields)


def test_every_path_may_begin_with_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    names = ["model.name", "data.train.path", "data.eval.path", "data.template", "data.cache", "run.dir", "run.resume"]
    config = load_config(None, [f"{name}=~/{name}" for name in names])
    data = config.data
    found = [config.model.name, data.train[0].path, data.eval[0].path, data.template, data.cache]
    assert [*found, config.run.dir, config.run.resume] == [f"/h/{name}" for name in names]
    assert load_config(None, [*NEEDED, "run.dir=runs/~"]).run.dir == "runs/~"
