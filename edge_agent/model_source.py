"""Getting a version's parameters in the fewest bytes: over deltas from the version held, or whole.

The head names the delta from the version before. A device that missed some looks into the index, and from
there into the indexes of earlier segments, until it knows a way from what it holds. All of that together
never takes more than 1.2 times the keyframe. Every step is checked; what is damaged or gone is gone around.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from edge_agent.fetch import Fetcher, FetchFailed, Superseded
from edge_agent.model_path import Way, cheapest_way, cost_bytes
from fedtide.wire import frame
from fedtide.wire.errors import BlobMismatch, FrameTooLarge, WireError
from fedtide.wire.ids import BlobId, ModelVersion
from fedtide.wire.link import Connection
from fedtide.wire.messages import BlobRef, Head, ModelDelta
from fedtide.wire.model_blob import DeltaIndex, changed_parameters, keyframe_parameters, max_keyframe_bytes
from fedtide.wire.parameters import FLOAT32, Schema, Vector, fingerprint

log = logging.getLogger(__name__)

_WAYS_TRIED: Final = 2
_INDEX_SHARE: Final = 0.2
"""Of the keyframe's bytes, at most, may go into finding a way."""


@dataclass(frozen=True)
class HeldModel:
    """A model of the same plan that the device has."""

    version: ModelVersion
    parameters: Vector


@dataclass
class _Map:
    """What is known about the ways to one version."""

    head: Head
    deltas: list[ModelDelta] = field(default_factory=list)
    indexes: dict[ModelVersion, BlobRef] = field(default_factory=dict)
    opened: set[ModelVersion] = field(default_factory=set)
    blocked: set[BlobId] = field(default_factory=set)
    spent_bytes: int = 0

    @classmethod
    def of(cls, head: Head) -> "_Map":
        found = cls(head, list(head.deltas))
        if head.delta_index is not None:
            found.indexes[head.version] = head.delta_index
        return found

    def way_from(self, held: ModelVersion) -> Way | None:
        """The cheapest way that is known."""
        usable = (delta for delta in self.deltas if delta.blob.id not in self.blocked)
        return cheapest_way(usable, held, self.head.version)

    def next_index(self, held: ModelVersion) -> ModelVersion | None:
        """The index to look into next: of the oldest version that the held one may lead to, if affordable."""
        unread = [version for version in self.indexes if version > held and version not in self.opened]
        if not unread:
            return None
        nearest = min(unread)
        # An earlier one often leads to one more, of the same size; without that it would be fetched in vain.
        more = 1 if nearest == self.head.version else 2
        afterwards = self.spent_bytes + more * self.indexes[nearest].size_bytes
        return nearest if afterwards <= _INDEX_SHARE * self.head.full_blob.size_bytes else None

    def add(self, version: ModelVersion, index: DeltaIndex) -> None:
        """Take what an index says."""
        if index.to_version != version:
            raise BlobMismatch(f"an index of version {index.to_version}; announced was {version}")
        self.opened.add(version)
        self.spent_bytes += self.indexes[version].size_bytes
        self.deltas += index.model_deltas()
        self.indexes |= {number: ref for number, ref in index.indexes().items() if number < version}


class ModelSource:
    """Fetches models.

    Args:
        connected: waits for a live connection.
        fetcher: gets the blobs.
    """

    def __init__(self, connected: Callable[[], Awaitable[Connection]], fetcher: Fetcher) -> None:
        self._connected = connected
        self._fetcher = fetcher

    async def parameters(self, head: Head, schema: Schema, held: HeldModel | None) -> Vector:
        """The parameters of the head's version, float32 of shape ``(schema.size,)``.

        Args:
            head: what is wanted.
            schema: of its plan.
            held: an older version of the same plan, if there is one.

        Raises:
            FrameTooLarge: such models are larger than this device accepts.
            LinkDown, FetchFailed, WireError: not even the keyframe could be had.
        """
        self._check_size(schema)
        if held is not None and held.version < head.version:
            parameters = await self._over_deltas(head, schema, held)
            if parameters is not None:
                return parameters
        return await self.keyframe(head.full_blob, head.version, schema)

    async def keyframe(self, ref: BlobRef, version: ModelVersion, schema: Schema) -> Vector:
        """The parameters in a keyframe.

        Raises:
            FrameTooLarge: such models are larger than this device accepts.
            LinkDown, FetchFailed, WireError: it could not be had.
        """
        self._check_size(schema)
        limit = max_keyframe_bytes(schema)
        if ref.size_bytes > limit:
            raise FrameTooLarge(ref.size_bytes, limit)
        return keyframe_parameters(await self._fetch(ref), version, schema)

    def _check_size(self, schema: Schema) -> None:
        """Of the parameters in memory: a blob of a few bytes can hold many zeros."""
        size_bytes, limit = FLOAT32.itemsize * schema.size, self._fetcher.max_bytes
        if size_bytes > limit:
            raise FrameTooLarge(size_bytes, limit)

    async def _over_deltas(self, head: Head, schema: Schema, held: HeldModel) -> Vector | None:
        """The parameters, or None where the keyframe takes fewer bytes or nothing else is left."""
        known = _Map.of(head)
        for _ in range(_WAYS_TRIED):
            way = await self._way(known, held.version)
            if way is None or cost_bytes(way) >= head.full_blob.size_bytes:
                return None
            parameters = await self._along(way, schema, held, known.blocked)
            if parameters is not None:
                if fingerprint(parameters) == head.parameters_sha256:
                    return parameters
                log.warning("Version %d is not what the deltas from version %d lead to",
                            head.version, held.version, extra={"event": "delta.wrong"})  # fmt: skip
                return None
        return None

    async def _way(self, known: _Map, held: ModelVersion) -> Way | None:
        """The cheapest way; looks into indexes until there is one, or none can be afforded."""
        while (way := known.way_from(held)) is None:
            nearest = known.next_index(held)
            if nearest is None:
                return None
            try:
                content = await self._fetch(known.indexes[nearest])
                known.add(nearest, frame.from_frame(content, DeltaIndex))
            except Superseded:
                raise
            except (FetchFailed, WireError) as error:
                log.warning("The index of version %d is not usable: %s", nearest, error,
                            extra={"event": "delta.failed"})  # fmt: skip
                known.opened.add(nearest)
        return way

    async def _along(self, way: Way, schema: Schema, held: HeldModel, blocked: set[BlobId]) -> Vector | None:
        """The parameters at the end; None, and the delta blocked, where one could not be had."""
        parameters = held.parameters
        for delta in way:
            try:
                content = await self._fetch(delta.blob)
                parameters = changed_parameters(content, delta, parameters, schema)
            except Superseded:
                raise
            except (FetchFailed, WireError) as error:
                log.warning("The delta from version %d to %d is not usable: %s",
                            delta.from_version, delta.to_version, error,
                            extra={"event": "delta.failed"})  # fmt: skip
                blocked.add(delta.blob.id)
                return None
        return parameters

    async def _fetch(self, ref: BlobRef) -> bytes:
        return await self._fetcher.fetch(await self._connected(), ref)
