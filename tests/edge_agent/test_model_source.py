"""A device takes the cheapest way to a version, and goes around what is damaged or gone."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from agent_world import FLEET, MemoryBroker, tiny_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.fetch import Fetcher, FetchFailed, Superseded
from edge_agent.model_path import PER_BLOB_BYTES, cheapest_way, cost_bytes
from edge_agent.model_source import HeldModel, ModelSource
from fedtide.wire import frame
from fedtide.wire.chunks import blob_ref
from fedtide.wire.codecs.grid import encode_grid
from fedtide.wire.errors import BlobMismatch, FrameTooLarge, WireError
from fedtide.wire.ids import BlobId, Epoch, FleetId, ModelVersion
from fedtide.wire.link import Connection, Session
from fedtide.wire.messages import BlobRef, CodecRequest, Head, ModelDelta
from fedtide.wire.model_blob import DeltaIndex, IndexRow, ModelBlob, ModelFormat, max_keyframe_bytes
from fedtide.wire.parameters import Schema, TensorSpec, Vector, fingerprint, to_bytes

SCHEMA = Schema(tensors=(TensorSpec(name="p.w", dtype="float32", shape=(1000,)),))


def delta(start: int, end: int, size: int = 100) -> ModelDelta:
    return ModelDelta(ModelVersion(start), ModelVersion(end), BlobRef(size, bytes(32), 1000))


def versions_of(way: tuple[ModelDelta, ...] | None) -> list[tuple[int, int]] | None:
    return None if way is None else [(each.from_version, each.to_version) for each in way]


def cheapest(held: int, wanted: int, *deltas: ModelDelta) -> list[tuple[int, int]] | None:
    return versions_of(cheapest_way(deltas, ModelVersion(held), ModelVersion(wanted)))


def test_the_cheapest_way_is_taken() -> None:
    # Each blob costs 150 more: 400 + 150 = 550 for one, 2 × (100 + 150) = 500 for two.
    assert cheapest(1, 3, delta(1, 3, 400), delta(1, 2), delta(2, 3)) == [(1, 2), (2, 3)]
    assert cheapest(1, 3, delta(1, 3, 300), delta(1, 2), delta(2, 3)) == [(1, 3)]


def test_there_is_no_way_where_a_delta_is_missing() -> None:
    assert cheapest(1, 4, delta(1, 2), delta(3, 4)) is None
    assert cheapest(1, 4) is None
    assert cheapest(4, 4, delta(3, 4)) is None


def test_deltas_that_lead_back_or_nowhere_are_ignored() -> None:
    strange = (delta(3, 1, 0), delta(2, 2, 0), delta(1, 9, 0), delta(9, 4, 0))
    assert cheapest(1, 4, *strange, delta(1, 3), delta(3, 4)) == [(1, 3), (3, 4)]


@given(
    edges=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 2000)), max_size=25
    )
)  # fmt: skip
def test_no_other_way_is_cheaper(edges: list[tuple[int, int, int]]) -> None:
    deltas = [delta(*edge) for edge in edges]

    def costs(here: int) -> list[int]:
        """Of every way from ``here`` to version 8."""
        if here == 8:
            return [0]
        onward = [each for each in deltas if each.from_version == here and here < each.to_version <= 8]
        return [cost_bytes((each,)) + cost for each in onward for cost in costs(each.to_version)]

    found, every = cheapest_way(deltas, ModelVersion(0), ModelVersion(8)), costs(0)
    assert (found is None) == (not every)
    if found is not None:
        assert cost_bytes(found) == min(every)


@dataclass
class Shelves(Fetcher):
    """A fetcher whose blobs are in memory."""

    fleet: FleetId = FLEET
    max_bytes: int = 1 << 20
    blobs: dict[BlobId, bytes] = field(default_factory=dict)
    superseded: bool = False
    fetched: list[BlobId] = field(default_factory=list)
    fetched_bytes: int = 0

    async def fetch(self, connection: Connection, ref: BlobRef) -> bytes:
        del connection
        self.fetched.append(ref.id)
        if ref.id not in self.blobs:
            raise Superseded("gone") if self.superseded else FetchFailed("gone")
        self.fetched_bytes += ref.size_bytes
        return self.blobs[ref.id]

    def put(self, content: bytes) -> BlobRef:
        ref = blob_ref(content, 4096)
        self.blobs[ref.id] = content
        return ref


class Line:
    """What a coordinator publishes of versions 0 to 9. All parameters of version v are v.

    The keyframe is float32 and takes 4 KB.
    """

    def __init__(self) -> None:
        self.shelves = Shelves()
        self.source = ModelSource(self.connected, self.shelves)

    async def connected(self) -> Connection:
        return await MemoryBroker().dial(cast("Session", None), 0)

    def parameters(self, version: int) -> Vector:
        return np.full(SCHEMA.size, version, np.float32)

    def keyframe(self, version: int) -> BlobRef:
        parameters = self.parameters(version)
        blob = ModelBlob(
            ModelFormat.FLOAT32,
            None,
            ModelVersion(version),
            fingerprint(parameters)[:16],
            to_bytes(parameters),
        )
        return self.shelves.put(frame.to_frame(blob))

    def delta(self, start: int, end: int, *, wrong: bool = False) -> ModelDelta:
        change = np.full(SCHEMA.size, end - start, np.int32)
        change[0] += wrong
        result = fingerprint(self.parameters(end))[:16]
        payload = encode_grid(change, (0,), SCHEMA)
        blob = ModelBlob(ModelFormat.GRID, ModelVersion(start), ModelVersion(end), result, payload)
        return ModelDelta(ModelVersion(start), ModelVersion(end), self.shelves.put(frame.to_frame(blob)))

    def index(
        self, version: int, deltas: list[ModelDelta], earlier: dict[int, BlobRef] | None = None
    ) -> BlobRef:
        index = DeltaIndex(
            ModelVersion(version),
            4096,
            tuple(IndexRow(d.from_version, d.blob.size_bytes, d.blob.sha256[:16]) for d in deltas),
            tuple(
                IndexRow(ModelVersion(number), ref.size_bytes, ref.sha256[:16])
                for number, ref in (earlier or {}).items()
            ),
        )
        return self.shelves.put(frame.to_frame(index))

    def head(self, version: int, deltas: list[ModelDelta], index: BlobRef | None = None) -> Head:
        return Head(
            fleet=FLEET, epoch=Epoch(1), version=ModelVersion(version), parent_sha256=bytes(32),
            plan=tiny_plan().id, parameters_sha256=fingerprint(self.parameters(version)),
            plan_blob=blob_ref(b"", 1), full_blob=self.keyframe(version), deltas=tuple(deltas),
            delta_index=index, update_codec=CodecRequest(id="q8"), training=True, issued=0.0, expires=1.0,
        )  # fmt: skip

    def lose(self, ref: BlobRef) -> None:
        del self.shelves.blobs[ref.id]

    def held(self, version: int) -> HeldModel:
        return HeldModel(ModelVersion(version), self.parameters(version))

    async def take(self, head: Head, held: int | None) -> list[BlobId]:
        """What is fetched on the way to the head's version, which must be reached."""
        before = len(self.shelves.fetched)
        found = await self.source.parameters(head, SCHEMA, None if held is None else self.held(held))
        assert to_bytes(found) == to_bytes(self.parameters(head.version))
        return self.shelves.fetched[before:]


