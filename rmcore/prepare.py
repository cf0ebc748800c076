"""`rmcore prepare CONFIG [key=value ...] [--json]`: tokenise a run's data ahead, on a machine without GPUs if you like.

In: a configuration. Out: the token cache that the run will read (data.cache, $RMCORE_CACHE or ~/.cache/rmcore), and the
summary of what was kept. Example: `rmcore prepare configs/hh.yaml data.cache=/shared/cache`, then training with the
same data.cache starts within seconds. Prepared twice, the second time reads what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

from rmcore.config import UserError, config_from_argv
from rmcore.training.run_data import prepared

if TYPE_CHECKING:
    pass

ABOUT = "Tokenise the data of a run ahead. --json prints one JSON object and nothing else."


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 refused (config, data, files)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(argv)
    config = config_from_argv(rest, "rmcore prepare", ABOUT)
    started = time.monotonic()
    try:
        _, data = prepared(config)
        from rmcore.data.prepare import cache_directory, describe
    except UserError as error:
        print(f"rmcore prepare: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - started
    if options.json:
        parts = {part.report["key"]: part.report for part in (data.train, data.eval) if part is not None}
        print(json.dumps({"parts": parts, "warnings": data.warnings, "seconds": seconds,
                          "cache": str(cache_directory(config))}))  # fmt: skip
    else:
        print(f"{describe(data, config)}\nready in {cache_directory(config)} after {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
