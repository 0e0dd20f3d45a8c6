"""Devices that write down, beside what they do, what became of each of their updates.

One file per device, a line per event, in the kernel's hands before the next thing happens: it outlives a
process that is killed. So a test can say of every update that was ever made where it is now.
"""

from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from whole_fleet import assert_balanced, audited

from edge_agent.simulation import SimulatedFleet

LEDGER = "ledger"
LEFT_UNREAD = frozenset({"too-many"})
"""Why an update may be rejected without any harm: its device is not told, and sends it again."""


class LedgerFleet(SimulatedFleet):
    """Simulated devices with a ledger each."""

    def _agent(self, device, rng):
        agent = super()._agent(device, rng)
        _keep(agent._submission, device.settings.state / LEDGER)
        return agent


def _keep(submission, path):
    """Have a device's submission tell its ledger: which counters it took, kept, sent and settled."""
    outbox, settle = submission.outbox, submission.settle
    reserve, put, note_sent = outbox.reserve, outbox.put, outbox.note_sent

    def write(event, counter):
        with path.open("a") as file:
            file.write(f"{event} {counter}\n")

    def noted_reserve():
        counter = reserve()
        write("reserved", counter)
        return counter

    def noted_put(counter, envelope):
        pending = put(counter, envelope)
        write("kept", counter)
        return pending

    def noted_sent(counter):
        write("sent", counter)
        note_sent(counter)

    def noted_settle(counter, verdict, reason=None):
        write(verdict, counter)  # before it leaves the outbox: settled twice is no harm
        settle(counter, verdict, reason)

    outbox.reserve, outbox.put, outbox.note_sent = noted_reserve, noted_put, noted_sent
    submission.settle = noted_settle


@dataclass
class History:
    """One device's updates, by counter.

    Attributes:
        reserved: how often each counter was taken.
        kept: put into the outbox.
        sent: of which something was sent.
        receipts: how often each verdict came for each update.
        waiting: in the outbox now.
    """

    reserved: Counter = field(default_factory=Counter)
    kept: set = field(default_factory=set)
    sent: set = field(default_factory=set)
    receipts: Counter = field(default_factory=Counter)
    waiting: AbstractSet = frozenset()

    def with_verdict(self, *verdicts):
        return {counter for verdict, counter in self.receipts if verdict in verdicts}


def history(state):
    """What a device's state directory says."""
    found = History()
    lines = (state / LEDGER).read_text().splitlines() if (state / LEDGER).exists() else []
    for line in lines:
        event, number = line.split()
        counter = int(number)
        match event:
            case "reserved":
                found.reserved[counter] += 1
            case "kept":
                found.kept.add(counter)
            case "sent":
                found.sent.add(counter)
            case verdict:
                found.receipts[verdict, counter] += 1
    found.waiting = {int(file.stem) for file in (state / "outbox").glob("*.update")}
    return found


def assert_nothing_is_lost(fleet, record):
    """Each update a device ever kept was settled, or waits, or gave way unsent to a newer one.

    Returns:
        How many were kept by all devices.
    """
    journaled = {}
    for device, counter in record.updates:
        journaled.setdefault(device, []).append(counter)
    kept = 0
    for device in fleet.devices:
        name = device.settings.device
        told, found = history(device.settings.state), journaled.get(name, [])
        assert len(set(found)) == len(found), f"{name}: applied twice"
        assert max(told.reserved.values(), default=1) == 1, f"{name}: a counter was taken twice"
        applied = told.with_verdict("applied", "duplicate")
        assert applied <= set(found), f"{name}: receipts for {applied - set(found)}, not in the journal"
        # What is in the journal and whose receipt has not come must still be there to ask for it.
        assert set(found) <= applied | told.waiting, f"{name}: {set(found) - applied - told.waiting}"
        gone = told.kept - told.with_verdict("applied", "duplicate", "rejected") - told.waiting
        last = max(told.reserved, default=0)
        assert not gone & told.sent, f"{name}: lost {gone & told.sent}"
        assert all(counter < last for counter in gone), f"{name}: lost {gone}, the newest"
        kept += len(told.kept | told.waiting)
    return kept


def assert_every_receipt_is_true(fleet, witness, reasons=frozenset(), *, all_devices=True):
    """After a run: journal, receipts, accounting and the devices' own ledgers say the same.

    Args:
        fleet: whose coordinator and devices have ended.
        witness: has heard receipts.
        reasons: for which updates may have been rejected, but for what was left unread.
        all_devices: whether each device must have contributed.

    Returns:
        The coordinator's last status.
    """
    record = audited(fleet)
    assert witness.unsigned == 0 or "bad-signature" in reasons
    assert witness.applied() <= set(record.updates)
    assert_nothing_is_lost(fleet, record)
    seen = fleet.status()
    assert seen.state in {"offline", "stopped"}
    assert_balanced(seen.updates)
    assert seen.updates.applied == len(record.updates)
    assert seen.updates.rejected.keys() <= reasons | LEFT_UNREAD, seen.updates
    assert seen.version == record.version
    heard = {device for device, _ in record.updates}
    assert heard == {device.settings.device for device in fleet.devices} or not all_devices
    return seen