def scenario(main: Callable[[Line], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main(Line()))


def test_a_device_in_step_fetches_one_delta() -> None:
    async def main(line: Line) -> None:
        step = line.delta(8, 9)
        head = line.head(9, [step], line.index(9, [step]))
        assert await line.take(head, 8) == [step.blob.id]

    scenario(main)


def test_a_device_without_a_model_fetches_the_keyframe() -> None:
    async def main(line: Line) -> None:
        head = line.head(9, [line.delta(8, 9)])
        assert await line.take(head, None) == [head.full_blob.id]

    scenario(main)


def test_a_device_that_missed_some_looks_into_the_index() -> None:
    async def main(line: Line) -> None:
        step, further = line.delta(8, 9), line.delta(6, 9)
        head = line.head(9, [step], line.index(9, [step, further]))
        assert head.delta_index is not None
        assert await line.take(head, 6) == [head.delta_index.id, further.blob.id]

    scenario(main)


def test_a_device_far_behind_goes_from_index_to_index() -> None:
    async def main(line: Line) -> None:
        first, second, third = line.delta(1, 3), line.delta(3, 8), line.delta(8, 9)
        oldest = line.index(3, [first])
        middle = line.index(8, [second], {3: oldest})
        head = line.head(9, [third], line.index(9, [third], {8: middle}))
        assert head.delta_index is not None
        indexes = [head.delta_index.id, middle.id, oldest.id]
        assert await line.take(head, 1) == [*indexes, *(way.blob.id for way in (first, second, third))]
        assert await line.take(head, 3) == [*indexes[:2], second.blob.id, third.blob.id]

    scenario(main)


def test_a_delta_that_is_gone_is_gone_around() -> None:
    async def main(line: Line) -> None:
        direct, first, second = line.delta(5, 9), line.delta(5, 7), line.delta(7, 9)
        head = line.head(9, [direct, first, second])
        line.lose(direct.blob)
        assert await line.take(head, 5) == [direct.blob.id, first.blob.id, second.blob.id]

    scenario(main)


def test_a_delta_that_leads_elsewhere_is_gone_around() -> None:
    async def main(line: Line) -> None:
        direct, first, second = line.delta(5, 9, wrong=True), line.delta(5, 7), line.delta(7, 9)
        head = line.head(9, [direct, first, second])
        assert await line.take(head, 5) == [direct.blob.id, first.blob.id, second.blob.id]

    scenario(main)


@pytest.mark.parametrize("wrong", [False, True])
def test_where_no_way_is_left_there_is_the_keyframe(wrong: bool) -> None:  # noqa: FBT001
    async def main(line: Line) -> None:
        only = line.delta(5, 9, wrong=wrong)
        head = line.head(9, [only])
        if not wrong:
            line.lose(only.blob)
        assert await line.take(head, 5) == [only.blob.id, head.full_blob.id]

    scenario(main)


@pytest.mark.parametrize("content", [None, b"", b"\1nothing", b"\1\x94\x08\xcd\x10\x00\x90\x90"])
def test_an_index_that_is_of_no_use_leaves_the_keyframe(content: bytes | None) -> None:
    """It is gone, empty, no frame, or the index of another version."""

    async def main(line: Line) -> None:
        index = line.index(9, [line.delta(5, 9)])
        head = line.head(9, [], index)
        line.shelves.blobs[index.id] = content or b""
        if content is None:
            line.lose(index)
        assert await line.take(head, 5) == [index.id, head.full_blob.id]

    scenario(main)


def test_parameters_that_the_head_does_not_name_are_never_given() -> None:
    """Delta and keyframe agree with each other and not with the head."""

    async def main(line: Line) -> None:
        head = line.head(9, [line.delta(8, 9)])
        lying = msgspec.structs.replace(head, parameters_sha256=bytes(32))
        found = await line.source.parameters(lying, SCHEMA, line.held(8))
        assert line.shelves.fetched[-1] == head.full_blob.id  # whose parameters are then refused, as ever
        assert to_bytes(found) == to_bytes(line.parameters(9))

    scenario(main)


def test_a_version_that_was_restored_from_a_backup_leads_to_the_keyframe() -> None:
    """The device holds a version 5 that this coordinator did not publish."""

    async def main(line: Line) -> None:
        only = line.delta(5, 9)
        head = line.head(9, [only])
        other = HeldModel(ModelVersion(5), line.parameters(6))
        found = await line.source.parameters(head, SCHEMA, other)
        assert to_bytes(found) == to_bytes(line.parameters(9))
        assert line.shelves.fetched == [only.blob.id, head.full_blob.id]

    scenario(main)


def test_a_newer_head_ends_the_search() -> None:
    async def main(line: Line) -> None:
        step = line.delta(8, 9)
        head = line.head(9, [step])
        line.lose(step.blob)
        line.shelves.superseded = True
        with pytest.raises(Superseded):
            await line.source.parameters(head, SCHEMA, line.held(8))

    scenario(main)


def test_a_way_that_costs_more_than_the_keyframe_is_not_taken() -> None:
    async def main(line: Line) -> None:
        step = line.delta(8, 9)
        large = ModelDelta(
            step.from_version, step.to_version, msgspec.structs.replace(step.blob, size_bytes=4000)
        )
        head = line.head(9, [large])
        assert head.full_blob.size_bytes < 4000 + PER_BLOB_BYTES
        assert await line.take(head, 8) == [head.full_blob.id]

    scenario(main)


def test_a_keyframe_beyond_the_plans_bound_is_refused_before_it_is_fetched() -> None:
    async def main(line: Line) -> None:
        ref = BlobRef(max_keyframe_bytes(SCHEMA) + 1, bytes(32), 4096)
        with pytest.raises(FrameTooLarge):
            await line.source.keyframe(ref, ModelVersion(9), SCHEMA)
        assert line.shelves.fetched == []

    scenario(main)


def test_a_model_beyond_the_devices_bound_is_refused_before_anything_is_fetched() -> None:
    """Blobs are compressed: a small one can hold more parameters than the device has memory for."""

    async def main(line: Line) -> None:
        line.shelves.max_bytes = 4 * SCHEMA.size - 1
        head = line.head(9, [line.delta(8, 9)])
        with pytest.raises(FrameTooLarge, match="4,000 bytes; at most 3,999"):
            await line.source.parameters(head, SCHEMA, line.held(8))
        with pytest.raises(FrameTooLarge):
            await line.source.keyframe(head.full_blob, head.version, SCHEMA)
        assert line.shelves.fetched == []

    scenario(main)


def test_a_keyframe_of_another_version_is_refused() -> None:
    async def main(line: Line) -> None:
        with pytest.raises(BlobMismatch):
            await line.source.keyframe(line.keyframe(8), ModelVersion(9), SCHEMA)

    scenario(main)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    lost=st.sets(st.integers(0, 20)),
    damaged=st.sets(st.integers(0, 20)),
    held=st.integers(0, 8),
)
def test_whatever_is_lost_or_damaged_the_version_is_reached(
    data: st.DataObject, lost: set[int], damaged: set[int], held: int
) -> None:
    async def main(line: Line) -> None:
        pairs = st.tuples(st.integers(0, 8), st.integers(1, 9)).filter(lambda pair: pair[0] < pair[1])
        listed = [line.delta(*pair) for pair in data.draw(st.lists(pairs, max_size=6))]
        into = [line.delta(start, 9) for start in data.draw(st.sets(st.integers(0, 8)))]
        head = line.head(9, listed, line.index(9, into))
        for place, blob in enumerate(sorted(set(line.shelves.blobs) - {head.full_blob.id})):
            if place in damaged:
                line.shelves.blobs[blob] = line.shelves.blobs[blob][:-1] + b"?"
            if place in lost:
                del line.shelves.blobs[blob]
        try:
            await line.take(head, held)
        except WireError as error:  # pragma: no cover - the text says which
            pytest.fail(str(error))
        if not lost and not damaged:
            assert line.shelves.fetched_bytes <= 1.2 * head.full_blob.size_bytes

    scenario(main)
