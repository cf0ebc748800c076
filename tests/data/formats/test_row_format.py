"""Rows as published: lists of ranked or scored answers, two judged answers, soft labels, votes, ShareGPT turns."""

import math
from typing import Any

import pytest

from rmcore.config import UserError
from rmcore.data.formats.comparison import Comparison, comparison_from_row, detect_format
from rmcore.data.formats.judgements import all_pairs, soft
from rmcore.data.formats.row_format import needed_columns


def read(
    row: dict[str, Any], *, text: bool = False, columns: dict[str, str] | None = None, **options: Any
) -> Comparison:
    columns = columns or {}
    seen = {name: row[name] for name in needed_columns([*row], columns) if name in row}  # as a table's columns are cut
    format = detect_format([seen], columns, origin="f.jsonl", **options)
    return comparison_from_row(seen, format, wants_text=text, source="label", where="f.jsonl:1")


def described(row: dict[str, Any], columns: dict[str, str] | None = None, **options: Any) -> str:
    return str(detect_format([row], columns or {}, origin="f.jsonl", **options))


def said(*texts: str) -> tuple[list[dict[str, str]], ...]:
    return tuple([{"role": "assistant", "content": text}] for text in texts)


ASK = [{"role": "user", "content": "Name a fruit."}]

# openbmb/UltraFeedback: four completions, rated by aspect and overall.
ULTRAFEEDBACK = {
    "source": "evol_instruct", "instruction": "Name a fruit.", "models": ["m1", "m2", "m3", "m4"],
    "completions": [
        {"annotations": {"helpfulness": {"Rating": str(int(score)), "Rationale": "..."}}, "critique": "...",
         "custom_system_prompt": "You are ...", "fine-grained_score": 5 - score, "model": f"m{n}",
         "overall_score": score, "principle": "helpfulness", "response": f"Fruit {n}."}
        for n, score in enumerate((4.0, 8.5, 4.0, 1.0))
    ],
    "correct_answers": ["None"], "incorrect_answers": ["None"],
}  # fmt: skip
# berkeley-nest/Nectar: seven answers, 1 is the best.
NECTAR = {
    "prompt": "\n\nHuman: Name a fruit.\n\nAssistant: ",
    "answers": [{"answer": f"Fruit {n}.", "model": "gpt-4", "rank": float(rank)}
                for n, rank in enumerate((3, 1, 2, 7, 5, 6, 4))],
    "turns": 1, "num_responses": 7, "source": ["lmsys-chat-1m", "sharegpt"], "good_natured": True,
}  # fmt: skip
# stanfordnlp/SHP
SHP = {
    "post_id": "abc", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": "Name a fruit.",
    "c_root_id_A": "x", "c_root_id_B": "y", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 340,
    "score_B": 1166, "human_ref_A": "Apple.", "human_ref_B": "Pear.", "labels": 0,
    "seconds_difference": 1.0, "score_ratio": 3.43,
}  # fmt: skip


@pytest.mark.parametrize("as_columns", [False, True])
def test_ultrafeedback_with_rated_completions(as_columns: bool) -> None:
    row = dict(ULTRAFEEDBACK)
    if as_columns:  # a record of lists, as older versions of `datasets` stored lists of records
        row["completions"] = {key: [c[key] for c in row["completions"]] for key in row["completions"][0]}
    assert described(row) == (
        "lists of answers in completions[].response, scores in completions[].overall_score; explicit prompt, text"
    )
    found = read(row)
    assert (found.prompt, found.answers) == (ASK, said("Fruit 0.", "Fruit 1.", "Fruit 2.", "Fruit 3."))
    assert found.pairs == ((1, 0), (0, 3), (1, 2), (1, 3), (2, 3))  # answers 0 and 2 tie
    assert found.weight == (1 / 6,) * 5 and found.margin == (0.0,) * 5 and found.source == "evol_instruct"
    assert read(row, need_margin=True).margin == (4.5, 3.0, 4.5, 7.5, 3.0)
    other = read(row, columns={"scores": "fine-grained_score"})
    assert set(other.pairs) == {(loser, winner) for winner, loser in found.pairs}


