"""rmcore: reward models from preference pairs, each distinct token computed once.

Names of arrays and tensors end in letters that give their dimensions: `hidden_TD`, `rewards_A`, `input_ids_T`.

    N  comparisons of a data set      T  packed tokens           S  segments of a packed row
    C  comparisons of a batch         D  model width             L  queries of one segment
    A  answers                        H  query heads             M  keys, gathered for one segment or for all
    P  pairs (winner, loser)          G  key and value heads     W  weights (parameters of a model)
    Q  ties                           K  size of a head       V  size of a value head, where it differs

A digit is a dimension of that size: `segments_S4`. In words: a comparison is a prompt and its answers, a pair is two
of its answers of which one is preferred.

From Python: `rmcore.load` gives a trained model that scores texts, `rmcore.fit` trains one. Each name below is imported
when it is first used, so that `import rmcore` does not wait for torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, the same names as in _PLACES
    from rmcore import testing as testing
    from rmcore.config import Config as Config
    from rmcore.config import UserError as UserError
    from rmcore.config.loss import Traits as Traits
    from rmcore.scoring.reward_model import Ranked as Ranked
    from rmcore.scoring.reward_model import RewardModel as RewardModel
    from rmcore.scoring.reward_model import load as load
    from rmcore.train import fit as fit
    from rmcore.training.in_process import FinishedRun as FinishedRun
    from rmcore.training.in_process import RunError as RunError

__version__ = "0.1.0"

_PLACES = {
    "Config": "rmcore.config",
    "FinishedRun": "rmcore.training.in_process",
    "Ranked": "rmcore.scoring.reward_model",
    "RewardModel": "rmcore.scoring.reward_model",
    "RunError": "rmcore.training.in_process",
    "Traits": "rmcore.config.loss",
    "UserError": "rmcore.config",
    "fit": "rmcore.train",
    "load": "rmcore.scoring.reward_model",
    "testing": "rmcore",
}
__all__ = [*_PLACES]

if not TYPE_CHECKING:  # a type checker would take every name for one of this module

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        place = _PLACES[name]
        is_module = place == __name__
        value = import_module(f"{place}.{name}") if is_module else getattr(import_module(place), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if sys.argv[:1] == ["-m"]:  # a command is started: Python looks for its module in this package
    from rmcore.host.start import check_start

    check_start()
