"""`python -m rmcore.config --schema` prints the JSON schema of a configuration file, for editors."""

import json
import sys

from rmcore.config.schema import Config
from rmcore.host.terminal import print_text


def main(argv: list[str]) -> int:
    """Exit codes: 0 printed, 2 any other argument."""
    if argv != ["--schema"]:
        print_text("usage: python -m rmcore.config --schema  (the JSON schema of a configuration file)", sys.stderr)
        return 0 if argv in (["--help"], ["-h"]) else 2
    print_text(json.dumps(Config.model_json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
