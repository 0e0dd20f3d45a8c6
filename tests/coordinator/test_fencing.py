"""Of two runs with one key exactly one goes on; who speaks in its name without the key, is not heard."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from recording_connection import RecordingConnection
from small_fleet import DEVICES, FLEET, PLAN, constant, device_key, make_settings
from test_coordinator_service import AT_ONCE, COORDINATOR, HEAD, KEY, Fleet, down, run, update

from coordinator.aggregation import FedBuff
from coordinator.fence_note import leave_note, noted, remove_note
from coordinator.fencing import Claim, Fence, Fenced, Heard
from fedtide.wire.chunks import MAX_CHUNK_BYTES, update_chunks
from fedtide.wire.disk import OS_DISK
from fedtide.wire.messages import CoordinatorState, Head
from fedtide.wire.parameters import fingerprint
from fedtide.wire.seal import seal, unseal
from fedtide.wire.signatures import COORDINATOR_DOMAIN, HEAD_DOMAIN

RUNS = st.builds(Claim, st.integers(1, 4), st.sampled_from(["aa", "bb", "cc"]))


def state(claim, *, online=True, fleet=FLEET, key=KEY, domain=COORDINATOR_DOMAIN):
    message = CoordinatorState(
        fleet=fleet, epoch=claim.epoch, run=claim.run, online=online, protocol_min=1, protocol_max=1
    )
    return seal(message, key, domain)


def hears(own, sealed, *, looking=False):
    """What a run makes of it; None: it ends."""
    try:
        return Fence(FLEET, KEY.public, own).hear(sealed, looking=looking)
    except Fenced:
        return None


@given(RUNS, RUNS, st.booleans())
def test_of_two_runs_that_hear_each_other_exactly_one_goes_on(one, two, online):
    assume(one != two)
    left = [hears(one, state(two, online=online)), hears(two, state(one, online=online))]
    assert sorted(heard is None for heard in left) == [False, True]
    assert Heard.LOSER in left
    assert (left[0] is Heard.LOSER) == (one > two)


@given(RUNS, RUNS)
def test_a_run_that_only_looks_gives_way_to_any_that_may_have_been_there_before(own, rival):
    assume(own != rival)
    heard = hears(own, state(rival, online=False), looking=True)
    assert (heard is None) == (rival.epoch >= own.epoch)


@given(RUNS, st.booleans())
def test_only_its_own_state_that_says_online_tells_a_run_that_it_was_heard(own, online):
    assert hears(own, state(own, online=online)) is (Heard.OURS if online else Heard.OUR_WILL)


HIGHER = Claim(9, "ff")


@pytest.mark.parametrize(
    "sealed",
    [
        b"",
        b"\x01 no state at all",
        b"\x02" + state(HIGHER)[1:],
        state(HIGHER, key=device_key(DEVICES[0])),
        state(HIGHER, domain=HEAD_DOMAIN),
        state(HIGHER, fleet="others"),
    ],
    ids=["nothing", "rubbish", "another protocol", "a device's key", "another purpose", "another fleet"],
)
def test_what_the_coordinators_key_did_not_say_of_this_fleet_ends_no_run(sealed):
    assert hears(Claim(1, "aa"), sealed, looking=True) is Heard.NOTHING


def test_the_error_names_both_epochs_and_what_to_do():
    with pytest.raises(Fenced, match=r"in epoch 9; this is epoch 1\. .* fedtide coordinator run --take-over"):
        Fence(FLEET, KEY.public, Claim(1, "aa")).hear(state(HIGHER))


def test_the_note_says_to_whom_a_run_gave_way_until_it_is_removed(tmp_path):
    assert noted(tmp_path, OS_DISK) is None
    leave_note(tmp_path, Fenced(HIGHER, 1), OS_DISK)
    assert noted(tmp_path, OS_DISK) == HIGHER
    remove_note(tmp_path, OS_DISK)
    assert noted(tmp_path, OS_DISK) is None


def test_a_damaged_note_is_a_note(tmp_path):
    (tmp_path / "fenced").write_bytes(b"\xff\xff")
    assert noted(tmp_path, OS_DISK) == Claim(0, "")


def own_state(fleet):
    return unseal(
        fleet.connection.payloads(COORDINATOR)[-1], CoordinatorState, KEY.public, COORDINATOR_DOMAIN
    )


SETTINGS = make_settings(aggregator=FedBuff(goal=9), publish=AT_ONCE)


def test_a_run_that_hears_of_a_greater_one_ends_before_it_acknowledges_anything_more(tmp_path):
    async def scenario(fleet, running):
        rival = Claim(own_state(fleet).epoch, "zz")
        fleet.connection.deliver(COORDINATOR, state(rival), qos=0)
        fleet.send(update(1))
        with pytest.raises(Fenced):
            await running

    fleet = run(tmp_path, SETTINGS, scenario)
    assert fleet.connection.acknowledged == []
    assert fleet.received(DEVICES[0]) == []
    assert fleet.in_the_journal() == []
    assert fleet.connection.closed  # with a goodbye, so that its will does not call the other one away
    assert noted(tmp_path / "state", OS_DISK) == Claim(1, "zz")
    assert [unseal(each, CoordinatorState, KEY.public, COORDINATOR_DOMAIN).online
            for each in fleet.connection.payloads(COORDINATOR)] == [True]  # fmt: skip


def test_a_run_whose_state_was_replaced_by_that_of_a_lesser_one_puts_it_back(tmp_path):
    async def scenario(fleet, _running):
        own = own_state(fleet)
        fleet.connection.deliver(COORDINATOR, state(Claim(own.epoch, ""), online=False), qos=0)
        await fleet.connection.until(lambda: len(fleet.connection.payloads(COORDINATOR)) == 2)
        assert own_state(fleet) == own

    run(tmp_path, SETTINGS, scenario)


def test_a_run_whose_own_will_comes_late_says_again_that_it_is_there(tmp_path):
    """Over another broker of the fleet it may take until the keepalive; devices send nothing meanwhile."""

    async def scenario(fleet, _running):
        own = own_state(fleet)
        fleet.connection.deliver(COORDINATOR, state(Claim(own.epoch, own.run), online=False), qos=0)
        await fleet.connection.until(lambda: len(fleet.connection.payloads(COORDINATOR)) == 2)
        assert own_state(fleet) == own

    fleet = run(tmp_path, SETTINGS, scenario)
    assert not own_state(fleet).online  # the goodbye is the last word


class Late(RecordingConnection):
    """A broker that takes its time to bring the coordinator's own state."""

    async def subscribe(self, filters, *, qos=1):
        await super().subscribe([name for name in filters if name != COORDINATOR], qos=qos)


