import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import FLEET, run

from edge_agent import fetch
from edge_agent.fetch import Fetcher, FetchFailed, Superseded
from fedtide.wire.chunks import MAX_CHUNK_BYTES, blob_ref, split
from fedtide.wire.errors import BlobMismatch, FrameTooLarge, MalformedFrame
from fedtide.wire.link import Connection, LinkDown
from fedtide.wire.messages import BlobRef
from fedtide.wire.model_blob import OVERHEAD_BYTES
from fedtide.wire.topics import BLOB_CHUNK

CONTENT: Final = np.random.default_rng(11).bytes(97)
REF: Final = blob_ref(CONTENT, 10)  # 10 chunks, the last of 7 bytes
PIECES: Final = tuple(split(CONTENT, 10))


class ChunkSource:
    """A connection that answers a subscription with its retained chunk, in the order that a test wants.

    Attributes:
        held: chunks that the broker keeps, by topic.
        subscribed: every list of names that was subscribed to, with its QoS.
        subscriptions: the names subscribed to now.
        breaks_after: the connection is lost once so many subscriptions were made.
    """

    def __init__(self, fetcher: Fetcher, ref: BlobRef = REF, mqtt_version: str = "5") -> None:
        self.mqtt_version = mqtt_version
        self.held = {
            BLOB_CHUNK.name(FLEET, blob=ref.id, index=index): piece for index, piece in enumerate(PIECES)
        }
        self.subscribed: list[tuple[list[str], int]] = []
        self.subscriptions: set[str] = set()
        self.most_at_once = 0
        self.breaks_after: int | None = None
        self._fetcher = fetcher

    def delivers(self, names: Sequence[str]) -> list[tuple[str, bytes]]:
        return [(name, self.held[name]) for name in names if name in self.held]

    async def subscribe(self, names: Sequence[str], *, qos: int = 1) -> None:
        if len(self.subscribed) == self.breaks_after:
            raise LinkDown("lost")
        self.subscribed.append((list(names), qos))
        self.subscriptions |= set(names)
        self.most_at_once = max(self.most_at_once, len(self.subscriptions))
        for name, piece in self.delivers(names):
            fields = BLOB_CHUNK.parse(name)
            assert fields is not None
            asyncio.get_running_loop().call_soon(
                self._fetcher.take, fields["blob"], int(fields["index"]), piece
            )

    async def unsubscribe(self, names: Sequence[str]) -> None:
        if len(self.subscribed) == self.breaks_after:
            raise LinkDown("lost")
        self.subscriptions -= set(names)


class Backwards(ChunkSource):
    def delivers(self, names: Sequence[str]) -> list[tuple[str, bytes]]:
        return super().delivers(names)[::-1]


class Stammering(ChunkSource):
    def delivers(self, names: Sequence[str]) -> list[tuple[str, bytes]]:
        return super().delivers(names) * 2


def new_fetcher(max_bytes: int = 1000) -> Fetcher:
    return Fetcher(FLEET, max_bytes)


async def fetched(fetcher: Fetcher, source: ChunkSource, ref: BlobRef = REF) -> bytes:
    connection: Connection = source  # type: ignore[assignment]  # all of it that a fetch uses
    return await fetcher.fetch(connection, ref)


@pytest.mark.parametrize("kind", [ChunkSource, Backwards, Stammering])
def test_a_blob_is_fetched_whatever_the_order_of_its_chunks(kind: type[ChunkSource]) -> None:
    async def main() -> None:
        fetcher = new_fetcher()
        source = kind(fetcher)
        assert await fetched(fetcher, source) == CONTENT
        assert source.subscriptions == set()

    run(main)


def test_no_more_than_four_chunks_are_under_way(run_fetch: ChunkSource) -> None:
    assert run_fetch.most_at_once == 4
    assert [len(names) for names, _ in run_fetch.subscribed] == [4, 4, 2]


