"""Which deltas take a device from the version it holds to the one it wants in the fewest bytes. Pure."""

from collections.abc import Iterable
from typing import Final

from fedtide.wire.ids import ModelVersion
from fedtide.wire.messages import ModelDelta

PER_BLOB_BYTES: Final = 150
"""What fetching one more blob costs beyond its content: subscribing, the topic, acknowledgements."""

Way = tuple[ModelDelta, ...]
"""Deltas in the order in which they are applied."""


def cost_bytes(way: Way) -> int:
    """What fetching these deltas takes."""
    return sum(delta.blob.size_bytes + PER_BLOB_BYTES for delta in way)


def cheapest_way(deltas: Iterable[ModelDelta], held: ModelVersion, wanted: ModelVersion) -> Way | None:
    """The cheapest way from one version to another, or None.

    Deltas only lead to newer versions; others are ignored. So in the order of where they start, whatever
    leads to a version comes before what leads on from it, and one pass finds the shortest path.
    """
    best: dict[ModelVersion, Way] = {held: ()}
    for delta in sorted(deltas, key=lambda delta: delta.from_version):
        start, end = delta.from_version, delta.to_version
        if start not in best or not start < end <= wanted:
            continue
        way = (*best[start], delta)
        if end not in best or cost_bytes(way) < cost_bytes(best[end]):
            best[end] = way
    return best.get(wanted) or None
