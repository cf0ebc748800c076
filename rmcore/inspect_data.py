"""`rmcore inspect CONFIG [key=value ...] [--json] [--examples N] [--plot FILE]`, the data doctor.

Input: a configuration. Output, for train and eval data: rows kept, and rows dropped by reason; percentiles of the
lengths of prompts and answers; tokens saved by packing and by sharing prompts; how often the longer answer is chosen;
repeated and contradicted rows; statistics by source; problems with special tokens; the first examples in colours, with
the scored tokens marked; a picture of the lengths (<run.dir>/lengths.png). The data are prepared as for training, and
the token cache keeps them.

Example: `rmcore inspect configs/hh.yaml data.limit=1000 --examples 3`.
"""

import argparse
import json
import sys
from pathlib import Path

from rmcore.config import Config, UserError, config_from_argv
from rmcore.host.command import run_command
from rmcore.host.terminal import print_text, visible

ABOUT = (
    "The data doctor: rows kept and dropped, lengths, sharing, length bias, problems, examples. --json prints one JSON "
    "object and nothing else; --examples N shows N comparisons (default 1); --plot FILE is the file of the picture of "
    "the lengths (default <run.dir>/lengths.png)."
)


def inspect(config: Config, examples: int, plot: Path, as_json: bool) -> None:
    """Print the findings and draw the picture. Raises UserError."""
    from rmcore.data.inspection.length_plot import plot_lengths
    from rmcore.data.inspection.statistics import lines, statistics
    from rmcore.training.run_data import prepared

    tokenizer, data = prepared(config)
    parts = data.parts
    findings = {name: statistics(part, config.run.seed) for name, part in parts.items()}
    try:
        plot_lengths(parts, config.data.max_tokens, plot)
    except (OSError, ValueError) as error:  # matplotlib raises ValueError when it does not know the suffix
        raise UserError(f"cannot write the picture {plot}: {getattr(error, 'strerror', error)}; set --plot") from None
    if as_json:
        print_text(json.dumps({"parts": findings, "warnings": data.warnings, "plot": str(plot)}))
        return

    from rich.console import Console

    from rmcore.data.inspection.first_example import show_first_example
    from rmcore.data.inspection.summary import describe_part

    console = Console(highlight=False)
    for name, part in parts.items():
        text = "\n".join([describe_part(part, config), *lines(findings[name]), ""])
        console.print(visible(text), markup=False, soft_wrap=True, emoji=False)
    for number in range(min(examples, len(data.train))):
        console.print(f"comparison {number} of data.train", style="bold", soft_wrap=True)
        show_first_example(data.train.comparison(number), tokenizer, console)
        console.print()
    closing = [f"note: {note}" for note in data.notes]
    closing += [f"warning: {warning}" for warning in data.warnings]
    closing.append(f"picture of the lengths: {plot}")
    console.print(visible("\n".join(closing)), markup=False, soft_wrap=True, emoji=False)


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 refused (config, data, files)."""
    parser = argparse.ArgumentParser(prog="rmcore inspect", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--examples", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    options, rest = parser.parse_known_args(argv)
    if options.examples < 0:
        parser.error(f"argument --examples: {options.examples} is less than 0")
    config = config_from_argv(rest, "rmcore inspect", ABOUT)
    plot = options.plot or Path(config.run.dir) / "lengths.png"
    return run_command("rmcore inspect", lambda: inspect(config, options.examples, plot, options.json))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
