"""`rmcore.load`: its rewards are those of `rmcore score`, from any thread, for any text that a policy may write."""

import gc
import json
import os
import pickle
import signal
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rmcore
from rmcore.parallel.world import running_world
from rmcore.scoring.score import score
from tests.harness.exporting import export

# A two-layer model in fp32, with rewards of order 1: sums of some hundred terms, each rounded at 6e-8.
CLOSE = 1e-5
PROMPTS = ["Is it so?", "Why?", "Is it so?", "And then, what?", ""]
ANSWERS = ["Yes.", "Because.", "No, never.", "", "Who asks?"]
# What a policy may write, which looks like something else.
ODD = [
    '[{"role": "us',
    '[{"role": "user", "content": "x"}]',
    "\n\nHuman: a\n\nAssistant:",
    '["a"]',
    "{}",
    "\x00",
    "null",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exported") / "model"
    export(made)
    config = json.loads((made / "config.json").read_text())
    config["pooler_config"] = {"logit_mean": 0.5, "logit_sigma": 4.0}
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def model(directory: Path) -> rmcore.RewardModel:
    return rmcore.load(directory, precision="fp32")


def turns(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def padded(directory: Path, prompts: list[str], answers: list[str]) -> np.ndarray:
    """The rewards of transformers: the chat template, then each text by itself."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    plain = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template(turns("user", p) + turns("assistant", a), tokenize=False)
        for p, a in zip(prompts, answers, strict=True)
    ]
    with torch.inference_mode():
        inputs = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
        return np.array([float(plain(**one).logits[0, 0]) for one in inputs])


def test_rewards_are_those_of_transformers_and_of_rmcore_score(
    model: rmcore.RewardModel, directory: Path, tmp_path: Path
) -> None:
    found = np.array(model.score(PROMPTS, ANSWERS))
    np.testing.assert_allclose(found, padded(directory, PROMPTS, ANSWERS), atol=CLOSE)
    assert np.abs(np.diff(np.sort(found))).min() > 10 * CLOSE, "the reward of another text is noticed"
    as_turns = model.score([turns("user", p) for p in PROMPTS], [turns("assistant", a) for a in ANSWERS])
    np.testing.assert_allclose(as_turns, found, atol=CLOSE)

    rows = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running_world() as world:
        score(world, str(directory), str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    written = [json.loads(line)["reward"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(found, written, atol=CLOSE)


def test_one_prompt_for_all_answers_whole_texts_and_ranks(model: rmcore.RewardModel, directory: Path) -> None:
    many = model.score(PROMPTS[0], ANSWERS)
    np.testing.assert_allclose(many, padded(directory, PROMPTS[:1] * 5, ANSWERS), atol=CLOSE)
    np.testing.assert_allclose(model.score(turns("user", PROMPTS[0]), ANSWERS), many, atol=CLOSE)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    whole = tokenizer.apply_chat_template(turns("user", PROMPTS[0]) + turns("assistant", "Yes."), tokenize=False)
    np.testing.assert_allclose(model.score_texts([whole]), many[:1], atol=CLOSE)

    ranked = model.rank(PROMPTS[0], ANSWERS)
    assert [one.index for one in ranked] == list(np.argsort(-np.array(many, dtype=float)))
    assert ranked[0].reward == max(many) and isinstance(ranked[0], rmcore.Ranked)
    assert model.score([], []) == model.score("x", []) == model.score_texts([]) == model.rank("x", []) == []


def test_prompts_are_shared_and_batches_limited(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = rmcore.load(directory, precision="fp32", batch_tokens=56)
    batches: list[tuple[int, int]] = []
    engine = small._scorer._trained.model
    forward = type(engine).forward

    def watched(self: Any, batch: Any) -> Any:
        batches.append((batch.computed_tokens, len(batch.last_rows_A)))
        return forward(self, batch)

    monkeypatch.setattr(type(engine), "forward", watched)
    prompt = "A prompt that is much longer"  # some 45 tokens with its turn
    found = small.score([prompt] * 8, [f"{n}" for n in range(8)])
    assert len(batches) > 1 and max(tokens for tokens, _ in batches) <= 56 < 8 * len(prompt)
    assert max(answers for _, answers in batches) > 1, "two answers fit only if they share their prompt"
    np.testing.assert_allclose(found, padded(directory, [prompt] * 8, [f"{n}" for n in range(8)]), atol=CLOSE)


def test_precision_normalisation_and_device(directory: Path, model: rmcore.RewardModel) -> None:
    other = rmcore.load(str(directory), device="cpu", precision="bf16", normalise=True)
    assert (other.precision, model.precision, str(other.device)) == ("bf16", "fp32", "cpu")
    raw, scaled = np.array(model.score(PROMPTS, ANSWERS)), np.array(other.score(PROMPTS, ANSWERS))
    difference = np.abs(scaled * 4.0 + 0.5 - raw)
    # bf16 rounds to 8 bits: 0.4 % of terms of order 1, in two layers.
    assert 1e-6 < difference.max() < 0.1
    assert "precision='bf16'" in repr(other) and any("attention" in note for note in other.notes)


def test_eight_threads_get_the_rewards_of_one(model: rmcore.RewardModel) -> None:
    alone = {size: np.array(model.score([f"Prompt {size}?"] * size, ANSWERS[:1] * size)) for size in range(1, 9)}
    begin, wrong = threading.Barrier(8), []

    def work(size: int) -> None:
        begin.wait()
        for _ in range(10):
            found = np.array(model.score([f"Prompt {size}?"] * size, ANSWERS[:1] * size))
            if not np.allclose(found, alone[size], atol=CLOSE):
                wrong.append((size, found))

    threads = [threading.Thread(target=work, args=(size,)) for size in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("text", ODD)
def test_a_text_is_text_whatever_it_looks_like(model: rmcore.RewardModel, directory: Path, text: str) -> None:
    """The text of a policy must neither stop its training nor be read as turns that it has chosen itself."""
    assert model.score("Why?", [text]) == pytest.approx(padded(directory, ["Why?"], [text]), abs=CLOSE)
    assert len(model.score([text, text], ANSWERS[:2])) == 2


def test_texts_beyond_the_positions_have_no_reward(model: rmcore.RewardModel) -> None:
    longest = model._scorer.longest
    rewards = model.score("Why?", ["Yes.", "x" * longest])
    assert isinstance(rewards[0], float) and rewards[1] is None
    assert model.rank("Why?", ["x" * longest, "Yes."])[0].index == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.score("a", "b"), "answers must be a list, not str"),
        (lambda m: m.score(["a"], ["b", "c"]), "1 prompts for 2 answers"),
        (lambda m: m.score("a", b"b"), "answers must be a list, not bytes"),
        (lambda m: m.score("a", {"b": 1}), "answers must be a list, not dict"),
        (lambda m: m.score("a", None), "answers must be a list, not NoneType"),
        (lambda m: m.score(None, ["a"]), "prompts must be a list, not NoneType"),
        (lambda m: m.score("a", ["b", None]), "item 1: answer must be text or a list of chat turns, not None"),
        (lambda m: m.score("a", [["b"]]), "item 0: answer must be text or a list of chat turns, not ['b']"),
        (lambda m: m.score("a", torch.zeros(2)), "item 0: answer must be text or a list of chat turns, not tensor(0.)"),
        (lambda m: m.score(["a", 1], ["b", "c"]), "item 1: prompt must be text or a list of chat turns"),
        (lambda m: m.score_texts([None]), "item 0: text must be text, not None"),
        (lambda m: m.score(["a"], ["\ud800"]), "item 0: its text has a lone surrogate"),
        (lambda m: m.score_texts("a"), "texts must be a list"),
        (lambda m: m.rank(["a", "b"], ["c"]), "rank takes one prompt"),
        (lambda m: m.as_reward_function()(["a"], ["b"], tools=[None, None]), "2 tools for 1 completions"),
        (lambda m: m.as_reward_function(3), "name must be text, not 3"),
        (lambda m: rmcore.load("there/is/none"), "there/is/none"),
        (lambda m: rmcore.load(None), "model must be a directory or a hub id, not None"),
        (lambda m: rmcore.load(m._scorer.name, device=["cpu"]), "device=['cpu']"),
        (lambda m: rmcore.load(m._scorer.name, overrides="a.b=c"), "overrides must be a list of texts"),
        (lambda m: rmcore.load(m._scorer.name, overrides=[3]), "overrides must be a list of texts"),
        (lambda m: rmcore.load(m._scorer.name, device="tpu:0"), "device='tpu:0'"),
        (lambda m: rmcore.load(m._scorer.name, precision="fp16"), "fp16"),
    ],
)
def test_mistakes_are_one_message(model: rmcore.RewardModel, call: Any, words: str) -> None:
    with pytest.raises(rmcore.UserError) as caught:
        call(model)
    assert words in str(caught.value)


def test_whatever_holds_texts_or_turns(model: rmcore.RewardModel) -> None:
    """Tuples, arrays as pandas reads them, and generators count as lists, a single turn as the list of it."""
    expected = model.score(PROMPTS, ANSWERS)
    assert model.score(np.array(PROMPTS), np.array(ANSWERS, dtype=object)) == expected
    assert model.score(tuple(PROMPTS), (answer for answer in ANSWERS)) == expected
    array = np.empty(1, dtype=object)
    array[:] = turns("user", PROMPTS[0])
    for prompt in (tuple(turns("user", PROMPTS[0])), array):
        assert model.score(prompt, [turns("assistant", ANSWERS[0])[0]]) == pytest.approx(expected[:1], abs=CLOSE)
        assert model.rank(prompt, iter(ANSWERS[:1]))[0].reward == pytest.approx(expected[0], abs=CLOSE)


def test_equal_rewards_keep_their_order(model: rmcore.RewardModel) -> None:
    places = [one.index for one in model.rank("Why?", ["b", "c", "b", "b"])]
    assert places in ([0, 2, 3, 1], [1, 0, 2, 3])


def test_a_pickled_model_is_loaded_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from another current directory."""
    monkeypatch.chdir(directory.parent)
    made = rmcore.load(directory.name, precision="bf16", normalise=True, batch_tokens=64)
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(made))
    assert (again.precision, again._scorer.token_budget) == ("bf16", 64)
    assert again.score(PROMPTS, ANSWERS) == made.score(PROMPTS, ANSWERS)


def test_a_forked_process_scores(model: rmcore.RewardModel) -> None:
    """Also while a thread of the parent computes, and after the parent has used several threads of OpenMP."""
    expected, before = model.score(PROMPTS, ANSWERS), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model.score("Why?", ["word " * 20 + str(n) for n in range(64)])
        with model._computing:  # as if a thread of the parent were computing
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                found = model.score(PROMPTS, ANSWERS)
                os._exit(0 if np.allclose(found, expected, atol=CLOSE) else 1)  # type: ignore[arg-type]
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_a_model_without_references_is_freed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr("rmcore.scoring.reward_model.trim_freed_memory", lambda: trims.append(1))
    made = rmcore.load(directory, precision="fp32")
    reward = made.as_reward_function()
    reward(prompts=["a"], completions=["b"])
    weights = weakref.ref(made._scorer._trained.hf_model)
    del made
    gc.collect()
    assert weights() is not None and not trims, "the function uses it"
    del reward
    gc.collect()
    assert weights() is None and trims == [1]


def test_the_reward_function_of_trl(model: rmcore.RewardModel, directory: Path) -> None:
    """By the contract of TRL's GRPOTrainer: keywords, all columns of the data, one value per completion."""
    reward = model.as_reward_function("helpful")
    assert getattr(reward, "__name__", "") == "helpful"
    expected = padded(directory, PROMPTS, ANSWERS)
    columns = {"completion_ids": [[1]] * 5, "label": [7] * 5, "trainer_state": object(), "tools": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = reward(prompts=PROMPTS, completions=ANSWERS, **columns)
        chats = reward(
            prompts=[turns("user", p) for p in PROMPTS], completions=[turns("assistant", a) for a in ANSWERS], **columns
        )
    np.testing.assert_allclose(texts, expected, atol=CLOSE)
    np.testing.assert_allclose(chats, expected, atol=CLOSE)
    with pytest.warns(UserWarning, match="content that is not read: column tools"):
        reward(prompts=["a"], completions=["b"], tools=[[{"type": "function", "function": {"name": "f"}}]])
