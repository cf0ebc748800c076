"""How `rmcore score` and `rmcore serve` group texts, and which path they compute them by."""

import numpy as np

from rmcore.scoring.scorer import Scorer, Text, grouped
from tests.harness.paths import SHARED, needs_shared


def test_groups_share_a_prompt_and_keep_to_the_budget():
    def text(head, tail, prompt):
        return Text(np.array([*range(head), *range(100, 100 + tail)], dtype=np.int32), prompt)

    three = [text(30, 20, "p"), text(30, 30, "p"), text(30, 10, "p")]
    assert [len(group) for group in grouped(three, 70, share=True)] == [3], "they share 40: 40 + 10 + 20 + 0"
    for number, one in enumerate(three):
        one.ids[30] = 200 + number
    assert [len(group) for group in grouped(three, 90, share=True)] == [3]  # 30 + 20 + 30 + 10
    assert [len(group) for group in grouped(three, 89, share=True)] == [2, 1]
    assert [len(group) for group in grouped(three, 110, share=False)] == [2, 1]
    assert [len(group) for group in grouped([*three, *three], 90, share=True)] == [3], "each text once"
    assert [len(group) for group in grouped([three[0], three[1]._replace(prompt="q")], 90, share=True)] == [1, 1]


@needs_shared
def test_one_choice_of_path_for_all_rows():
    """The first chunk decides, so that a resumed run computes as the stopped one."""
    scorer = Scorer(str(SHARED / "oracle" / "model"), ["data.template=none", "parallel.precision=fp32"])
    scorer.choose_path([({"text": "a b c"}, "")])
    assert scorer.path.startswith("attention shared")
