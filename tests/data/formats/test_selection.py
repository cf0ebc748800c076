"""Rows of one prompt are merged; repeated and contradicted rows are found, also if other rows lie between them."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore.config import load_config
from rmcore.data.batches.batch import build_batch
from rmcore.data.drop_reasons import CONTRADICTED, REPEATED
from rmcore.data.formats.comparison import Comparison
from rmcore.data.formats.selection import MOST_ANSWERS, Reads, RowHashes, gathered, merged, select
from rmcore.data.prepare import describe, prepare_data
from rmcore.data.tokens.tokenizer import load_tokenizer
from tests.harness.oracle import Item, Items, item, reward_model, tiny_model
from tests.harness.paths import SHARED, needs_shared

PANDALM = SHARED / "data/pairs/pandalm_test.jsonl.gz"  # 782 rows on 158 prompts


def one(prompt, first, second, *, weight=1.0, source="s"):
    return Comparison(prompt, (first, second), source, prompt, pairs=((0, 1),), margin=(0.0,), weight=(weight,))


def hashes_of(comparisons):
    hashes = RowHashes()
    for comparison in comparisons:
        hashes.add(comparison, 0)
    return hashes


answer = st.sampled_from("abc")
row = st.builds(one, st.sampled_from("pq"), answer, answer, weight=st.sampled_from([1.0, 0.5]))


@settings(max_examples=300, deadline=None)
@given(st.lists(row, min_size=1, max_size=9), st.booleans(), st.booleans(), st.booleans())
def test_repeated_and_contradicted_rows_equal_a_plain_search(rows, drop_repeated, drop_contradicted, gather):
    def judged(row):
        return (row.prompt, row.answers, row.weight)

    def answers(row):
        return (row.prompt, tuple(sorted(row.answers)))

    repeated = [judged(row) in [judged(other) for other in rows[:i]] for i, row in enumerate(rows)]
    contradicted = [any(answers(row) == answers(o) and judged(row) != judged(o) for o in rows) for row in rows]
    drop = [CONTRADICTED] * drop_contradicted + [REPEATED] * drop_repeated
    found = select(hashes_of(rows), None, None, drop=drop, gather=gather)
    assert (found.repeated, found.contradicted) == (sum(repeated), sum(contradicted))
    kept = [
        i for i in range(len(rows)) if not ((contradicted[i] and drop_contradicted) or (repeated[i] and drop_repeated))
    ]
    assert sorted(found.order.tolist()) == kept and sum(n for _, n in found.dropped) == len(rows) - len(kept)
    if gather:
        firsts = list(dict.fromkeys(rows[i].prompt for i in kept))
        assert found.order.tolist() == sorted(kept, key=lambda i: (firsts.index(rows[i].prompt), i))
    else:
        assert found.order.tolist() == kept


def test_copies_that_an_amount_asked_for_are_no_repetitions():
    rows = [one("p", "a", "b"), one("q", "a", "b"), one("p", "a", "b")]
    stored = np.array([0, 1, 2, 0, 1, 2])
    found = select(hashes_of(rows * 2), None, stored, drop=[REPEATED], gather=False)
    assert found.repeated == 2 and found.order.tolist() == [0, 1, 3, 4]


def test_rows_of_one_prompt_become_one_comparison():
    rows = [one("p", "a", "b"), one("p", "b", "c", weight=0.5), one("p", "a", "c"), one("q", "a", "b")]
    first, second = gathered(zip(rows, [5, 5, 5, 6], strict=True), Reads())
    assert first.answers == ("a", "b", "c") and first.pairs == ((0, 1), (1, 2), (0, 2)) and first.rows == 3
    assert first.weight == (1.0, 0.5, 1.0) and second == rows[3]
    # prompts whose hashes collide are not mixed
    assert len(list(gathered(zip(rows, [5] * 4, strict=True), Reads()))) == 2


def test_a_gathered_comparison_stays_within_its_size():
    rows = [one("p", "best", f"a{i}") for i in range(40)]
    made = list(gathered(((row, 0) for row in rows), Reads()))
    assert [len(c.answers) for c in made] == [16, 16, 11] and max(len(c.answers) for c in made) <= MOST_ANSWERS
    assert sum(len(c.pairs) for c in made) == sum(c.rows for c in made) == 40


def test_scored_answers_of_one_prompt_are_paired():
    rows = [Comparison("p", (text,), "s", "p", scores=(score,)) for text, score in zip("abc", (1, 4, 4), strict=True)]
    whole = merged(rows, Reads(margins=True))
    assert whole.pairs == ((1, 0), (2, 0)) and whole.weight == (1 / 3,) * 2 and whole.margin == (3, 3)
    assert (whole.rows, whole.scores) == (3, ())
    assert merged(rows[1:], Reads()).pairs == () == merged(rows[:1], Reads()).pairs


def config_of(tmp_path, path, *more):
    return load_config(None, ["model.name=synthetic", "data.template=none", "data.max_tokens=100000",
                              f"data.cache={tmp_path / 'cache'}", f"data.train.path={path}", *more])  # fmt: skip


def prepared(config):
    return prepare_data(config, load_tokenizer(config), None)


def pairs_of(data):
    found = Counter()
    for number in range(len(data)):
        item = data.comparison(number)
        for (winner, loser), weight in zip(item.pairs, item.weight, strict=True):
            found[item.text(winner).tobytes(), item.text(loser).tobytes(), float(weight)] += 1
    return found


@needs_shared
def test_real_rows_on_158_prompts(tmp_path):
    apart = prepared(config_of(tmp_path, PANDALM)).train
    together = prepared(config_of(tmp_path, PANDALM, "data.group_by_prompt=true")).train
    assert pairs_of(apart) == pairs_of(together)
    assert together.report["rows"] == together.report["kept"] == 782 == together.report["pairs"] == len(apart)
    assert len(together) == together.report["comparisons"] == len(set(apart.prompt_hash.tolist())) == 158
    assert len(together.tokens) < 0.8 * len(apart.tokens)
    print(f"computed tokens: {len(apart.tokens):,} pair by pair, {len(together.tokens):,} by prompt")
    held = prepared(config_of(tmp_path, PANDALM, "data.group_by_prompt=true", "data.eval_fraction=0.2"))
    assert not set(held.train.prompt_hash.tolist()) & set(held.eval.prompt_hash.tolist())
    assert pairs_of(held.train) + pairs_of(held.eval) == pairs_of(apart)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_dropped_are_counted_and_everything_adds_up(tmp_path):
    pair = {"prompt": "p", "chosen": " a", "rejected": " b"}
    rows = [pair, pair, {**pair, "chosen": " b", "rejected": " a"}, {**pair, "prompt": "q"}, {**pair, "prompt": "q"},
            {**pair, "rejected": " a"}]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", rows)
    told = prepared(config := config_of(tmp_path, path))
    assert "repeated: 2 rows (prompt, answers and judgement of an earlier row; data.drop_repeated=true" in describe(
        told, config
    )
    assert "contradicted: 3 rows (another row judges the same answers" in describe(told, config)
    assert (told.train.report["kept"], told.train.report["repeated"], told.train.report["contradicted"]) == (5, 2, 3)
    wanted = {
        "data.drop_repeated=true": {"repeated": 2, "identical answers": 1},
        "data.drop_contradicted=true": {"contradicted": 3, "identical answers": 1},
    }
    for keys in (["data.drop_repeated=true"], ["data.drop_contradicted=true"], [*wanted]):
        dropped = {"contradicted": 3, "repeated": 1, "identical answers": 1} if len(keys) > 1 else wanted[keys[0]]
        report = prepared(config_of(tmp_path, path, *keys)).train.report
        assert report["dropped"] == dropped and report["kept"] + sum(dropped.values()) == report["rows"] == 6
    more = prepared(config_of(tmp_path, path, "data.train.amount=2.0")).train.report
    assert (more["rows"], more["repeated"], more["kept"]) == (12, 4, 10)  # two rows, and their copies


def test_scored_rows_are_gathered_without_being_asked(tmp_path):
    rows = [{"prompt": f"p{i % 3}", "response": f" r{i}", "helpfulness": [4, 1, 2, 3, 1][i]} for i in range(5)]
    rows += [{"prompt": "alone", "response": " x", "helpfulness": 4}]
    data = prepared(config := config_of(tmp_path, write(tmp_path / "rows.jsonl", rows))).train
    # p0: 4 and 3; p1: 1 and 1, a tie; p2: a single answer; alone: the same
    assert (len(data), data.report["rows"], data.report["kept"]) == (1, 6, 2)
    assert data.report["dropped"] == {"nothing preferred": 4}
    assert "4 dropped: nothing preferred (all answers tie" in describe(prepared(config), config)
    winner, loser = data.comparison(0).pairs[0]
    assert (data.comparison(0).text(winner) - 3).tobytes()[::4].startswith(b"p0 r0") and winner != loser


def test_published_lists_of_answers_go_in_as_they_are(tmp_path):
    nectar = {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": c * 5, "rank": r} for c, r in zip("abcdefg", range(1, 8), strict=True)]}  # fmt: skip  # noqa: E501
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(nectar) + "\n").encode()))
    data = prepared(config_of(tmp_path, path)).train
    item = data.comparison(0)
    assert len(item.tails) == 7 and len(item.pairs) == 21 and float(item.weight.sum()) == pytest.approx(1, abs=1e-6)
    assert [(item.text(a) - 3).astype(np.uint8).tobytes()[-6:-1] for a in range(7)] == [
        c.encode() * 5 for c in "abcdefg"
    ]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_seven_answers_train_as_their_21_pairs_apart(family, capsys):
    """Rewards and gradients of the packed group equal those of its pairs in separate batches, with equal weights."""
    pairs = [(a, b) for a in range(7) for b in range(a + 1, 7)]
    group = item(20, 3, 5, 4, 8, 6, 2, 7, seed=11, pairs=pairs)
    group.weight[:] = 1 / 21
    group.margin[:] = np.linspace(-1, 1, 21)
    apart = Items(
        Item(
            group.prefix,
            [group.tails[winner], group.tails[loser]],
            np.array([[0, 1]]),
            group.margin[i : i + 1],
            group.weight[i : i + 1],
        )
        for i, (winner, loser) in enumerate(pairs)
    )
    results = []
    for items in (Items([group]), apart):
        hf_model = tiny_model(family, dtype=torch.float64)
        model = reward_model(hf_model, "shared")
        tokens, rewards, loss = 0, [], 0.0
        for number in range(len(items)):  # the pairs in batches of their own: nothing is shared between them
            batch = build_batch(items, [number])
            out = model(batch)
            out.loss_sum.backward()
            tokens += batch.computed_tokens
            loss += out.loss_sum.item()
            rewards.append(out.rewards_A.detach())
        results.append(
            (tokens, rewards, loss, {n: p.grad for n, p in hf_model.named_parameters() if p.grad is not None})
        )
    (tokens, rewards, loss, grads), (tokens_apart, rewards_apart, loss_apart, grads_apart) = results
    # fp64: sums of 21 terms in another order, relative rounding 21 * 2**-53 = 2.3e-15, amplified by some hundred
    for (winner, loser), two in zip(pairs, rewards_apart, strict=True):
        torch.testing.assert_close(rewards[0][[winner, loser]], two, rtol=1e-12, atol=1e-12)
    assert loss == pytest.approx(loss_apart, rel=1e-12)
    assert grads.keys() == grads_apart.keys() and len(grads) > 10
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_apart[name], rtol=1e-9, atol=1e-12, msg=name)
    assert tokens == 20 + 35 and tokens_apart == 21 * 20 + 6 * 35
    with capsys.disabled():
        print(f"\n{family}: 7 answers, 21 pairs: {tokens} tokens computed as a group, {tokens_apart} pair by pair")
