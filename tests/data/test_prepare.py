"""Prepares data as a run does: a row-by-row oracle on real pairs, hold-out by prompt, cache keys, real ranks."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from rmcore.config import UserError, load_config
from rmcore.data import pipeline
from rmcore.data.formats.comparison import comparison_from_row, detect_format
from rmcore.data.formats.selection import held_out
from rmcore.data.prepare import describe, prepare_data
from rmcore.data.synthetic import EOS, byte_tokenizer
from rmcore.data.tokens.templates import load_template
from rmcore.data.tokens.tokenizer import load_tokenizer
from tests.harness.paths import ROOT, SHARED, needs_shared

HH = SHARED / "data/pairs/hh_helpful_base.jsonl.gz"
PANDALM = SHARED / "data/pairs/pandalm_test.jsonl.gz"  # 782 rows on 158 prompts
STORIES = SHARED / "data/stories260k"


def make_config(cache, *overrides):
    return load_config(None, ["model.name=synthetic", "data.template=none", f"data.cache={cache}", *overrides])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_rows(count, prompts=None):
    """Rows of growing length on `prompts` different prompts, with margins and three sources."""
    return [
        {"prompt": f"Question {i % (prompts or count)}{'?' * (i % 5)}", "chosen": f" yes {i}", "rejected": f" no {i}!",
         "margin": i / 4, "source": f"s{i % 3}"}
        for i in range(count)
    ]  # fmt: skip


def read_gzip(path):
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def prepare(config, **options):
    return prepare_data(config, load_tokenizer(config), None, **options)


def texts_of(data):
    """(winner's ids, loser's ids, margin, source) of every pair, in order."""
    found = []
    for number in range(len(data)):
        item = data.comparison(number)
        for (winner, loser), margin in zip(item.pairs, item.margin, strict=True):
            source = data.sources[data.source_index[number]]
            found.append((item.text(winner).tolist(), item.text(loser).tolist(), float(margin), source))
    return found


@needs_shared
@pytest.mark.parametrize("policy", ["drop", "truncate_left"])
@pytest.mark.parametrize("template", ["none", "simple_chat", "zephyr"])
def test_real_pairs_equal_the_row_by_row_oracle(tmp_path, template, policy):
    config = make_config(
        tmp_path, f"model.name={STORIES}", f"data.train.path={HH}", f"data.template={template}", "data.limit=150",
        "data.max_tokens=400", "data.max_prompt_tokens=200", f"data.length_policy={policy}",
    )  # fmt: skip
    tokenizer = load_tokenizer(config)
    data = prepare_data(config, tokenizer, 512).train

    rows = read_gzip(HH)[:150]
    render = load_template(template, tokenizer)
    format = detect_format(rows[:20], {}, origin="HH")
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    wanted, dropped = [], Counter()
    for row in rows:
        comparison = comparison_from_row(row, format, wants_text=template == "none", source="hh", where="")
        prompt_text, texts = render.render(comparison)
        prompt, chosen, rejected = ids(prompt_text), *map(ids, texts)
        cut = max(len(prompt) - 200, len(chosen) - 400, len(rejected) - 400, 0)
        if cut and policy == "drop":
            dropped["prompt too long" if len(prompt) > 200 else "text too long"] += 1
        elif cut and not (prompt[:cut] == chosen[:cut] == rejected[:cut] and cut <= len(prompt)):
            dropped["answer alone too long"] += 1
        elif chosen[cut:] == rejected[cut:]:
            dropped["identical answers"] += 1
        else:
            wanted.append((chosen[cut:], rejected[cut:], 0.0, comparison.source))
    assert 20 < len(wanted) < 150 and dropped  # the limits bite, and not everywhere
    assert texts_of(data) == wanted
    assert data.report["dropped"] == dict(dropped)
    assert data.report["kept"] + sum(data.report["dropped"].values()) == data.report["rows"] == 150


@needs_shared
def test_hold_out_by_prompt_shares_no_prompt_and_hits_the_fraction(tmp_path):
    config = make_config(tmp_path, f"data.train.path={PANDALM}", "data.eval_fraction=0.2", "data.max_tokens=100000")
    prepared = prepare(config)
    train, evaluation = prepared.train, prepared.eval
    assert not set(train.prompt_hash.tolist()) & set(evaluation.prompt_hash.tolist())
    rows = read_gzip(PANDALM)
    most = max(Counter(row["prompt"] for row in rows).values())
    assert train.report["rows"] + evaluation.report["rows"] == 782
    assert abs(evaluation.report["rows"] - 0.2 * 782) <= most / 2  # whole prompts: off by half of one at most
    other = prepare(make_config(tmp_path, f"data.train.path={PANDALM}", "data.eval_fraction=0.2",
                                "data.max_tokens=100000", "run.seed=2"))  # fmt: skip
    assert set(other.eval.prompt_hash.tolist()) != set(evaluation.prompt_hash.tolist())


def test_held_out_takes_whole_prompts_and_leaves_both_sides_something():
    hashes = np.array([5, 9, 5, 1, 9, 9, 7], dtype=np.uint64)  # prompts 1, 5, 7, 9 with 1, 2, 1, 3 rows
    assert held_out(hashes, 3 / 7).tolist() == [True, False, True, True, False, False, False]
    assert held_out(hashes, 0.01).sum() == 1
    assert (~held_out(hashes, 0.999)).sum() == 3  # the last prompt stays in train
    with pytest.raises(UserError, match="same prompt"):
        held_out(np.full(3, 8, dtype=np.uint64), 0.5)


def test_the_cache_is_read_the_second_time_and_gives_the_same(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", some_rows(40))
    config = make_config(tmp_path / "cache", f"data.train.path={file}", "data.eval_fraction=0.25")
    calls = []
    report = lambda *call: calls.append(call)  # noqa: E731
    first = prepare(config, progress=report)
    assert calls[-1][0] == calls[-1][1] and {call[2] for call in calls} == {"data.train", "data.train (held out)"}
    calls.clear()
    second = prepare(config, progress=report)
    assert not calls
    for one, two in ((first.train, second.train), (first.eval, second.eval)):
        assert one.fingerprint == two.fingerprint and one.report == two.report
        assert texts_of(one) == texts_of(two)
    assert describe(first, config) == describe(second, config)


@pytest.mark.parametrize(
    "change",
    [
        "data.max_tokens=500", "data.max_prompt_tokens=500", "data.length_policy=truncate_left", "data.limit=39",
        "data.template=simple_chat", "loss.margin=data", "loss.margin=1.5", "data.train.amount=0.5",
        "data.eval_fraction=0.5", "data.train.columns={chosen: rejected, rejected: chosen}", "content", "tokenizer",
        "data.group_by_prompt=true", "data.drop_repeated=true", "data.drop_contradicted=true", "data.train.amount=2.0",
    ],
)  # fmt: skip
def test_whatever_decides_the_content_is_in_the_key(tmp_path, change):
    file = write_rows(tmp_path / "rows.jsonl", some_rows(40))
    base = ["data.train={path: " + str(file) + "}"]
    prepare(make_config(tmp_path / "cache", *base))
    tokenizer = byte_tokenizer()
    if change == "content":
        write_rows(file, [*some_rows(39), {**some_rows(40)[39], "chosen": " yes 38"}])
    elif change == "tokenizer":
        tokenizer.add_tokens(["yes"])
    else:
        base.append(change)
    calls = []
    prepare_data(make_config(tmp_path / "cache", *base), tokenizer, None, progress=lambda *call: calls.append(call))
    assert calls  # built anew


def test_what_does_not_decide_the_content_is_not_in_the_key(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", some_rows(40))
    prepare(make_config(tmp_path / "cache", f"data.train.path={file}"))
    calls = []
    changed = make_config(tmp_path / "cache", f"data.train.path={file}", "optim.lr=1e-3", "run.seed=5", "batch.pairs=8")
    prepare(changed, progress=lambda *call: calls.append(call))
    assert not calls


def test_margins_come_from_the_data_a_number_or_not_at_all(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", some_rows(8))
    wanted = {"none": [0.0] * 8, "data": [i / 4 for i in range(8)], "1.5": [1.5] * 8}
    for margin, values in wanted.items():
        config = make_config(tmp_path / "cache", f"data.train.path={file}", f"loss.margin={margin}")
        assert prepare(config).train.margin.tolist() == values


def judged_rows(count, margin=2):
    """Rows with two answers, of which now the first and now the second wins."""
    return [
        {"prompt": f"p{i}", "answer_a": "yes", "answer_b": "no", "winner": "ab"[i % 2], "margin": margin}
        for i in range(count)
    ]


def test_a_cache_of_margins_that_were_read_otherwise_is_not_used(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl", judged_rows(4))
    overrides = [f"data.train.path={file}", "loss.margin=data"]
    calls = []

    def prepared(*more):
        calls.clear()
        return prepare(make_config(tmp_path / "cache", *overrides, *more), progress=lambda *call: calls.append(call))

    with monkeypatch.context() as older:
        older.setattr(pipeline, "MARGINS", 1)
        assert prepared() and prepared("loss.margin=none") and calls
    assert prepared().train.margin.tolist() == [2.0] * 4 and calls
    assert prepared("loss.margin=none").train.margin.tolist() == [0.0] * 4 and not calls, "no margin, no change"


def test_winners_that_are_to_trail_are_counted(tmp_path):
    rows = [*judged_rows(3, margin=-2), *judged_rows(4)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    told = [
        line
        # Without a margin, with one number, and with an objective that reads only the size, nothing trails.
        for loss in ("margin=data", "margin=none", "margin=1.5", "name=scaled_bradley_terry")
        for line in prepare(make_config(tmp_path / "cache", f"data.train.path={file}", f"loss.{loss}")).warnings
        if "margin" in line
    ]
    assert told == [
        "data.train: 3 pairs have a negative margin: a margin is by how much the winner leads, and these winners are "
        "to trail"
    ]
    soft = [{**row, "winner": None, "probability": 0.3 + i / 10} for i, row in enumerate(rows)]
    file = write_rows(tmp_path / "soft.jsonl", soft)
    warnings = prepare(make_config(tmp_path / "cache", f"data.train.path={file}", "loss.margin=data")).warnings
    assert [line[:30] for line in warnings if "margin" in line] == ["data.train: 2 pairs have a neg"], "0.5 is even"


def test_sources_are_concatenated_and_a_rows_own_source_wins(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", some_rows(6))
    two = write_rows(tmp_path / "two.jsonl", [{k: v for k, v in row.items() if k != "source"} for row in some_rows(4)])
    config = make_config(tmp_path / "cache", "data.train=[{path: " + str(one) + "}, {path: " + str(two) + "}]")
    train = prepare(config).train
    assert [train.sources[i] for i in train.source_index] == ["s0", "s1", "s2"] * 2 + ["two"] * 4
    assert len(train.report["formats"]) == 2


def test_no_evaluation_reads_no_evaluation_data(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", some_rows(20))
    missing = f"data.eval.path={tmp_path}/missing.jsonl"
    config = make_config(tmp_path / "cache", f"data.train.path={file}", missing, "run.evals=0")
    assert prepare(config).eval is None
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        prepare(make_config(tmp_path / "cache", f"data.train.path={file}", missing))
    # held-out rows stay out of train, evaluated or not
    held = make_config(tmp_path / "cache", f"data.train.path={file}", "data.eval_fraction=0.5", "run.evals=0")
    assert len(prepare(held).train) == 10 and prepare(held).eval is None


def test_prompts_in_train_and_eval_are_warned_of(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", some_rows(10))
    other = write_rows(tmp_path / "other.jsonl", [*some_rows(3), {**some_rows(1)[0], "prompt": "A new one"}])
    config = make_config(tmp_path / "cache", f"data.train.path={train}", f"data.eval.path={other}")
    prepared = prepare(config)
    (warning,) = prepared.warnings
    assert "3 of 4" in warning and "data.eval" in warning and warning in describe(prepared, config)


def test_keeping_no_row_stops_with_the_table_of_reasons(tmp_path):
    rows = [*some_rows(7), {"prompt": "q", "chosen": "a", "rejected": "a"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    config = make_config(tmp_path / "cache", f"data.train.path={file}", "data.max_tokens=8")
    with pytest.raises(UserError) as error:
        prepare(config)
    message = str(error.value)
    assert "data.train: no row is left" in message and "8 rows read" in message
    assert "7 dropped: text too long (more than data.max_tokens=8 tokens)" in message
    assert "1 dropped: identical answers" in message


def test_more_tokens_than_the_model_has_positions_is_refused_before_anything_is_read(tmp_path):
    config = make_config(tmp_path, "data.train.path=/nowhere.jsonl", "data.max_tokens=513")
    with pytest.raises(UserError, match=r"data\.max_tokens=513 is more than the 512 positions.*data\.max_tokens=512"):
        prepare_data(config, byte_tokenizer(), 512)


def test_oddities_in_the_texts_are_told(tmp_path):
    rows = [*some_rows(5), {"prompt": f"say {EOS}", "chosen": f" x{EOS}", "rejected": ""}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    config = make_config(tmp_path / "cache", f"data.train.path={file}")
    for _ in range(2):  # the second time they come from the cache
        told = "\n".join(prepare(config).warnings)
        assert "doubled EOS in 2 of 12 answers" in told  # " x<eos>", and the empty answer behind the prompt's own
        assert f"1 rows contains special tokens, which it becomes: {EOS} 2 times" in told
        assert "1 rows have an empty answer" in told


def test_rows_that_a_template_refuses_are_dropped_and_counted(tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('bad turn') }}{% endif %}"
        "{{ m.content }}{% endfor %}{{ eos_token }}"
    )
    rows = some_rows(5)
    rows[3]["chosen"] = " bad"
    file = write_rows(tmp_path / "rows.jsonl", rows)
    config = make_config(tmp_path / "cache", f"data.train.path={file}", f"data.template={template}")
    prepared = prepare(config)
    assert prepared.train.report["dropped"] == {"refused by the template": 1} and len(prepared.train) == 4
    assert "bad turn" in describe(prepared, config)


def test_the_summary_gives_the_figures(tmp_path):
    # "Question 0 yes 0<eos>" and "Question 0 no 0!<eos>": bytes + 1 each, 11 of them shared (with the space)
    file = write_rows(tmp_path / "rows.jsonl", some_rows(1))
    config = make_config(tmp_path / "cache", f"data.train.path={file}")
    text = describe(prepare(config), config)
    chosen, rejected, shared = len("Question 0 yes 0") + 1, len("Question 0 no 0!") + 1, len("Question 0 ")
    together = chosen + rejected - shared
    assert f"{together} with each prompt once, {chosen + rejected} as separate texts" in text
    assert f"sharing ratio {(chosen + rejected) / together:.2f}" in text
    assert "1 rows read" in text and "1 kept" in text and "s0 1" in text and "explicit prompt, text" in text


RANK = """
import sys
from rmcore.config import load_config
from rmcore.data.prepare import prepare_data
from rmcore.data.tokens.tokenizer import load_tokenizer
config = load_config(None, sys.argv[1:])
prepared = prepare_data(config, load_tokenizer(config), None, progress=lambda done, total, what: print("built", what))
print(prepared.train.fingerprint, len(prepared.train), prepared.eval.fingerprint, len(prepared.eval))
"""


def test_ranks_that_start_together_prepare_once(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", some_rows(3000))
    arguments = ["model.name=synthetic", "data.template=none", f"data.train.path={file}", "data.eval_fraction=0.1",
                 f"data.cache={tmp_path / 'cache'}"]  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [rank.communicate(timeout=200)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert len({lines[-1] for lines in outputs}) == 1 and " 2700 " in outputs[0][-1]
    for part in ("built data.train", "built data.train (held out)"):
        assert sum(part in lines for lines in outputs) == 1


def test_a_user_without_a_home_directory_is_asked_for_a_cache(monkeypatch, tmp_path):
    """Containers run under user ids that have neither $HOME nor a line in /etc/passwd."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("RMCORE_CACHE", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    config = load_config(None, ["model.name=synthetic", "data.train.path=synthetic", "data.template=none"])
    with pytest.raises(UserError, match=r"no home directory .*set data\.cache or RMCORE_CACHE"):
        prepare(config)
    monkeypatch.setenv("RMCORE_CACHE", str(tmp_path))
    assert len(prepare(config).train)