def test_nectar_with_seven_ranks() -> None:
    assert described(NECTAR) == (
        "lists of answers in answers[].answer, ranks in answers[].rank; explicit prompt, text; "
        "Human/Assistant transcripts"
    )
    found = read(NECTAR)
    assert (found.prompt, found.answers) == (ASK, said(*(f"Fruit {n}." for n in range(7))))
    ranks = [3, 1, 2, 7, 5, 6, 4]
    assert len(found.pairs) == 21 and all(ranks[winner] < ranks[loser] for winner, loser in found.pairs)
    assert found.weight == (1 / 21,) * 21 and found.source == "lmsys-chat-1m+sharegpt"
    text = read(NECTAR, text=True)
    assert text.prompt == NECTAR["prompt"] and text.answers[3] == "Fruit 3."


def test_shp_with_the_scores_of_two_answers() -> None:
    assert (
        described(SHP) == "two answers (human_ref_A, human_ref_B) judged by score_A and score_B; explicit prompt, text"
    )
    found = read(SHP)
    assert (found.prompt, found.answers) == (ASK, said("Apple.", "Pear."))
    assert (found.pairs, found.weight, found.source) == (((1, 0),), (1.0,), "askculinary_train")
    assert read(SHP, need_margin=True).margin == (826.0,)
    assert read({**SHP, "score_A": 1166}).pairs == ()


def test_helpsteer_with_one_scored_answer_a_row() -> None:
    row = {"prompt": "Name a fruit.", "response": "Apple.", "helpfulness": 3, "correctness": 4, "coherence": 4,
           "complexity": 1, "verbosity": 1}  # fmt: skip
    assert described(row) == "one answer a row, gathered by prompt, scored by helpfulness; explicit prompt, text"
    found = read(row)
    assert (found.prompt, found.answers, found.pairs, found.scores) == (ASK, said("Apple."), (), (3.0,))
    assert read(row, columns={"score": "correctness"}).scores == (4.0,)


def test_lists_of_texts_with_lists_of_scores() -> None:
    row = {"prompt": "Name a fruit.", "responses": ["Apple.", "Pear.", "Fig."], "scores": [1, 3, 2]}
    assert read(row).pairs == ((1, 0), (2, 0), (1, 2))
    assert read({**row, "scores": None, "ranks": [1, 3, 2]}, columns={"ranks": "ranks"}).pairs == (
        (0, 1),
        (0, 2),
        (2, 1),
    )
    whole = {"answers": [[*ASK, *answer] for answer in said("Apple.", "Pear.")], "ranks": [2, 1]}
    assert described(whole) == "lists of answers in answers, ranks in ranks; implicit prompt, conversational"
    found = read(whole)
    assert (found.prompt, found.answers, found.pairs) == (ASK, said("Apple.", "Pear."), ((1, 0),))


@pytest.mark.parametrize("count", [0, 1])
def test_without_two_answers_nothing_is_preferred(count: int) -> None:
    format = detect_format([NECTAR], {}, origin="x")
    row = {**NECTAR, "answers": NECTAR["answers"][:count]}
    assert comparison_from_row(row, format, wants_text=False, source="x", where="x").pairs == ()


def test_a_preference_probability_weighs_both_directions() -> None:
    row = {"prompt": "Name a fruit.", "chosen": "Apple.", "rejected": "Pear.", "probability": 0.7, "margin": 2}
    assert described(row) == "probability in probability; explicit prompt, text"
    found = read(row, need_margin=True)
    assert (found.pairs, found.margin) == (((0, 1), (1, 0)), (2.0, -2.0)) and found.weight == pytest.approx((0.7, 0.3))
    other = read({**row, "probability": 0.3}, need_margin=True)
    assert other.margin == (2.0, -2.0), "the margin is the lead of chosen, likelier or not"
    assert read({**row, "probability": 1}).pairs == ((0, 1),)
    assert read({**row, "probability": 0.0}).pairs == ((1, 0),)
    for wrong in (1.2, -0.1, "x", float("nan"), True):
        with pytest.raises(UserError, match=r"^f\.jsonl:1: probability must be (a probability from 0 to 1|a finite)"):
            read({**row, "probability": wrong})

    def loss(d: float) -> float:
        signed = (d if pair == (0, 1) else -d for pair in found.pairs)
        return sum(w * math.log1p(math.exp(-one)) for w, one in zip(found.weight, signed, strict=True))

    for d in (-1.5, 0.0, 2.0):  # the cross entropy with a soft label
        sigmoid = 1 / (1 + math.exp(-d))
        assert loss(d) == pytest.approx(-0.7 * math.log(sigmoid) - 0.3 * math.log(1 - sigmoid))


