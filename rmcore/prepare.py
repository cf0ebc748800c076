"""`rmcore prepare CONFIG [key=value ...] [--json]` tokenises the data of a run ahead of time; it needs no GPU.

Input: a configuration. Output: the token cache that the run will read (in data.cache, $RMCORE_CACHE or
~/.cache/rmcore), and a printed summary of the rows that were kept. A second call finds the cache and only reads it.
Example: after `rmcore prepare configs/hh.yaml data.cache=/shared/cache`, a training with the same data.cache starts
within seconds.
"""

import argparse
import json
import sys
import time

from rmcore.config import config_from_argv
from rmcore.host.command import run_command
from rmcore.host.terminal import print_text

ABOUT = "Tokenise the data of a run ahead of time. --json prints one JSON object and nothing else."


def main(argv: list[str]) -> int:
    """Exit codes: 0 prepared, 2 refused (config, data, files)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(argv)
    config = config_from_argv(rest, "rmcore prepare", ABOUT)

    def work() -> None:
        from rmcore.data.prepare import cache_directory, describe
        from rmcore.training.run_data import prepared

        started = time.monotonic()
        _, data = prepared(config)
        seconds, cache = time.monotonic() - started, str(cache_directory(config))
        if options.json:
            parts = {name: part.report for name, part in data.parts.items()}
            print_text(json.dumps({"parts": parts, "warnings": data.warnings, "seconds": seconds, "cache": cache}))
        else:
            print_text(f"{describe(data, config)}\nready in {cache} after {seconds:.1f} s")

    return run_command("rmcore prepare", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