def once_before(tmp_path):
    """A first run, which published version 0."""

    async def scenario(_fleet, _running):
        pass

    run(tmp_path, SETTINGS, scenario)


def test_no_update_is_looked_at_until_the_runs_own_state_has_come_back(tmp_path):
    once_before(tmp_path)

    async def main():
        fleet = Fleet(tmp_path, SETTINGS)
        late = fleet.connections[0] = Late()
        running = asyncio.create_task(fleet.service.run())
        await late.until(lambda: COORDINATOR in late.topics())
        fleet.send(update(1), update(1, DEVICES[1]))
        for _ in range(200):
            await asyncio.sleep(0)
        assert late.acknowledged == []
        assert fleet.in_the_journal() == []
        late.deliver(COORDINATOR, late.payloads(COORDINATOR)[0], qos=0)
        await late.until(lambda: len(late.acknowledged) == 2)
        assert fleet.in_the_journal() == [1, 1]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        fleet.recovered.close()

    asyncio.run(main())


def test_on_a_new_connection_no_update_is_looked_at_before_the_runs_own_state_has_come_back_there(tmp_path):
    """A broker with a session brings what it kept at once; meanwhile another run may have had the fleet."""

    async def scenario(fleet, running):
        again = fleet.connections[1]
        (chunk,) = update_chunks(update(1)[2], 1, MAX_CHUNK_BYTES)
        again.deliver(f"fl/1/pumps/up/0/{DEVICES[0]}", chunk)
        again.deliver(COORDINATOR, state(HIGHER), qos=0)
        fleet.connections[0].lose()
        with pytest.raises(Fenced):
            await running

    fleet = run(tmp_path, SETTINGS, scenario, connections=2)
    assert fleet.connections[1].acknowledged == []
    assert fleet.in_the_journal() == []


def a_head(version, parameters=None, key=KEY):
    """What another run of the coordinator may have left on the broker."""
    blob = {"size_bytes": 1, "sha256": bytes(32), "chunk_bytes": 1}
    ref = msgspec.convert(tuple(blob.values()), type=Head.__annotations__["plan_blob"])
    head = Head(
        fleet=FLEET,
        epoch=1,
        version=version,
        parent_sha256=bytes(32),
        plan=PLAN.plan.id,
        parameters_sha256=fingerprint(constant(9.0) if parameters is None else parameters),
        plan_blob=ref,
        full_blob=ref,
        update_codec={"id": "float32"},
        training=True,
        issued=0.0,
        expires=0.0,
    )
    return seal(head, key, HEAD_DOMAIN)


@pytest.mark.parametrize(
    ("sealed", "version"),
    [
        (lambda: a_head(40), 41),
        (lambda: a_head(0), 1),  # the same number, other parameters
        (lambda: a_head(0, PLAN.initial), 0),  # its own
        (lambda: a_head(40, key=device_key(DEVICES[0])), 0),
        (lambda: b"rubbish", 0),
    ],
    ids=["a higher version", "another model of its version", "its own", "a forgery", "rubbish"],
)
def test_versions_go_on_above_those_that_another_run_offered(tmp_path, sealed, version):
    """Devices have run them, and never go back."""
    once_before(tmp_path)

    async def main():
        fleet = Fleet(tmp_path, SETTINGS)
        connection = fleet.connections[0]
        connection.deliver(HEAD, sealed(), qos=0)
        running = asyncio.create_task(fleet.service.run())
        await connection.until(lambda: any(head.version == version for head in fleet.heads()))
        assert fleet.service.committer.committed.version == version
        assert fleet.service.committer.committed.parameters.tobytes() == PLAN.initial.tobytes()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        fleet.recovered.close()

    asyncio.run(main())


def test_a_receipt_names_the_epoch_of_the_run_that_gave_it(tmp_path: Path):
    async def scenario(fleet, _running):
        fleet.send(update(1))
        await fleet.connection.until(lambda: fleet.received(DEVICES[0]))

    for epoch in (1, 2):
        fleet = run(tmp_path, SETTINGS, scenario)
        (receipt,) = fleet.received(DEVICES[0])
        assert receipt.epoch == epoch
        assert down(DEVICES[0]) in fleet.connection.topics()
