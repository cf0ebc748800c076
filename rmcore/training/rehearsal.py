"""Exports the engine's model before its first step, as `publish` does after its last one; nothing stays on the disk.

Input: a `Run` before its first step, and the sizes of its model.
Output: a line about the check; or a UserError on all ranks.
Example: on two ranks under zero3, rank 0 writes the weights that all ranks gather, one at a time, and reloads them
while rank 1 waits: "export rehearsed in 0.5 s: rewards reloaded by transformers differ by 1.2e-07 (allowed 1.0e-05)".

Of a model that is not small (rmcore/hf_export/rehearsal.py), rank 0 checks everything except the weights.
"""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from rmcore.hf_export.directory import check_without_weights
from rmcore.hf_export.probe import probe_texts
from rmcore.hf_export.rehearsal import Sizes, passed, refused
from rmcore.model.lora import merged_shapes, visible_changes
from rmcore.parallel.world import broadcast_json, first_error, second_group
from rmcore.training.publish import (
    PATIENCE,
    checked,
    export_dtype,
    exported_shapes,
    make_probe,
    model_directory,
    package_of,
    written,
)
from rmcore.training.run import Run

T = TypeVar("T")


def sizes_of(run: Run) -> Sizes:
    """The sizes of the run's whole model. On ranks other than 0 they leave out the towers, which only rank 0 holds."""
    parameters = run.strategy.named_parameters()
    weights = sum(math.prod(shape) for shape in merged_shapes(run.strategy.shapes(), run.adapted).values())
    if run.config.export.towers:
        weights += sum(tensor.numel() for tensor in run.towers.values())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    exported = 4 * trained if run.config.export.adapter else weights * export_dtype(run.config).itemsize
    return Sizes(weights, trained, exported)


def rehearse(run: Run, sizes: Sizes) -> str:
    """Write, reload and check the export of the present weights, and delete it; a collective. Raises UserError."""
    world, directory = run.world, model_directory(run)
    began = time.monotonic()
    waiting = second_group(PATIENCE) if world.size > 1 else None

    def together(action: Callable[[], T]) -> T:
        def explained() -> T:
            with refused():
                return action()

        return first_error(world, "the rehearsal of the export", explained, waiting)

    if world.is_main:
        for left in directory.parent.glob(f".tmp-{directory.name}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    package = together(lambda: package_of(run, None))
    if not broadcast_json(world, sizes.small):
        shapes = merged_shapes(exported_shapes(run), run.adapted)
        texts = probe_texts(run.data.eval or run.data.train)
        together(lambda: check_without_weights(shapes, package, directory, texts) if world.is_main else None)
        if run.config.parallel.bf16:
            make_probe(run)  # the first forward in bf16, which some models refuse
            run.strategy.named_parameters()  # under zero2, drop the gathered copies of the weights
        return passed(None, began)
    fresh = run.start.checkpoint is None
    with visible_changes(run.strategy.named_parameters, run.adapted) if fresh else nullcontext():
        probe = make_probe(run)
        place: str | None = None
        try:
            place = broadcast_json(world, str(together(lambda: written(run, package, directory))))
            parity = together(lambda: checked(run, package, Path(str(place)), probe, by_parts=False))
        finally:
            if world.is_main and place:
                shutil.rmtree(place, ignore_errors=True)
    run.strategy.named_parameters()  # under zero2, drop the gathered copies of the weights
    return passed(parity, began) if parity else ""