def test_votes_of_annotators() -> None:
    pandalm = {"prompt": "Name a fruit.", "response1": "Apple.", "response2": "Pear.", "votes": [1, 1, 2, 0]}
    found = read(pandalm)
    assert found.pairs == ((0, 1), (1, 0)) and found.weight == (0.625, 0.375)
    assert read({**pandalm, "votes": ["2", "2", 2]}).pairs == ((1, 0),)
    row = {"prompt": "Name a fruit.", "chosen": "Apple.", "rejected": "Pear.", "votes": [2, 2, 2]}
    assert read(row).pairs == ((0, 1),)  # votes of published sets speak of another order, so they must be asked for
    assert read({**row, "votes": ["chosen", "tie"]}, columns={"votes": "votes"}).weight == (0.75, 0.25)
    for wrong, message in (
        ([], "must be a list of votes"),
        ([3], r"votes\[0\] must be an answer"),
        (2, "must be a list"),
    ):
        with pytest.raises(UserError, match=message):
            read({**pandalm, "votes": wrong})


@pytest.mark.parametrize(
    ("columns", "winner", "pairs"),
    [
        (("response_a", "response_b"), "model_b", ((1, 0),)),
        (("response_a", "response_b"), "A", ((0, 1),)),
        (("response_a", "response_b"), "tie (bothbad)", ()),
        (("response_0", "response_1"), 1, ((1, 0),)),
        (("response_1", "response_2"), 1, ((0, 1),)),
        (("response_1", "response_2"), 0, ()),
        (("conversation_a", "conversation_b"), "conversation_b", ((1, 0),)),
    ],
)
def test_winners_are_named_as_the_columns_are(columns: tuple[str, str], winner: Any, pairs: Any) -> None:
    answers = said("Apple.", "Pear.") if "conv" in columns[0] else ("Apple.", "Pear.")
    if "conv" in columns[0]:
        answers = tuple([*ASK, *answer] for answer in answers)
    row = {"prompt": "Name a fruit.", **dict(zip(columns, answers, strict=True)), "winner": winner}
    assert read(row).pairs == pairs and read(row).prompt == ASK
    with pytest.raises(UserError, match=r"^f\.jsonl:1: winner must be an answer \(.*\) or a tie, not 'x'"):
        read({**row, "winner": "x"})


def test_sharegpt_turns() -> None:
    prompt = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Name a fruit."}]
    whole = {
        "chosen": [*prompt, {"from": "gpt", "value": "Fig."}],
        "rejected": [*prompt, {"from": "gpt", "value": "Ox."}],
    }
    apart = {
        "conversations": prompt,
        "chosen": {"from": "gpt", "value": "Fig."},
        "rejected": {"from": "gpt", "value": "Ox."},
    }
    for row in (whole, apart):
        found = read(row)
        assert found.prompt == [{"role": "system", "content": "Be brief."}, *ASK] and found.answers == said(
            "Fig.", "Ox."
        )
    with pytest.raises(UserError, match=r"conversations must be the prompt's turns, but it ends with an assistant's"):
        read({**apart, "conversations": whole["chosen"]})


def test_a_margin_column_may_have_any_name_and_so_may_a_source() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "gap": "1.5", "category": "math\x1b[31m"}
    found = read(row, columns={"margin": "gap"}, need_margin=True)
    assert found.margin == (1.5,) and found.source == "math [31m"


def labels_of(row: dict[str, Any], **options: Any) -> dict[tuple[str, str], tuple[float, float]]:
    """(winner's text, loser's text) -> (margin, weight) of every pair of a row."""
    found = read({"prompt": "Name a fruit.", **row}, need_margin=True, **options)
    texts = [answer[0]["content"] for answer in found.answers]
    labels = zip(found.pairs, found.margin, found.weight, strict=True)
    return {(texts[winner], texts[loser]): (margin, weight) for (winner, loser), margin, weight in labels}


@pytest.mark.parametrize("margin", [{"margin": 2.0}, {"margin": "-0.5"}, {"margin": 0}])
@pytest.mark.parametrize(
    ("first", "second", "probability"),  # what judges a row if its first answer wins, and if its second does
    [
        ({"winner": "a"}, {"winner": "b"}, 1.0),
        ({"score_a": 3, "score_b": 1}, {"score_a": 1, "score_b": 3}, 1.0),
        ({"winner": "a", "score_a": 3, "score_b": 1}, {"winner": "b", "score_a": 1, "score_b": 3}, 1.0),
        ({"preference": -3}, {"preference": 3}, 1.0),
        ({"probability": 0.75}, {"probability": 0.25}, 0.75),
        ({"votes": ["a", "b", "a", "a"]}, {"votes": ["b", "b", "a", "b"]}, 0.75),
    ],
)
def test_a_margin_is_by_how_much_the_winner_leads(
    first: dict[str, Any], second: dict[str, Any], probability: float, margin: dict[str, Any]
) -> None:
    """Every form has the labels of the row with chosen and rejected, whichever of its two answers wins."""
    wanted = labels_of({"chosen": "Apple.", "rejected": "Ox.", "probability": probability, **margin})
    assert wanted["Apple.", "Ox."] == (float(margin["margin"]), probability)
    assert labels_of({"answer_a": "Apple.", "answer_b": "Ox.", **first, **margin}) == wanted
    assert labels_of({"answer_a": "Ox.", "answer_b": "Apple.", **second, **margin}) == wanted


