"""What an agent takes for an answer to its update, and when it sends: in its turn, or not at all."""

import asyncio
from pathlib import Path
from typing import Final

import msgspec
import pytest
from agent_world import DEVICE, FLEET, Release, World, receipt_for, run, until

from edge_agent.answers import Answers
from edge_agent.outbox import Pending
from edge_agent.sender import Tally
from fedtide.wire import topics
from fedtide.wire.envelope import update_digest
from fedtide.wire.ids import Counter, ModelVersion
from fedtide.wire.messages import MissingChunks, Reason, Receipt, Verdict

PENDING: Final = Pending(Counter(7), b"envelope", b"d" * 32)
UPDATES: Final = topics.UPDATE.name(FLEET, shard=0, device=DEVICE)
LONG_S: Final = 900.0


def receipt(
    *, counter: int = 7, digest: bytes = PENDING.digest, reason: Reason | None = Reason.TOO_STALE
) -> Receipt:
    return Receipt(
        device=DEVICE,
        counter=Counter(counter),
        digest=digest,
        verdict=Verdict.REJECTED if reason else Verdict.APPLIED,
        reason=reason,
        version=ModelVersion(1),
    )


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.new(tmp_path)


def sent(world: World) -> list[bytes]:
    """The update messages that were published."""
    return [published.payload for published in world.broker.published if published.topic == UPDATES]


def test_a_receipt_names_counter_and_digest(answers: Answers) -> None:
    for other in (receipt(counter=8), receipt(digest=b"e" * 32)):
        answers.hear_receipt(other)
        assert not answers.has(PENDING)
    answers.hear_receipt(receipt())
    assert answers.receipt(PENDING) == receipt()


def test_a_rejection_of_a_message_of_ours_is_a_receipt_of_the_update_in_it(answers: Answers) -> None:
    """The coordinator could not read that message, so it knows neither counter nor digest of the update."""
    ours, another = update_digest(b"our chunk"), update_digest(b"a forged chunk")
    answers.hear_receipt(receipt(counter=0, digest=ours, reason=Reason.UNREADABLE))
    assert answers.receipt(PENDING) is None
    assert answers.receipt(PENDING, frozenset({ours})) is not None
    answers.hear_receipt(receipt(counter=7, digest=another, reason=Reason.TOO_LARGE))
    assert answers.receipt(PENDING, frozenset({ours})) is None


def test_only_a_rejection_can_be_of_a_message(answers: Answers) -> None:
    ours = update_digest(b"our chunk")
    answers.hear_receipt(receipt(counter=0, digest=ours, reason=None))
    assert answers.receipt(PENDING, frozenset({ours})) is None


def test_being_told_of_too_many_messages_takes_the_place_of_no_receipt(answers: Answers) -> None:
    answers.hear_receipt(receipt(reason=None))
    answers.hear_receipt(receipt(counter=0, digest=bytes(32), reason=Reason.TOO_MANY))
    assert answers.receipt(PENDING) == receipt(reason=None)


def test_a_request_for_chunks_is_met_once(answers: Answers) -> None:
    answers.hear_missing(
        MissingChunks(device=DEVICE, counter=Counter(7), digest=PENDING.digest, indexes=(1,))
    )
    assert answers.missing(PENDING) is not None
    answers.forget_missing()
    assert not answers.has(PENDING)


def test_an_update_whose_message_cannot_be_read_is_given_up(world: World) -> None:
    """For example by a coordinator of another protocol version: sending it for ever would not help."""

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        (message,) = sent(world)
        refusal = receipt_for(update, Verdict.REJECTED, Reason.UNSUPPORTED_VERSION)
        await world.coordinator.tell(
            msgspec.structs.replace(refusal, counter=Counter(0), digest=update_digest(message))
        )
        await until(lambda: agent.tally == Tally(trained=1, sent=1, rejected=1))
        assert world.outbox_files() == set()
        await world.stop()

    run(main)


def test_what_somebody_else_earned_with_a_forged_message_ends_nothing(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        refusal = receipt_for(update, Verdict.REJECTED, Reason.TOO_LARGE)
        await world.coordinator.tell(msgspec.structs.replace(refusal, digest=update_digest(b"forged")))
        await world.coordinator.answer(update)
        await until(lambda: agent.tally == Tally(trained=1, sent=1, applied=1))
        await world.stop()

    run(main)


async def with_an_update_in_the_outbox(world: World) -> None:
    """An agent trained, sent, had no answer, and ended."""
    await world.coordinator.publish(Release(1))
    world.start(world.agent())
    await world.coordinator.updates.get()
    await world.stop()
    assert len(sent(world)) == 1


def test_what_waits_in_the_outbox_is_not_sent_before_the_devices_turn(world: World) -> None:
    async def main() -> None:
        await with_an_update_in_the_outbox(world)
        await world.coordinator.announce(spread_s=LONG_S)
        agent = world.agent()
        world.start(agent)
        await until(lambda: len(world.presences()) > 2)
        await asyncio.sleep(0.05)
        assert len(sent(world)) == 1
        await world.coordinator.announce(spread_s=0.0)  # the fleet is smaller than it was thought to be
        await until(lambda: len(sent(world)) == 2)
        await world.stop()

    run(main)


def test_a_small_fleet_sends_at_once(world: World) -> None:
    async def main() -> None:
        await with_an_update_in_the_outbox(world)
        await world.coordinator.announce(spread_s=0.0)
        world.start(world.agent())
        await until(lambda: len(sent(world)) == 2)
        await world.stop()

    run(main)


def test_a_receipt_that_comes_before_the_turn_saves_sending_again(world: World) -> None:
    """The update was in the broker's queue all the time, and the coordinator that is back has found it."""

    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        await world.coordinator.announce(epoch=2, spread_s=LONG_S)
        await world.coordinator.ask_for_all()
        await until(lambda: agent.tally.resent == 1)  # it is to be sent again, in its turn
        await world.coordinator.answer(update)
        await until(lambda: agent.tally.applied == 1)
        assert len(sent(world)) == 1
        await world.stop()

    run(main)


def test_who_is_asked_for_chunks_does_not_wait_for_its_turn(world: World) -> None:
    async def main() -> None:
        await world.coordinator.publish(Release(1))
        agent = world.agent()
        world.start(agent)
        update = await world.coordinator.updates.get()
        await world.coordinator.announce(epoch=2, spread_s=LONG_S)
        await world.coordinator.ask_for_all()
        await until(lambda: agent.tally.resent == 1)
        await world.coordinator.ask_for(update, 0)
        await until(lambda: len(sent(world)) == 2)
        await world.stop()

    run(main)


def test_a_connection_lost_before_the_turn_begins_it_anew(world: World) -> None:
    async def main() -> None:
        await with_an_update_in_the_outbox(world)
        await world.coordinator.announce(spread_s=LONG_S)
        world.start(world.agent())
        presences = len(world.presences())
        await until(lambda: len(world.presences()) > presences)
        await world.coordinator.announce(spread_s=0.0, online=False)
        world.broker.newest.abort()
        await world.coordinator.announce(spread_s=0.0)
        await until(lambda: len(sent(world)) == 2)
        await world.stop()

    run(main)
