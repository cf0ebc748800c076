"""Where tests make things go wrong: named points in the engine, at which a hook may kill, raise, wait or fill a disk.

Enters: the name of a point, e.g. "forward", "save.write". Leaves: nothing; without a hook it costs one comparison.
Example: a test sets `rmcore.host.faults.hook = lambda point: os.kill(os.getpid(), 9) if point == "save.rename" else
None` in
the process that it starts; nothing in rmcore ever sets it.
"""

from collections.abc import Callable

hook: Callable[[str], None] | None = None


def fault(point: str) -> None:
    """Pass the point of this name."""
    if hook is not None:
        hook(point)
