"""The reasons for which rows are dropped, as the report of the preparation counts them."""

PROMPT_TOO_LONG = "prompt too long"  # prompt tokens > data.max_prompt_tokens
TEXT_TOO_LONG = "text too long"  # tokens of prompt and answer > data.max_tokens
ANSWER_TOO_LONG = "answer alone too long"  # truncate_left would have to cut more than the prompt
IDENTICAL = "identical answers"
EMPTY = "no tokens"
REFUSED = "refused by the template"
UNDECIDED = "nothing preferred"  # all answers tie, or the prompt has a single answer
NOT_KEPT = "not wanted by keep"  # the expression of the source's key `keep` is false
NO_VALUE = "no value for keep"  # a column that this expression reads is null
REPEATED = "repeated"  # the same prompt, answers and judgement as an earlier row
CONTRADICTED = "contradicted"  # another row judges the same answers to the same prompt differently
