"""rmcore: reward models from preference pairs, each distinct token computed once.

Names of arrays and tensors end in letters that give their dimensions: `hidden_TD`, `rewards_A`, `input_ids_T`.

    N  comparisons of a data set      T  packed tokens           S  segments of a packed row
    C  comparisons of a batch         D  model width             L  queries of one segment
    A  answers                        H  query heads             M  keys, gathered for one segment or for all
    P  pairs (winner, loser)          G  key and value heads     W  weights (parameters of a model)
    Q  ties                           K  size of a head       V  size of a value head, where it differs

A digit is a dimension of that size: `segments_S4`. In words: a comparison is a prompt and its answers, a pair is two
of its answers of which one is preferred.
"""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # a command is started: Python looks for its module in this package
    from rmcore.host.start import check_start

    check_start()
