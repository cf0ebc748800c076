"""The seed of tests that draw at random: from the clock, or from RMCORE_TEST_SEED to repeat a failure.

Example: a failed test shows "RMCORE_TEST_SEED=1764437000" in its output; `RMCORE_TEST_SEED=1764437000 pytest ...` draws
the same cases.
"""

import os
import time

VARIABLE = "RMCORE_TEST_SEED"


def random_seed() -> int:
    """Prints the seed too; pytest shows what a failed test printed."""
    seed = int(os.environ.get(VARIABLE) or time.time())
    print(f"{VARIABLE}={seed}", flush=True)
    return seed