@pytest.fixture(params=["5", "3.1.1"])
def run_fetch(request: pytest.FixtureRequest) -> ChunkSource:
    """A source after one whole fetch over each version of MQTT."""
    fetcher = new_fetcher()
    source = ChunkSource(fetcher, mqtt_version=request.param)

    async def main() -> None:
        assert await fetched(fetcher, source) == CONTENT

    run(main)
    return source


def test_chunks_are_subscribed_to_at_qos_0_where_qos_1_is_dear(run_fetch: ChunkSource) -> None:
    assert {qos for _, qos in run_fetch.subscribed} == {1 if run_fetch.mqtt_version == "5" else 0}


def test_chunks_that_were_not_asked_for_are_ignored() -> None:
    async def main() -> None:
        fetcher = new_fetcher()
        source = ChunkSource(fetcher)
        waiting = asyncio.create_task(fetched(fetcher, source))
        await asyncio.sleep(0)
        for index in range(-2, 20):
            fetcher.take("0" * 32, index, b"another blob")
            fetcher.take(REF.id, index, b"")  # a cleared chunk
            fetcher.take(REF.id, index, bytes(MAX_CHUNK_BYTES + 1))
        assert await waiting == CONTENT
        fetcher.take(REF.id, 0, b"too late")
        assert await fetched(fetcher, source) == CONTENT

    run(main)


def test_chunks_beyond_the_last_are_not_kept() -> None:
    async def main() -> None:
        fetcher = new_fetcher()
        source = ChunkSource(fetcher)
        source.breaks_after = 1
        with pytest.raises(LinkDown):
            await fetched(fetcher, source)
        for index in (-1, 10, 11, 1 << 62):
            fetcher.take(REF.id, index, bytes(MAX_CHUNK_BYTES))
        assert set(fetcher._chunks) <= set(range(10))

    run(main)


def test_a_fetch_resumes_on_the_next_connection_where_it_stopped() -> None:
    async def main() -> None:
        fetcher = new_fetcher()
        first = ChunkSource(fetcher)
        first.breaks_after = 2
        with pytest.raises(LinkDown):
            await fetched(fetcher, first)
        second = ChunkSource(fetcher)
        assert await fetched(fetcher, second) == CONTENT
        names = [name for each in (first, second) for part, _ in each.subscribed for name in part]
        assert sorted(names) == sorted(source_names())

    run(main)


def source_names() -> list[str]:
    return [BLOB_CHUNK.name(FLEET, blob=REF.id, index=index) for index in range(10)]


def test_another_blob_begins_anew() -> None:
    other = b"o" * 97
    other_ref = blob_ref(other, 10)

    async def main() -> None:
        fetcher = new_fetcher()
        first = ChunkSource(fetcher)
        first.breaks_after = 2
        with pytest.raises(LinkDown):
            await fetched(fetcher, first)
        second = ChunkSource(fetcher)
        second.held = {
            BLOB_CHUNK.name(FLEET, blob=other_ref.id, index=index): piece
            for index, piece in enumerate(split(other, 10))
        }
        assert await fetched(fetcher, second, other_ref) == other

    run(main)


def test_silence_ends_a_fetch_and_what_came_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_SILENCE_S", 0.02)

    async def main() -> None:
        fetcher = new_fetcher()
        source = ChunkSource(fetcher)
        lost = source_names()[6]
        piece = source.held.pop(lost)
        with pytest.raises(FetchFailed, match=f"no chunk of blob {REF.id} came for 0.02 s"):
            await fetched(fetcher, source)
        assert source.subscriptions == set()
        source.held[lost] = piece
        source.subscribed.clear()
        assert await fetched(fetcher, source) == CONTENT
        assert source.subscribed[0][0] == [lost, *source_names()[8:]]

    run(main)


def test_a_fetch_whose_chunks_stop_is_soon_given_up_when_a_newer_head_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "_SILENCE_AFTER_A_HEAD_S", 0.02)  # and ten seconds without a head

    async def main() -> None:
        fetcher = new_fetcher()
        source = ChunkSource(fetcher)
        fetcher.note_head()  # the one that named this blob: no reason to hurry
        source.held.clear()
        fetching = asyncio.create_task(fetched(fetcher, source))
        await asyncio.sleep(0.1)
        assert not fetching.done()
        fetcher.note_head()
        with pytest.raises(Superseded):
            await asyncio.wait_for(fetching, timeout=2)
        assert source.subscriptions == set()

    run(main)


