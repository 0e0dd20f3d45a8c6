"""What a simulated fleet did, seen from outside, and the promises that it is held against afterwards."""

import contextlib
import hashlib
from collections import Counter as Tally
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from coordinator.entries import Entry, UpdateEntry
from coordinator.journal import Batch
from coordinator.model_state import ModelState
from coordinator.recovery import Recovered, starts
from coordinator.replay import replay
from coordinator.service import CoordinatorService
from edge_agent.agent import Agent
from edge_agent.outbox import Outbox, Pending
from edge_agent.submission import _NOT_LOOKED_UP
from fedtide.wire import topics
from fedtide.wire.errors import WireError
from fedtide.wire.ids import Counter, ModelVersion
from fedtide.wire.messages import DownMessage, Head, Reason, Receipt, Verdict
from fedtide.wire.parameters import Vector, fingerprint
from fedtide.wire.seal import unseal, unseal_any
from fedtide.wire.signatures import DOWN_DOMAIN, HEAD_DOMAIN, PublicKey

_TAKEN: Final = frozenset({Verdict.APPLIED, Verdict.DUPLICATE})

_FIRST: Final = ModelVersion(0)

Update = tuple[str, int]
"""A device and one of its counters."""


class PromiseBroken(AssertionError):
    """A promise of DESIGN.md was broken; the text says which, and by whom."""


@dataclass
class DeviceRecord:
    """What one device did, over all its lives.

    Attributes:
        put: when each update was put into its outbox, in virtual seconds.
        settled: the verdict and the reason of each receipt it took.
        believed: settled while two coordinators had the fleet.
        sent: updates of which something may have left it.
        superseded: updates that it gave up for newer ones.
        newest: the newest version that it trained on.
    """

    name: str
    now: Callable[[], float]
    heads: dict[ModelVersion, set[bytes]]
    put: dict[int, float] = field(default_factory=dict)
    settled: dict[int, tuple[Verdict, Reason | None]] = field(default_factory=dict)
    believed: set[int] = field(default_factory=set)
    sent: set[int] = field(default_factory=set)
    superseded: set[int] = field(default_factory=set)
    settled_at: float = 0.0
    newest: ModelVersion = _FIRST
    trained: int = 0

    def trains_on(self, version: ModelVersion, parameters: Vector) -> None:
        """P4: never older than before, and always whole."""
        if version < self.newest:
            raise PromiseBroken(f"P4: {self.name} trains on version {version} after {self.newest}")
        if fingerprint(parameters) not in self.heads.get(version, set()):
            raise PromiseBroken(f"P4: what {self.name} trains on is not the published version {version}")
        self.newest = version
        self.trained += 1

    @property
    def waiting(self) -> list[int]:
        """Updates that must be in its outbox, unless one is just being removed."""
        return [each for each in self.put if each not in self.settled and each not in self.superseded]

    def watch(self, agent: Agent) -> None:
        """A start: take note of what goes into the outbox and comes out of it from here on."""
        outbox = agent._submission.outbox
        self._look_into(outbox)
        put, note_sent, settle = outbox.put, outbox.note_sent, agent._submission.settle

        def noted_put(counter: Counter, envelope: bytes) -> Pending:
            if counter in self.put:
                raise PromiseBroken(f"P2: {self.name} used counter {counter} twice")
            before: set[int] = set(outbox._pending)
            pending = put(counter, envelope)
            self.put[counter] = self.now()
            self._give_up(before - set(outbox._pending))
            return pending

        def noted_sent(counter: Counter) -> None:
            self.sent.add(counter)
            note_sent(counter)

        def noted_settle(counter: Counter, verdict: Verdict, reason: Reason | None = None) -> None:
            self.settled[counter] = (verdict, reason)
            self.settled_at = self.now()
            settle(counter, verdict, reason)

        outbox.put, outbox.note_sent = noted_put, noted_sent  # type: ignore[method-assign]
        agent._submission.settle = noted_settle  # type: ignore[method-assign]

    def _look_into(self, outbox: Outbox) -> None:
        """After a start: what has to be there is there; what is there counts as sent from here on."""
        there = set(outbox._pending)
        for counter in sorted(there - set(self.put)):
            self.put[counter] = self.now()  # the power went as it was being put there
        newest = max(there, default=0)
        self._give_up({each for each in self.waiting if each not in there and each < newest})
        lost = [each for each in self.waiting if each not in there]
        if lost:
            raise PromiseBroken(f"P2: {self.name} started without {lost} in its outbox")
        self.sent |= there

    def _give_up(self, counters: set[int]) -> None:
        """A newer update has taken their place, which nothing may that was ever sent."""
        sent = counters & self.sent
        if sent:
            raise PromiseBroken(f"P2: {self.name} gave up {sorted(sent)}, which it had sent")
        self.superseded |= counters


