"""The mailbox over a broker in memory: what it announces, what it believes, and what it ignores."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import (
    COORDINATOR_KEY,
    DEVICE,
    DEVICE_KEY,
    FLEET,
    STRANGERS_KEY,
    MemoryConnection,
    Release,
    World,
    agent_settings,
    run,
    until,
)

from edge_agent.fetch import Fetcher
from edge_agent.mailbox import Mailbox
from edge_agent.outbox import Pending
from fedtide import __version__
from fedtide.wire import frame, topics
from fedtide.wire.clock import SYSTEM_CLOCK
from fedtide.wire.codecs import CODECS
from fedtide.wire.ids import Counter, FleetId, ModelVersion
from fedtide.wire.messages import Head, MissingChunks, Presence, Receipt, Verdict
from fedtide.wire.seal import seal
from fedtide.wire.signatures import COORDINATOR_DOMAIN, DOWN_DOMAIN, HEAD_DOMAIN

PENDING: Final = Pending(Counter(7), b"envelope", b"d" * 32)
RECEIPT: Final = Receipt(
    device=DEVICE, counter=Counter(7), digest=b"d" * 32, verdict=Verdict.APPLIED, version=ModelVersion(1)
)
MISSING: Final = MissingChunks(device=DEVICE, counter=Counter(7), digest=b"d" * 32, indexes=(1, 3))
HEAD_TOPIC: Final = topics.HEAD.name(FLEET)
DOWN_TOPIC: Final = topics.DOWN.name(FLEET, device=DEVICE)
STATE_TOPIC: Final = topics.COORDINATOR.name(FLEET)
PRESENCE_TOPIC: Final = topics.PRESENCE.name(FLEET, device=DEVICE)


def any_head(_head: Head) -> bool:
    return True


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.new(tmp_path)


def new_mailbox(
    world: World, fetcher: Fetcher | None = None, rng: np.random.Generator | None = None
) -> Mailbox:
    return Mailbox(
        agent_settings(world.state),
        coordinator=COORDINATOR_KEY.public,
        public=DEVICE_KEY.public,
        fetcher=fetcher or Fetcher(FLEET, 1000),
        dial=world.broker.dial,
        rng=rng or np.random.default_rng(5),
        clock=SYSTEM_CLOCK,
    )


@asynccontextmanager
async def running(
    world: World, mailbox: Mailbox | None = None
) -> AsyncIterator[tuple[Mailbox, MemoryConnection]]:
    """A mailbox that is online, with its connection."""
    mailbox = mailbox or new_mailbox(world)
    task = asyncio.create_task(mailbox.run())
    try:
        await mailbox.online()
        yield mailbox, world.broker.newest
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_it_announces_itself_before_it_listens(world: World) -> None:
    async def main() -> None:
        async with running(world) as (_, connection):
            (presence,) = world.presences()
            assert presence.online
            assert presence.public_key == DEVICE_KEY.public.raw
            assert presence.agent_version == __version__
            assert presence.codecs == tuple(CODECS)
            assert presence.model_version is None
            assert world.broker.published[0].retain
            assert connection.filters == {HEAD_TOPIC, DOWN_TOPIC, STATE_TOPIC}

    run(main)


@pytest.mark.parametrize("version", [0, 41])
def test_its_presence_names_the_model_it_holds(world: World, version: int) -> None:
    mailbox = new_mailbox(world)
    mailbox.never_below(Release(version).head)

    async def main() -> None:
        async with running(world, mailbox):
            assert world.presences()[-1].model_version == version

    run(main)


def test_its_session_is_clean_and_its_will_says_offline_with_the_same_boot(world: World) -> None:
    async def main() -> None:
        async with running(world) as (_, connection):
            session = connection.session
            assert (session.client_id, session.clean_start) == ("pumps-pump-7", True)
            assert session.will is not None
            assert session.will.topic == PRESENCE_TOPIC
            assert frame.from_frame(session.will.payload, Presence) == Presence(
                online=False, boot=world.presences()[0].boot
            )

    run(main)


def test_two_starts_have_two_boot_ids(world: World) -> None:
    rng = np.random.default_rng(5)

    async def main() -> None:
        for _ in range(2):
            async with running(world, new_mailbox(world, rng=rng)):
                pass

    run(main)
    assert len({presence.boot for presence in world.presences()}) == 2


def test_a_goodbye_says_offline_and_closes_instead_of_leaving_it_to_the_will(world: World) -> None:
    async def main() -> None:
        async with running(world) as (mailbox, connection):
            await mailbox.say_goodbye()
            assert [presence.online for presence in world.presences()] == [True, False]
            assert connection.ended == "closed"
            await mailbox.say_goodbye()  # without a connection there is nobody to say it to

    run(main)


def test_a_cut_leaves_the_last_word_to_the_will(world: World) -> None:
    async def main() -> None:
        async with running(world) as (mailbox, connection):
            mailbox.cut()
            assert connection.ended == "aborted"
            assert mailbox.connection is None
            assert len(world.presences()) == 1

    run(main)


def test_it_comes_back_after_a_lost_connection_and_announces_itself_again(world: World) -> None:
    async def main() -> None:
        async with running(world) as (mailbox, first):
            first.abort()
            await until(lambda: mailbox.connection not in {None, first})
            assert [presence.online for presence in world.presences()] == [True, True]
            assert world.broker.newest.filters == first.filters

    run(main)


def test_it_keeps_dialling_while_nobody_answers(world: World) -> None:
    async def main() -> None:
        async with running(world) as (mailbox, first):
            world.broker.reachable = False
            first.abort()
            await until(lambda: mailbox.connection is None)
            with pytest.raises(TimeoutError):
                await mailbox.online(timeout_s=0.01)
            world.broker.reachable = True
            assert await mailbox.online() is world.broker.newest

    run(main)


# Heads.


async def head_after(world: World, *sealed: bytes, floor: Head | None = None, read_each: bool) -> Head:
    """The head that is believed after some have come, read after each or only at the end."""
    mailbox = new_mailbox(world)
    if floor is not None:
        mailbox.never_below(floor)
    async with running(world, mailbox) as (_, connection):
        for content in sealed:
            connection.deliver(HEAD_TOPIC, content)
            await connection.drained()
            if read_each and content is not sealed[-1]:
                await mailbox.head(any_head)
        return (await mailbox.head(any_head)).head


each_way = pytest.mark.parametrize("read_each", [True, False], ids=["read at once", "read at the end"])


@each_way
@pytest.mark.parametrize(
    ("first", "second", "believed"),
    [
        ((1, 5), (1, 6), (1, 6)),
        ((1, 5), (1, 4), (1, 5)),
        ((2, 5), (1, 9), (2, 5)),  # an older epoch, whatever its version
        ((1, 5), (2, 5), (2, 5)),
        ((1, 5), (2, 4), (2, 4)),  # the operator's choice: this device has run neither
    ],
)
def test_the_newest_head_is_believed_by_epoch_and_then_by_version(
    world: World,
    first: tuple[int, int],
    second: tuple[int, int],
    believed: tuple[int, int],
    *,
    read_each: bool,
) -> None:
    async def main() -> None:
        sealed = [Release(version, epoch).sealed_head for epoch, version in (first, second)]
        assert (await head_after(world, *sealed, read_each=read_each)).order == believed

    run(main)


@each_way
@pytest.mark.parametrize(
    "ignored",
    [
        Release(9, key=STRANGERS_KEY).sealed_head,
        seal(Release(9).head, COORDINATOR_KEY, DOWN_DOMAIN),
        seal(Release(9).head, COORDINATOR_KEY, COORDINATOR_DOMAIN),
        Release(9, fleet=FleetId("valves")).sealed_head,
        Release(9).sealed_head[:-1],
        b"\x02" + Release(9).sealed_head[1:],
        seal(RECEIPT, COORDINATOR_KEY, HEAD_DOMAIN),
        b"",
        b"nonsense",
        bytes(frame.MAX_MESSAGE_BYTES + 1),
    ],
    ids=[
        "key", "domain of receipts", "domain of states", "fleet", "cut", "version", "kind", "empty",
        "nonsense", "too large",
    ],
)  # fmt: skip
def test_a_head_that_is_not_our_coordinators_is_ignored(
    world: World, ignored: bytes, *, read_each: bool
) -> None:
    async def main() -> None:
        head = await head_after(world, Release(5).sealed_head, ignored, read_each=read_each)
        assert head == Release(5).head

    run(main)


@pytest.mark.parametrize("older", [(1, 6), (2, 6), (3, 0)])
def test_a_head_older_than_the_model_that_was_run_is_ignored(world: World, older: tuple[int, int]) -> None:
    epoch, version = older

    async def main() -> None:
        newer = Release(8).sealed_head
        sealed = [Release(version, epoch).sealed_head, newer]
        head = await head_after(world, *sealed, floor=Release(7).head, read_each=False)
        assert head == Release(8).head

    run(main)


def test_waiting_for_a_head_goes_on_until_one_is_wanted(world: World) -> None:
    async def main() -> None:
        async with running(world) as (mailbox, connection):
            waiting = asyncio.create_task(mailbox.head(lambda head: head.version == 3))
            for version in (1, 2):
                connection.deliver(HEAD_TOPIC, Release(version).sealed_head)
                await connection.drained()
                await asyncio.sleep(0)
                assert not waiting.done()
            connection.deliver(HEAD_TOPIC, Release(3).sealed_head)
            found = await waiting
            assert (found.head, found.sealed) == (Release(3).head, Release(3).sealed_head)

    run(main)


# Answers.


async def answered(
    world: World, say: Callable[[MemoryConnection], None], timeout_s: float = 5.0
) -> Receipt | MissingChunks | None:
    async with running(world) as (mailbox, connection):
        waiting = asyncio.create_task(mailbox.answer(PENDING, connection, timeout_s))
        await asyncio.sleep(0)
        say(connection)
        return await waiting


def test_the_receipt_for_an_update_is_its_answer(world: World) -> None:
    async def main() -> None:
        sealed = seal(RECEIPT, COORDINATOR_KEY, DOWN_DOMAIN)
        assert await answered(world, lambda connection: connection.deliver(DOWN_TOPIC, sealed)) == RECEIPT

    run(main)


def test_a_list_of_missing_chunks_is_an_answer(world: World) -> None:
    async def main() -> None:
        sealed = seal(MISSING, COORDINATOR_KEY, DOWN_DOMAIN)
        assert await answered(world, lambda connection: connection.deliver(DOWN_TOPIC, sealed)) == MISSING

    run(main)


@pytest.mark.parametrize(
    "forged",
    [
        seal(RECEIPT, STRANGERS_KEY, DOWN_DOMAIN),
        seal(RECEIPT, DEVICE_KEY, DOWN_DOMAIN),
        seal(RECEIPT, COORDINATOR_KEY, HEAD_DOMAIN),
        seal(msgspec.structs.replace(RECEIPT, digest=b"e" * 32), COORDINATOR_KEY, DOWN_DOMAIN),
        seal(msgspec.structs.replace(RECEIPT, counter=8), COORDINATOR_KEY, DOWN_DOMAIN),
        seal(msgspec.structs.replace(MISSING, digest=b"e" * 32), COORDINATOR_KEY, DOWN_DOMAIN),
        seal(Release(1).head, COORDINATOR_KEY, DOWN_DOMAIN),
        frame.to_frame(RECEIPT),
        b"",
    ],
    ids=["key", "own key", "domain", "digest", "counter", "missing digest", "kind", "not sealed", "empty"],
)
def test_what_is_no_answer_to_this_update_does_not_end_the_wait(world: World, forged: bytes) -> None:
    async def main() -> None:
        def say(connection: MemoryConnection) -> None:
            connection.deliver(DOWN_TOPIC, forged)
            connection.deliver(DOWN_TOPIC, seal(MISSING, COORDINATOR_KEY, DOWN_DOMAIN))

        assert await answered(world, say) == MISSING

    run(main)


def test_without_an_answer_it_is_time_to_send_again(world: World) -> None:
    async def main() -> None:
        assert await answered(world, lambda _: None, timeout_s=0.01) is None

    run(main)


def test_a_lost_connection_is_a_reason_to_send_again(world: World) -> None:
    async def main() -> None:
        assert await answered(world, lambda connection: connection.abort()) is None

    run(main)


def test_a_coordinator_that_asks_for_everything_gets_it(world: World) -> None:
    async def main() -> None:
        async with running(world) as (mailbox, connection):
            waiting = asyncio.create_task(mailbox.answer(PENDING, connection, 5.0))
            await asyncio.sleep(0)
            await world.coordinator.ask_for_all()
            assert await waiting is None

    run(main)


# The coordinator's state.


def test_nothing_is_sent_while_the_coordinator_is_away(world: World) -> None:
    async def main() -> None:
        async with running(world) as (mailbox, connection):
            await world.coordinator.announce(online=False, epoch=2)
            await connection.drained()
            with pytest.raises(TimeoutError):
                await mailbox.online(timeout_s=0.01)
            await world.coordinator.announce(online=True, epoch=1)  # an older run of it
            await world.coordinator.announce(online=True, epoch=3, key=STRANGERS_KEY)
            await connection.drained()
            with pytest.raises(TimeoutError):
                await mailbox.online(timeout_s=0.01)
            await world.coordinator.announce(online=True, epoch=3)
            assert await mailbox.online() is connection

    run(main)


@pytest.mark.parametrize(("announced", "used"), [(1, 1), (4, 4), (0, 1), (-3, 1)])
def test_the_coordinator_says_how_many_shards_there_are(world: World, announced: int, used: int) -> None:
    async def main() -> None:
        async with running(world) as (mailbox, connection):
            await world.coordinator.announce(shards=announced)
            await connection.drained()
            assert mailbox.shards == used

    run(main)


# Strangers' messages.


@pytest.mark.parametrize(
    "topic",
    [
        "fl/1/pumps/model/b/0a1b/first",
        "fl/1/pumps/model/b/0a1b/-1",
        "fl/1/pumps/model/b/0a1b/1_0",
        "fl/1/pumps/model/b/0a1b/" + "9" * 64,
        "fl/1/valves/model/head",
        "fl/1/pumps/dn/pump-8",
        "fl/1/pumps/st/pump-7",
        "elsewhere",
        "",
    ],
)
def test_messages_on_topics_that_nobody_asked_for_are_ignored(world: World, topic: str) -> None:
    async def main() -> None:
        async with running(world) as (mailbox, connection):
            for payload in (b"", b"payload", Release(9).sealed_head):
                connection.deliver(topic, payload)
            connection.deliver(HEAD_TOPIC, Release(1).sealed_head)
            assert (await mailbox.head(any_head)).head == Release(1).head
            assert not connection.ended

    run(main)


def test_chunks_go_to_the_fetcher(world: World) -> None:
    release = Release(3)
    fetcher = Fetcher(FLEET, 1000)

    async def main() -> None:
        await world.coordinator.publish(release)
        async with running(world, new_mailbox(world, fetcher)) as (_, connection):
            assert await fetcher.fetch(connection, release.head.full_blob) == release.keyframe

    run(main)