def test_heads_that_follow_each_other_quickly_do_not_keep_a_fetch_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "_SILENCE_AFTER_A_HEAD_S", 0.1)

    async def main() -> None:
        fetcher = new_fetcher()
        source = ChunkSource(fetcher)
        source.held.clear()  # a broker that came back empty
        fetching = asyncio.create_task(fetched(fetcher, source))
        for _ in range(100):
            await asyncio.sleep(0.02)
            fetcher.note_head()
            if fetching.done():
                break
        with pytest.raises(Superseded):
            fetching.result()

    run(main)


def test_a_newer_head_does_not_end_a_fetch_whose_chunks_come() -> None:
    async def main() -> None:
        fetcher = new_fetcher()
        source = ChunkSource(fetcher)
        fetching = asyncio.create_task(fetched(fetcher, source))
        await asyncio.sleep(0)
        fetcher.note_head()
        assert await fetching == CONTENT

    run(main)


def test_chunks_that_are_not_the_announced_bytes_are_refused_and_fetched_anew() -> None:
    async def main() -> None:
        fetcher = new_fetcher()
        source = ChunkSource(fetcher)
        damaged = source_names()[3]
        good = source.held[damaged]
        source.held[damaged] = good[::-1]
        with pytest.raises(BlobMismatch):
            await fetched(fetcher, source)
        source.held[damaged] = good
        assert await fetched(fetcher, source) == CONTENT

    run(main)


def test_a_blob_that_was_published_anew_in_other_chunks_is_fetched_anew() -> None:
    async def main() -> None:
        fetcher = new_fetcher()
        source = ChunkSource(fetcher)
        source.breaks_after = 1  # four chunks of 10 bytes are here
        with pytest.raises(LinkDown):
            await fetched(fetcher, source)
        source.breaks_after = None
        smaller = blob_ref(CONTENT, 5)
        source.held = {
            BLOB_CHUNK.name(FLEET, blob=smaller.id, index=index): piece
            for index, piece in enumerate(split(CONTENT, 5))
        }
        assert await fetched(fetcher, source, smaller) == CONTENT

    run(main)


def test_a_fetch_that_is_cancelled_on_a_dead_link_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(ChunkSource):
        async def subscribe(self, names: Sequence[str], *, qos: int = 1) -> None:
            await super().subscribe(names, qos=qos)
            subscribed.set()

        async def unsubscribe(self, names: Sequence[str]) -> None:
            await asyncio.Event().wait()

    async def main() -> None:
        fetcher = new_fetcher()
        source = Dead(fetcher)
        source.held.clear()
        fetching = asyncio.create_task(fetched(fetcher, source))
        await subscribed.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5):
                await fetching

    subscribed = asyncio.Event()
    monkeypatch.setattr(fetch, "_UNSUBSCRIBING_S", 0.01)
    run(main)


def test_the_largest_model_may_come_whole() -> None:
    """A keyframe of floats is longer than its parameters: it also says what it is."""

    async def main() -> None:
        fetcher = new_fetcher(max_bytes=97 - OVERHEAD_BYTES)
        assert await fetched(fetcher, ChunkSource(fetcher)) == CONTENT

    run(main)


def test_a_blob_that_is_too_large_or_inconsistent_is_refused_before_anything_is_subscribed() -> None:
    async def main() -> None:
        fetcher = new_fetcher(max_bytes=97 - OVERHEAD_BYTES - 1)
        source = ChunkSource(fetcher)
        with pytest.raises(FrameTooLarge):
            await fetched(fetcher, source)
        with pytest.raises(MalformedFrame):
            await fetched(fetcher, source, msgspec.structs.replace(REF, size_bytes=50, chunk_bytes=0))
        assert source.subscribed == []

    run(main)
