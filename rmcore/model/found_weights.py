"""Judges the weights that a checkpoint holds: one decision and one message, however the model is loaded.

Input: the names of weights that are missing from the checkpoint or unexpected in it, and those of another shape.
Output: a note, or one UserError about all of them.
Example: a directory of TRL's value-head models holds v_head.summary.weight. A training with model.head=fresh notes that
this head is not used; an evaluation is refused, because there is no head that it could use.
"""

import re
from collections.abc import Iterable

from rmcore.config import UserError

SCORE = "score.weight"
SHOWN = 5  # names in a message
# Score heads under the names of other trainers: TRL, trlX, LLaMA-Factory and GRM (v_head), OpenRLHF (value_head),
# safe-rlhf (score_head), UltraRM and Eurus (regression_head), ArmoRM (regression_layer), Qwen's process rewards
# (score.0), token and sequence classifiers (classifier, score.bias); `normalizer` are buffers of safe-rlhf.
OTHER_HEAD = re.compile(
    r"(\w+\.)?(v_head|value_head|score_head|reward_head|rm_head|regression_head|regression_layer|critic_head|classifier"
    r"|classification_head|normalizer|score)\."
)
# Files in which LLaMA-Factory keeps such a head, next to those of the model.
HEAD_FILES = ("value_head.safetensors", "value_head.bin", "v_head.safetensors", "v_head.bin")


def check_found(
    kind: str,
    head: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    wrong: Iterable[str],
    head_files: Iterable[str] = (),
    holds_score: bool = False,
) -> str:
    """Raises UserError unless the checkpoint holds what a model of the class `kind` needs; returns a note, or "".

    Args:
        head: model.head: with `fresh`, score.weight is not needed, and a head in the checkpoint is only noted.
        wrong: weights of another shape or type, each as "score.weight [3, 64] (expected [1, 64])".
        head_files: files next to the model's own that hold the head of another trainer.
        holds_score: whether the checkpoint holds score.weight, of whatever shape.
    """
    missing, wrong, unexpected = sorted(missing), sorted(wrong), sorted(unexpected)
    foreign = sorted([*(name for name in unexpected if OTHER_HEAD.match(name)), *head_files])
    unexpected = [name for name in unexpected if not OTHER_HEAD.match(name)]
    if head == "fresh" and not (missing or unexpected or wrong):
        if foreign:
            return (
                f"warning: {_names(foreign)}, a head of another trainer, is not used: model.head=fresh draws a new one"
            )
        if holds_score:
            return (
                f"warning: {SCORE}, a stored score head, is not used: model.head=fresh draws a new one; "
                "model.head=stored trains it further"
            )
        return ""
    if foreign and head != "fresh" and SCORE not in (name.split()[0] for name in (*missing, *wrong)):
        unexpected = [*unexpected, *foreign]  # next to a head that fits
    faults = [
        *listed(f"weights of {kind} are missing from the checkpoint:", missing),
        *listed(f"the checkpoint holds weights that {kind} does not have:", unexpected),
        *listed("weights of another shape or type:", wrong),
    ]
    if not faults:
        return ""
    hint = "is it the right checkpoint?"
    if not unexpected and {name.split()[0] for name in (*missing, *wrong)} == {SCORE}:
        hint = _hint_on_head(foreign, wrong)
    elif not (missing or unexpected) and all("embed" in name.split()[0] for name in wrong):
        hint = "vocab_size in its config.json does not fit the rows of the embedding: correct it"
    raise UserError(f"{'; '.join(faults)}; {hint}")


def _hint_on_head(foreign: list[str], wrong: list[str]) -> str:
    """What a checkpoint is of which only the score head does not fit, and what to do."""
    if wrong:
        return (
            "the stored head has another number of outputs than model.outputs lists (default: one, the reward): list a "
            "name for each, or train a new head with model.head=fresh"
        )
    if foreign:
        return (
            f"its head is {_names(foreign)}, of another trainer, which is not read; `rmcore convert DIR -o DIR` makes "
            "a plain directory of it if it is linear, any other head needs a training"
        )
    return "it is a model without a score head: train one first; a training draws it with model.head=fresh"


def listed(what: str, names: list[str]) -> list[str]:
    """One part of a message, such as ["missing: a, b and 3 more"]; an empty list without names."""
    return [f"{what} {_names(names)}"] if names else []


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
