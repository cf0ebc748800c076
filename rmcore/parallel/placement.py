"""Finds which rows of a sharded weight this rank holds.

Input: a DTensor that FSDP2 sharded by its first dimension.
Output: `Held(row, rows, replica, replicas)`.
Example: [5, 4] on a mesh of 2 hosts by 2 ranks: the second rank of the second host holds rows 3 and 4, as replica 1 of
2.
"""

from typing import NamedTuple

from torch.distributed.tensor import DTensor, Replicate, Shard


class Held(NamedTuple):
    """`rows` rows from number `row` on. `replicas` ranks hold the same rows; this rank is number `replica` of them."""

    row: int
    rows: int
    replica: int
    replicas: int


def held(tensor: DTensor) -> Held:
    """This rank's rows of a DTensor. Raises RuntimeError for placements that FSDP2 does not make."""
    rows = tensor.to_local().shape[0]
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    row, replica, replicas = 0, 0, 1
    for dimension, placement in enumerate(tensor.placements):
        size, place = tensor.device_mesh.size(dimension), coordinate[dimension]
        if isinstance(placement, Replicate):
            replica, replicas = replica * size + place, replicas * size
        elif isinstance(placement, Shard) and placement.dim == 0 and type(placement) is Shard:
            part = -(-tensor.shape[0] // size)  # torch.chunk: equal parts, the last ones shorter or empty
            row = min(tensor.shape[0], part * place)
            if rows != min(part, tensor.shape[0] - row):
                raise RuntimeError(f"this rank holds {rows} rows from row {row} of {tensor.shape[0]}")
        else:
            raise RuntimeError(f"placement {placement} is not known")
    return Held(row, rows, replica, replicas)
