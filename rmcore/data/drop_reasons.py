"""Why a row is not used; the names under which the report counts rows."""

from __future__ import annotations

PROMPT_TOO_LONG = "prompt too long"  # prompt tokens > data.max_prompt_tokens

TEXT_TOO_LONG = "text too long"  # tokens of prompt and answer > data.max_tokens

ANSWER_TOO_LONG = "answer alone too long"  # truncate_left has no prompt token left to cut

IDENTICAL = "identical answers"

EMPTY = "no tokens"

REFUSED = "refused by the template"

UNDECIDED = "nothing preferred"  # a tie, or a single answer to its prompt

REPEATED = "repeated"  # the same prompt, answers and judgement as an earlier row

CONTRADICTED = "contradicted"  # another row judges the same answers to the same prompt differently
