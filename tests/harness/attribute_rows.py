"""Makes scored answers with two attributes for the embedded task.

Input: a number of rows, a seed, a split.
Output: one answer per row, in the layout of HelpSteer2. Example:
    {"prompt": "Anna came before Ben on Friday. Who was last?", "response": " Ben was. Thanks.", "score": 1.0,
     "correct": 1.0, "polite": 1.0}
"""

import random
from typing import Any

from rmcore.data.synthetic import synthetic_rows


def attribute_rows(rows: int, seed: int, split: str) -> list[dict[str, Any]]:
    """`rows` answers to the prompts of `synthetic_rows`, two for each prompt, one per row, with two attributes.

    `correct` is 1 or -1, `polite` 1 or -1 (whether the answer ends with a thanks); every fourth cell is missing.
    `score` is `correct`.
    """
    rng = random.Random(f"rmcore attributes {split} {seed}")
    made: list[dict[str, Any]] = []
    for row in synthetic_rows((rows + 1) // 2, seed, split):
        for answer, correct in ((row["chosen"], 1.0), (row["rejected"], -1.0)):
            polite = rng.choice((1.0, -1.0))
            cells = {"correct": correct, "polite": polite}
            known = {name: None if rng.random() < 0.25 else value for name, value in cells.items()}
            text = f"{answer} Thanks." if polite > 0 else answer
            made.append({"prompt": row["prompt"], "response": text, "score": correct, **known})
    return made[:rows]
