"""An enrolled device that publishes every bad update there is, and a stranger, over a real broker."""

import asyncio
import contextlib
from collections import Counter

from hostile_updates import CASES, Forger
from whole_fleet import Witness, assert_balanced, audited, coordinator_here, make_fleet, until

from coordinator.model_grid import first_on_grid
from coordinator.plan.file import load
from fedtide.wire import topics
from fedtide.wire.ids import DeviceId
from fedtide.wire.link import Session, Traffic
from fedtide.wire.messages import Reason, Verdict
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.parameters import fingerprint
from fedtide.wire.signatures import SigningKey

HOSTILE, STRANGER = DeviceId("hostile"), DeviceId("stranger")
PATIENCE_S = 20


@contextlib.asynccontextmanager
async def connected(fleet, device):
    dial = MqttDialler(fleet.broker, Traffic())
    connection = await dial(Session(f"{fleet.name}-{device}", True, 0, 32, None), 0)
    try:
        yield connection
    finally:
        await connection.close()


def forger_of(fleet, key, counter, device=HOSTILE):
    plan = load(fleet.settings().plan)
    return Forger(
        fleet=fleet.name,
        plan=plan.plan.id,
        schema=plan.plan.manifest.schema,
        device=device,
        key=key,
        base_version=0,
        base_sha256=fingerprint(first_on_grid(plan.initial, plan.plan.manifest.schema)),
        counter=counter,
    )


class Attack:
    """Publishes one case after the other and waits until the coordinator has judged it."""

    def __init__(self, fleet, key, service, witness):
        self.fleet, self.key, self.service, self.witness = fleet, key, service, witness
        self.expected = Counter()

    @property
    def counted(self):
        return self.service.status("").updates

    async def send(self, connection, messages, reason, device=HOSTILE):
        """Publish, wait for the fate to be counted; the receipts it earned."""
        topic = topics.UPDATE.name(self.fleet.name, shard=0, device=device)
        heard, received = len(self.witness.receipts), self.counted.received
        for message in messages:
            await connection.publish(topic, message)
        self.expected[reason.value] += 1
        await until(
            lambda: self.counted.received == received + 1 and not self.counted.waiting,
            PATIENCE_S,
            lambda: f"{reason}: {self.counted}",
        )
        return heard

    async def receipt_after(self, heard):
        await until(lambda: len(self.witness.receipts) > heard, PATIENCE_S, lambda: "no receipt came")
        return self.witness.receipts[heard]


def test_every_bad_update_is_answered_with_its_reason_and_none_is_folded(digits, brokers, tmp_path):
    fleet = make_fleet(tmp_path, digits, brokers.port, devices=0, goal=1)
    witness, key = Witness(fleet), fleet.enrol(HOSTILE)

    async def scenario():
        async with coordinator_here(fleet) as (service, running), witness.listening():
            await until(lambda: service.status("").published_version == 0, PATIENCE_S, lambda: "no head")
            attack = Attack(fleet, key, service, witness)
            async with connected(fleet, HOSTILE) as hostile, connected(fleet, STRANGER) as stranger:
                await publish_every_case(attack, hostile)
                await publish_as_a_stranger(attack, stranger)
                await publish_nonsense_elsewhere(fleet, hostile)
                before = service.status("")
                assert before.version == 0
                assert before.updates.applied == before.buffered == 0
                await publish_honestly_then_replay(attack, hostile)
            assert not running.done()
            return attack.expected, service.status("running")

    expected, seen = asyncio.run(scenario())
    assert seen.updates.rejected == expected
    elsewhere = {"stopped", "too-stale", "too-many", "unreadable"}
    assert set(expected) == {str(reason) for reason in Reason} - elsewhere
    assert_balanced(seen.updates)
    assert (seen.version, seen.updates.applied) == (2, 2)
    record = audited(fleet)
    assert [device for device, _ in record.updates] == [HOSTILE, HOSTILE]
    written = fleet.status()
    assert written.updates.rejected == expected
    assert witness.unsigned == 0


async def publish_every_case(attack, connection):
    for counter, case in enumerate(CASES, start=1):
        forger = forger_of(attack.fleet, attack.key, counter)
        heard = await attack.send(connection, case.messages(forger), case.reason)
        if case.receipt:
            receipt = await attack.receipt_after(heard)
            assert (receipt.device, receipt.verdict, receipt.reason) == (
                HOSTILE,
                Verdict.REJECTED,
                case.reason,
            ), case.name
            assert receipt.detail


async def publish_as_a_stranger(attack, connection):
    forger = forger_of(attack.fleet, SigningKey.generate(), 1, STRANGER)
    messages = forger.chunks(forger.envelope())
    heard = await attack.send(connection, messages, Reason.UNKNOWN_DEVICE, STRANGER)
    assert (await attack.receipt_after(heard)).reason is Reason.UNKNOWN_DEVICE


async def publish_nonsense_elsewhere(fleet, connection):
    """Presence, events and topics that nobody uses: ignored, whatever they hold."""
    for topic in ("st/hostile", "ev/hostile", "st/stranger", "up/0/hostile/more", "up/7/hostile", "x"):
        for payload in (b"", b"\x01", bytes(100_000)):
            await connection.publish(f"fl/1/{fleet.name}/{topic}", payload)


async def publish_honestly_then_replay(attack, connection):
    """The same device still counts; and what was applied once is not applied again under an old counter."""
    for counter in (1000, 1001):
        forger = forger_of(attack.fleet, attack.key, counter)
        topic = topics.UPDATE.name(attack.fleet.name, shard=0, device=HOSTILE)
        heard = len(attack.witness.receipts)
        for chunk in forger.chunks(forger.envelope()):
            await connection.publish(topic, chunk)
        assert (await attack.receipt_after(heard)).verdict is Verdict.APPLIED
    overtaken = forger_of(attack.fleet, attack.key, 999)
    heard = await attack.send(connection, overtaken.chunks(overtaken.envelope()), Reason.REPLAYED_COUNTER)
    assert (await attack.receipt_after(heard)).reason is Reason.REPLAYED_COUNTER
