"""`rmcore push DIR USER/NAME` uploads an exported model to the Hugging Face hub.

Input: a directory written by training or by `rmcore export`. Output: one commit of the files that an export writes; its
address is printed, and so are the names of other files in the directory, which stay here.
Example: `rmcore push runs/hh/model me/hh-rm --revision v2` uploads the directory to the branch v2 of me/hh-rm. If the
repository or the branch is missing, the command creates it; a new repository is private.

The token comes from HF_TOKEN or `hf auth login`. HF_ENDPOINT selects another hub.
"""

import argparse
import sys
from pathlib import Path

from rmcore.config.schema import HubConfig
from rmcore.host.command import run_command
from rmcore.host.terminal import print_text


def main(argv: list[str]) -> int:
    """Exit codes: 0 pushed, 1 the hub refused the model or cannot be reached, 2 the directory holds no model."""
    parser = argparse.ArgumentParser(
        prog="rmcore push", description="Upload an exported model to the Hugging Face hub."
    )
    parser.add_argument("directory", metavar="DIR", help="directory of an exported model")
    parser.add_argument("repo", metavar="USER/NAME", help="hub repository; created if it is missing")
    parser.add_argument("--revision", help="branch; created if it is missing (default: main)")
    parser.add_argument("--public", action="store_true", help="create a missing repository as public, not private")
    given = parser.parse_args(argv)
    hub = HubConfig(push=True, repo=given.repo, revision=given.revision, private=not given.public)

    def work() -> None:
        from rmcore.hf_export.upload import exported_files, push

        print_text(push(given.directory, hub))
        if others := exported_files(Path(given.directory))[1]:
            shown = f"{', '.join(others[:8])}{', ...' if len(others) > 8 else ''}"
            print_text(f"note: not part of the model and not uploaded: {len(others)} files: {shown}", sys.stderr)

    return run_command("rmcore push", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