@dataclass(frozen=True)
class Audit:
    """What the journal says when all is over.

    Attributes:
        updates: in the order of the journal.
        totals: fates by name.
        version: the newest.
        digest: SHA-256 over everything in the journal that was decided, in hexadecimal.
    """

    updates: list[Update]
    totals: dict[str, int]
    version: ModelVersion
    digest: str


class Witness:
    """Hears everything that reaches the broker, and is told what devices do.

    Attributes:
        receipts: the verdicts that the coordinator ever sent, by update.
        heads: fingerprints by published version.
        committed: updates in the order in which they became durable.
        forked: whether two coordinators have had the fleet, on two copies of one journal.
        ticks: how often the accounting was looked at.
    """

    def __init__(self, fleet: str, key: PublicKey, now: Callable[[], float]) -> None:
        self.receipts: dict[Update, set[Verdict]] = {}
        self.heads: dict[ModelVersion, set[bytes]] = {}
        self.devices: dict[str, DeviceRecord] = {}
        self.committed: dict[Update, None] = {}
        self.ticks = 0
        self.forked = False
        self._key = key
        self._now = now
        self._head = topics.HEAD.name(fleet)  # type: ignore[arg-type]

    def device(self, name: str) -> DeviceRecord:
        """A device's record."""
        if name not in self.devices:
            self.devices[name] = DeviceRecord(name, self._now, self.heads)
        return self.devices[name]

    def hears(self, topic: str, payload: bytes) -> None:
        """A message has reached the broker from the coordinator's machine."""
        try:
            if topic == self._head and payload:
                head = unseal(payload, Head, self._key, HEAD_DOMAIN)
                self.heads.setdefault(head.version, set()).add(head.parameters_sha256)
            elif topics.DOWN.parse(topic):
                message = unseal_any(payload, DownMessage, self._key, DOWN_DOMAIN)
                if isinstance(message, Receipt):
                    update = (message.device, message.counter)
                    self.receipts.setdefault(update, set()).add(message.verdict)
        except WireError:
            return

    def opens(self, recovered: Recovered) -> None:
        """A coordinator starts: take note of what is in its journal, and of every commit from here on."""
        journal = recovered.journal
        for _, entry in journal.entries_after(journal.oldest - 1):
            self._note(entry, again=True)
        commit = journal.commit

        def noted_commit(batch: Batch) -> None:
            commit(batch)
            for entry in batch.entries:
                self._note(entry, again=False)

        journal.commit = noted_commit  # type: ignore[method-assign]

    def _note(self, entry: Entry, *, again: bool) -> None:
        if isinstance(entry, UpdateEntry):
            update = (str(entry.device), int(entry.counter))
            if update in self.committed and not again and not self.forked:
                raise PromiseBroken(f"P1: committed twice: {update}")
            self.committed[update] = None

    def fork(self) -> None:
        """What one of two coordinators receipted after the copy was made is in its own journal only."""
        self.forked = True

    def one_goes_on(self) -> None:
        """From here on one coordinator has the fleet, and what is receipted is true again."""
        self.receipts.clear()
        for device in self.devices.values():
            device.believed |= set(device.settled)

    def looks_at(self, service: CoordinatorService) -> None:
        """P7, at this moment."""
        self.ticks += 1
        if not service.committer.accounting.balanced():
            raise PromiseBroken(f"P7: {service.committer.accounting}")

    # Afterwards.

    def check_receipts(self, audit: Audit) -> None:
        """P1: whatever was receipted as applied is in the journal, and nothing is in it twice."""
        twice = [update for update, count in Tally(audit.updates).items() if count > 1]
        if twice:
            raise PromiseBroken(f"P1: in the journal more than once: {twice[:5]}")
        journaled = set(audit.updates)
        lost = [
            update
            for update, verdicts in self.receipts.items()
            if verdicts & _TAKEN and update not in journaled
        ]
        if lost:
            raise PromiseBroken(f"P1: receipted and not in the journal: {lost[:5]}")

    def check_updates(self, audit: Audit, before: float) -> None:
        """P2: what was put into an outbox before a time is journaled, rejected, or superseded."""
        journaled = set(audit.updates)
        for name, record in self.devices.items():
            for counter, (verdict, reason) in record.settled.items():
                if counter in record.believed:
                    continue
                there = (name, counter) in journaled
                if verdict in _TAKEN and not there:
                    raise PromiseBroken(f"P1: {name} was told that {counter} was {verdict}, and it was not")
                if verdict is Verdict.REJECTED and there and reason not in _NOT_LOOKED_UP:
                    raise PromiseBroken(f"P1: {name} was told {reason} of {counter}, which is in the journal")
            late = [each for each in record.waiting if record.put[each] < before]
            if late:
                made = ", ".join(f"{each} of {record.put[each]:.3f} s" for each in late[:5])
                raise PromiseBroken(f"P2: updates of {name} still wait for a receipt: {made}")

    def check_progress(self, since: float) -> None:
        """P6: every device has got a receipt since."""
        behind = [name for name, record in self.devices.items() if record.settled_at <= since]
        if behind:
            raise PromiseBroken(f"P6: no receipt since {since:.0f} s: {', '.join(sorted(behind)[:10])}")


