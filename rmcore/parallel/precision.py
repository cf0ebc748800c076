"""Decides the precision of the model's arithmetic where `parallel.precision` is `auto`: the same on all ranks.

Input: a `Config`, and the instructions of all ranks.
Output: a `Config` whose precision is bf16 or fp32, and lines about it.
Example: 8 ranks, of which rank 3 runs on a CPU with AVX2 only: all compute in fp32, and the line is
"parallel.precision=auto: fp32, because the CPU of rank 3 has no instructions for bf16".
"""

from typing import NamedTuple

import torch

from rmcore.config.schema import Config
from rmcore.host.bf16 import bf16_instructions
from rmcore.parallel.world import World, all_gather_json


class Bf16(NamedTuple):
    """The instructions that multiply bf16; "" if a device has none. `device`: that device, for messages."""

    instructions: str
    device: str = ""


def bf16_of(device: torch.device) -> Bf16:
    """The instructions of one device of this machine."""
    return Bf16(bf16_instructions(device), f"this {_kind(device)}")


def bf16_of_all(world: World) -> Bf16:
    """The instructions that all ranks have; a collective."""
    if world.size == 1:
        return bf16_of(world.device)
    found = all_gather_json(world, [bf16_instructions(world.device), _kind(world.device)])
    without = next((rank for rank, (instructions, _) in enumerate(found) if not instructions), None)
    if without is None:
        return Bf16(", ".join(sorted({instructions for instructions, _ in found})))
    return Bf16("", f"the {found[without][1]} of rank {without}")


def with_precision(config: Config, bf16: Bf16, stored: str | None = None) -> tuple[Config, list[str]]:
    """The config with a precision of bf16 or fp32, and lines for the user.

    stored: the precision of the checkpoint from which the run continues; `auto` keeps it.
    """
    parallel, lines = config.parallel, []
    chosen: str = parallel.precision
    if chosen == "auto":
        chosen, why = _choice(config, bf16, stored)
        lines.append(f"parallel.precision=auto: {chosen}, {why}")
        config = config.model_copy(update={"parallel": parallel.model_copy(update={"precision": chosen})})
    if chosen == "bf16" and not bf16.instructions:
        lines.append(
            f"warning: parallel.precision=bf16, but {bf16.device} has no instructions for bf16: on such a CPU a step "
            "took 5 to 7 times as long as in fp32; set parallel.precision=fp32"
        )
    return config, lines


def _choice(config: Config, bf16: Bf16, stored: str | None) -> tuple[str, str]:
    """The precision that `auto` means, and the reason."""
    if stored is not None:
        return stored, "as in the checkpoint"
    if config.parallel.fp8:
        return "bf16", "because of parallel.fp8"
    if config.model.weights == "bf16":
        return "bf16", "because of model.weights"
    if bf16.instructions:
        return "bf16", f"multiplied by {bf16.instructions}"
    return "fp32", f"because {bf16.device} has no instructions for bf16"


def _kind(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else "GPU"
