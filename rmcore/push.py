"""`rmcore push DIR USER/NAME`: an exported model to the Hugging Face hub.

In: a directory that training or `rmcore export` made. Out: one commit, whose address is printed.
Example: `rmcore push runs/hh/model me/hh-rm --revision v2` makes the private repository me/hh-rm and its branch v2 if
they are not there, and uploads the directory.

The token comes from HF_TOKEN or `hf auth login`; HF_ENDPOINT names another hub.
"""

import argparse
import sys

from rmcore.config.schema import HubConfig


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 the hub did not take it or cannot be reached, 2 the directory holds no model."""
    parser = argparse.ArgumentParser(prog="rmcore push", description="Push an exported model to the Hugging Face hub.")
    parser.add_argument("directory", metavar="DIR", help="an exported model")
    parser.add_argument("repo", metavar="USER/NAME", help="the repository; it is made if it is not there")
    parser.add_argument("--revision", help="the branch; it is made if it is not there (default: main)")
    parser.add_argument("--public", action="store_true", help="a repository that is made now is public, not private")
    given = parser.parse_args(argv)
    from rmcore.hf_export.upload import NoModel, PushError, push

    hub = HubConfig(push=True, repo=given.repo, revision=given.revision, private=not given.public)
    try:
        print(push(given.directory, hub))
    except PushError as error:
        print(f"rmcore push: {error}", file=sys.stderr)
        return 2 if isinstance(error, NoModel) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
