"""Which deltas there are, and how devices find them. Pure.

Published versions are counted, and every 8 of them are a segment. A version has a delta from each of the 8
before it, because devices that train miss about as many as are made between two of their updates. The last of
a segment also has deltas from the ends of earlier segments. So from any of the last 128 versions there is a
way of at most three deltas: to the end of its segment, to the end of the last whole segment, to the newest. A
delta over g versions takes about √g times the bytes of one over a single version, so few long ones are much
cheaper than a chain.

The head names the delta that devices in step need, and one index. Indexes of segments' ends stay, and name
each other, so a device finds its way with at most three of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fedtide.wire import frame
from fedtide.wire.ids import ModelVersion
from fedtide.wire.messages import BlobRef, ModelDelta
from fedtide.wire.model_blob import SHORT_SHA256_BYTES, DeltaIndex, IndexRow

SEGMENT: Final = 8
"""Versions."""
REACH: Final = 128
"""Versions back from which there are deltas."""


def sources(sequence: int) -> tuple[int, ...]:
    """The published versions, by sequence number, that version ``sequence`` has deltas from; newest first."""
    return sources_anew(sequence) if _ends_segment(sequence) else _near(sequence)


def sources_anew(sequence: int) -> tuple[int, ...]:
    """The same where no delta of earlier versions is there any more, so that there is no way but directly."""
    near = _near(sequence)
    first = (sequence - len(near) - 1) // SEGMENT * SEGMENT
    return (*near, *range(first, max(0, sequence - REACH) - 1, -SEGMENT))


def _near(sequence: int) -> tuple[int, ...]:
    return tuple(range(sequence - 1, max(0, sequence - SEGMENT) - 1, -1))


def _segment_start(sequence: int) -> int:
    """The end of the segment before, from which the segment of ``sequence`` goes on."""
    return (sequence - 1) // SEGMENT * SEGMENT


def _ends_segment(sequence: int) -> bool:
    return sequence % SEGMENT == 0


@dataclass(frozen=True)
class Published:
    """A version with the deltas that lead to it.

    Attributes:
        sequence: how many versions were published before it.
        version: its number.
        deltas: to it, by the version they start from, newest first.
        index: where its index is; None where it has none.
    """

    sequence: int
    version: ModelVersion
    deltas: tuple[ModelDelta, ...]
    index: BlobRef | None = None


class Catalogue:
    """The deltas that are on the broker."""

    def __init__(self) -> None:
        self._ends: dict[int, Published] = {}

    def clear(self) -> None:
        """Nothing is on the broker any more."""
        self._ends.clear()

    def index(self, published: Published, chunk_bytes: int) -> bytes | None:
        """The index for a version, framed; None where it would say no more than the head."""
        wanted = _segment_start(published.sequence)
        earlier = [end for end in self._ends.values() if end.index and end.sequence == wanted]
        if _ends_segment(published.sequence):
            earlier = [*self._before(published.sequence)]
        if len(published.deltas) <= 1 and not earlier:
            return None
        index = DeltaIndex(
            published.version,
            chunk_bytes,
            tuple(_row(delta.from_version, delta.blob) for delta in published.deltas),
            tuple(_row(end.version, end.index) for end in earlier if end.index),
        )
        return frame.to_frame(index)

    def add(self, published: Published) -> None:
        """Keep what later ways lead over, and forget what is out of reach."""
        if _ends_segment(published.sequence) and published.index is not None:
            self._ends[published.sequence] = published
        self._ends = {end.sequence: end for end in self._within_reach(published.sequence)}

    def blobs(self) -> Iterator[BlobRef]:
        """Everything that ways from earlier versions lead over."""
        for end in self._ends.values():
            if end.index is not None:
                yield end.index
            yield from (delta.blob for delta in end.deltas)

    def _within_reach(self, sequence: int) -> Iterator[Published]:
        # From the newest version of a segment onwards, the oldest version in reach may be 7 before its end.
        return (end for end in self._ends.values() if end.sequence >= sequence - REACH)

    def _before(self, sequence: int) -> Iterator[Published]:
        # A head that is issued anew finds its own version here.
        return (end for end in self._within_reach(sequence) if end.sequence < sequence)


def _row(version: ModelVersion, blob: BlobRef) -> IndexRow:
    return IndexRow(version, blob.size_bytes, blob.sha256[:SHORT_SHA256_BYTES])
