"""Fault points: named places in the engine, at which a hook of a test may kill, raise, wait or fill a disk.

Input: the name of a point, e.g. "forward" or "save.write". Output: none; without a hook, a point costs one comparison.
Example: in the process that it starts, a test sets
`rmcore.host.faults.hook = lambda point: os.kill(os.getpid(), 9) if point == "save.rename" else None`.

Only tests set the hook.
"""

from collections.abc import Callable

hook: Callable[[str], None] | None = None


def fault(point: str) -> None:
    """Call the hook, if there is one, with the name of the point."""
    if hook is not None:
        hook(point)