def test_neither_leads_where_both_are_equally_likely() -> None:
    row = {"answer_a": "Apple.", "answer_b": "Ox.", "margin": 2}
    for even in ({"probability": 0.5}, {"votes": ["a", "b", "tie"]}):
        assert set(labels_of({**row, **even}).values()) == {(0.0, 0.5)}


def test_without_a_margin_column_the_scores_or_the_preference_give_it() -> None:
    row = {"answer_a": "Apple.", "answer_b": "Ox.", "winner": "b"}
    assert labels_of({**row, "score_a": 1, "score_b": 3}) == {("Ox.", "Apple."): (2.0, 1.0)}
    assert labels_of({**row, "score_a": 3, "score_b": 1}) == {("Ox.", "Apple."): (-2.0, 1.0)}, "they contradict it"
    # A preference that does not judge the rows may be of another judge.
    with pytest.raises(UserError, match=r"needs a margin column, .* or {preference: preference_strength}, which then"):
        labels_of({**row, "preference_strength": -3})
    judging = {"columns": {"preference": "preference_strength"}}
    assert labels_of({**row, "preference_strength": -3}, **judging) == {("Apple.", "Ox."): (3.0, 1.0)}


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (NECTAR, {"answers": "x"}, r"answers must be a list of answers, as in the first rows, not 'x'"),
    (NECTAR, {"answers": ["x"]}, r"answers\[0\] must be a record, as in the first rows, not 'x'"),
    (NECTAR, {"answers": [{"answer": None, "rank": 1}]}, r"answers\[0\]: answer is null"),
    (NECTAR, {"answers": [{"answer": "a"}]}, r"answers\[0\]: rank is missing; found answer"),
    (NECTAR, {"answers": [{"answer": 3, "rank": 1}]}, r"answers\[0\]\.answer must be text"),
    (NECTAR, {"prompt": None}, r"prompt is null"),
    (SHP, {"score_A": "many"}, r"score_A must be a finite number, not 'many'"),
    (SHP, {"human_ref_B": None}, r"human_ref_B is null"),
    (
        {"prompt": "q", "answers": ["a", "b"], "scores": [1, 2]},
        {"scores": [1]},
        r"scores must be a list of 2 numbers, one",
    ),
]


@pytest.mark.parametrize(("good", "change", "message"), WRONG)
def test_a_wrong_row_is_named(good: dict[str, Any], change: dict[str, Any], message: str) -> None:
    format = detect_format([good], {}, origin="f.jsonl")
    with pytest.raises(UserError, match=rf"^f\.jsonl:9: {message}"):
        comparison_from_row({**good, **change}, format, wants_text=False, source="x", where="f.jsonl:9")


def test_columns_that_nearly_make_a_format() -> None:
    with pytest.raises(UserError, match=r"answers is a list of answers, but nothing ranks or scores them: need ranks"):
        read({"prompt": "q", "answers": ["a", "b"]})
    with pytest.raises(UserError, match=r"two answers \(response_a, response_b\), but nothing says which is better"):
        read({"prompt": "q", "response_a": "a", "response_b": "b"})
    with pytest.raises(UserError, match=r"answers\[0\] needs a text in one of answer, response"):
        read({"prompt": "q", "answers": [{"x": 1}]})
    with pytest.raises(UserError, match=r"answers must be a list of answers"):
        read({"prompt": "q", "answers": [], "ranks": []})


def test_pairs_weigh_one_comparison() -> None:
    judged = all_pairs([5, 3, 3], margins=True)
    assert judged.pairs == ((0, 1), (0, 2)) and judged.weight == (1 / 3,) * 2 and judged.margin == (2, 2)
    assert all_pairs([1, 1], margins=False).pairs == ()
    assert soft(1.0, 0.0, 0.5).weight == (1.0,)