def audit(recovered: Recovered, initial: Vector, committed: list[Update] | None) -> Audit:
    """Replay the whole journal from ``initial``, and hold every published version against it.

    Args:
        recovered: the coordinator's directory.
        initial: the plan's parameters.
        committed: updates whose commit the witness saw; None: they were another journal's too.

    Raises:
        PromiseBroken: P1, P3 or P7.
    """
    journal = recovered.journal
    updates: list[Update] = []
    hashed = hashlib.sha256()
    for number, entry in journal.entries_after(journal.oldest - 1):
        hashed.update(repr((number, entry)).encode())
        if isinstance(entry, UpdateEntry):
            updates.append((str(entry.device), int(entry.counter)))
    version = _replayed(recovered, initial)
    totals = journal.totals()
    if journal.oldest > 1 and committed is not None:
        updates = committed  # the journal has let go of some
    elif committed is not None and sorted(updates) != sorted(committed):
        raise PromiseBroken("P1: what was committed and what is in the journal differ")
    if totals.get("applied", 0) != len(updates):
        raise PromiseBroken(f"P7: {totals.get('applied', 0)} applied; the journal has {len(updates)}")
    for name, count in sorted(totals.items()):
        hashed.update(f"{name} {count}\n".encode())
    hashed.update(repr([(row.version, row.fingerprint, row.moment) for row in journal.published()]).encode())
    hashed.update(repr(sorted(journal.marks().items())).encode())
    return Audit(updates, totals, version, hashed.hexdigest())


def _replayed(recovered: Recovered, initial: Vector) -> ModelVersion:
    """P3: what the oldest start gives that a replay can begin with; the newest version."""
    journal = recovered.journal
    state, replayed = _from_the_oldest(recovered, initial)
    if state.parameters.tobytes() != recovered.state.parameters.tobytes():
        raise PromiseBroken("P3: replay from the beginning and from the snapshot differ")
    if not np.isfinite(state.parameters).all():
        raise PromiseBroken("P4: the model is not finite")
    for row in journal.published():
        if row.version >= min(replayed) and replayed.get(row.version) != (row.exact or row.fingerprint):
            raise PromiseBroken(f"P3: replay gives another version {row.version} than was published")
    return state.version


def _from_the_oldest(recovered: Recovered, initial: Vector) -> tuple[ModelState, dict[ModelVersion, bytes]]:
    """The state, and the fingerprint of every version on the way."""
    for first, sequence, schema in reversed(list(starts(recovered.journal))):
        replayed = {first.version: fingerprint(first.parameters if sequence else initial)}

        def note(made: ModelState, replayed: dict[ModelVersion, bytes] = replayed) -> None:
            replayed[made.version] = fingerprint(made.parameters)

        # FedAsync may need a base from before the oldest snapshot, whose file is gone.
        with contextlib.suppress(FileNotFoundError):
            _, state = replay(
                recovered.journal,
                first,
                sequence,
                schema=schema,
                bases=recovered.models.base,
                on_version=note,
            )
            return state, replayed
    raise PromiseBroken("P3: no start gives the state")
