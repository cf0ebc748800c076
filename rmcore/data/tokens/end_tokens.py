"""Finds the token at which a model was trained to end an answer, and checks that the template ends there too.

Input: a tokenizer and a Template.
Output: the tokens at which an answer may end; a warning if the template ends answers with another token.
Example: the tokenizer's own chat template closes an assistant's turn with <|im_end|>, EOS is <|endoftext|>. With
data.template=tulu: "data.template=tulu ends answers with <|endoftext|>, but ... with <|im_end|>".
"""

import re

from transformers import PreTrainedTokenizerFast

from rmcore.data.formats.comparison import Comparison
from rmcore.data.tokens.templates import Template, TemplateRefused

_PROBE = "Fine thanks"
_TURNS = [{"role": "user", "content": "How are you"}, {"role": "assistant", "content": _PROBE}]


def answer_ends(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """The first special token that the tokenizer's own chat template writes after an assistant's turn, if any."""
    if not tokenizer.chat_template:
        return ()
    try:
        text = str(tokenizer.apply_chat_template(_TURNS, tokenize=False))
    except Exception:  # a template is a program; if it refuses this conversation, nothing is known
        return ()
    end = _first_special(text.rpartition(_PROBE)[2], tokenizer)
    return () if end is None else (end,)


def ending_warning(template: Template, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """One sentence if `template` ends answers differently from the tokenizer's own chat template, else nothing."""
    expected = answer_ends(tokenizer)
    if not expected or template.name.startswith("tokenizer"):
        return []
    answers = (_PROBE, _PROBE) if template.wants_text else (_TURNS[1:], _TURNS[1:])
    prompt = "How are you" if template.wants_text else _TURNS[:1]
    try:
        _, (text, _) = template.render(Comparison(prompt, answers, "", ""))
    except TemplateRefused:
        return []
    end = _first_special(text.rpartition(_PROBE)[2], tokenizer)
    if end in expected:
        return []
    written = f"ends answers with {end}" if end else "ends answers without a special token"
    return [
        f"data.template={template.name} {written}, but the chat template of this model's tokenizer ends them with "
        f"{expected[0]}, where the model learned to end: data.template=tokenizer scores that token"
    ]


def _first_special(text: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    names = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | {*tokenizer.all_special_tokens}
    found = re.search("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)", text)
    return found.group() if found else None
