"""The committer: arrivals → judge and fold → journal → acknowledge and receipts. One task, so no locks.

While one batch's fsync runs in the journal's thread, the next arrivals gather: that is the group commit.
"""

import asyncio
import logging
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from coordinator.accounting import DUPLICATE, REJECTED, Accounting
from coordinator.journal import Batch, Counted
from coordinator.line import Line, Waiting
from coordinator.pace import Pacer
from coordinator.recovery import Recovered
from coordinator.settings import CoordinatorSettings
from coordinator.writer import Writer
from fedtide.wire import topics
from fedtide.wire.clock import Clock
from fedtide.wire.ids import DeviceId, Epoch, ModelVersion
from fedtide.wire.link import Connection, Delivery, LinkDown, PublishRefused
from fedtide.wire.messages import DownMessage, MissingChunks, Reason, Receipt
from fedtide.wire.parameters import Vector
from fedtide.wire.seal import seal
from fedtide.wire.signatures import DOWN_DOMAIN, SigningKey
from fedtide.wire.steps import Step, reached

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Reset:
    """Asks for a reset of the model; see ``Committer.reset``."""

    why: str
    above: ModelVersion | None
    parameters: Vector | None
    done: asyncio.Future[ModelVersion]


class JournalThread:
    """Runs journal work one after the other in a thread, so that an fsync does not stop the event loop."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "journal")

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` after everything given before."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """Finish what was given and end the thread."""
        self._executor.shutdown()


class Committer:
    """Owns the writer and everything that follows from a judgement.

    Attributes:
        accounting: of all updates.
        staleness: how many updates applied in this run had which staleness.
        committed: the model after the last committed entry; what others may see of it. Its buffer is spent.
        pacer: measures how many updates a second are sustained, and says how long devices shall rest.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        writer: Writer,
        recovered: Recovered,
        *,
        journal_thread: JournalThread,
        key: SigningKey,
        clock: Clock,
        epoch: Epoch,
        on_version: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._writer = writer
        self._recovered = recovered
        self._journal_thread = journal_thread
        self._key = key
        self._epoch = epoch
        self._clock = clock
        self._on_version = on_version
        self.accounting = Accounting.from_totals(recovered.journal.totals())
        self.staleness: Tally[int] = Tally()
        self.committed = writer.state
        self.pacer = Pacer(settings.pacing)
        self._line = Line(settings.journal)
        self._dropped: Tally[str] = Tally()
        self._count_due = False
        self._resets: list[_Reset] = []
        self._work = asyncio.Event()
        self._judged = asyncio.Event()
        self._finishing = self._over = False
        self._buffer_since = self._clock.now() if writer.state.buffer.count else None

    def put(self, waiting: Waiting) -> None:
        """Take something that arrived; once the run is over it is left where it is, unacknowledged."""
        if self._over:
            return
        self.accounting.arrived()
        self._line.put(waiting)
        self._work.set()

    def turn_away_behind(self, device: DeviceId, delivery: Delivery, connection: Connection) -> bool:
        """Of each device one update waits: another one is acknowledged, counted and left unread.

        It is not answered, so its device sends it again where the answer to the first one does not do.

        Returns:
            Whether one waits.
        """
        first = self._line.first_of(device)
        # One that came over a lost connection will be answered there, which is nowhere.
        if first is None or first.connection is not connection:
            return False
        self.turn_away(delivery, connection, again=first.delivery.payload == delivery.payload)
        return True

    def turn_away(self, delivery: Delivery, connection: Connection, *, again: bool = False) -> None:
        """Acknowledge and count a message that is left unread; ``again``: the same as one that waits."""
        if self._over:
            return
        self.accounting.arrived()
        self._dropped[DUPLICATE if again else REJECTED + Reason.TOO_MANY] += 1
        connection.acknowledge(delivery)

    async def room(self) -> None:
        """Wait until less than a batch waits: nothing else keeps floods or large updates from piling up."""
        while self._line.is_full and not self._over:
            self._judged.clear()
            await self._judged.wait()

    def tick(self) -> None:
        """Look at the time limit of the buffer, and count durably what was dropped since the last batch."""
        self._count_due = bool(self._dropped)
        if self._flush_due() or self._count_due:
            self._work.set()

    async def reset(
        self, why: str, *, above: ModelVersion | None = None, parameters: Vector | None = None
    ) -> ModelVersion | None:
        """Go on from other parameters, or from the present ones under a number of their own.

        Args:
            why: for people.
            above: what their number must be above, besides the number of the present version.
            parameters: float32, shape ``(schema.size,)``; None: the present ones.

        Returns:
            Their number, once they are durable; None: the run is over.
        """
        if self._finishing:
            return None
        done: asyncio.Future[ModelVersion] = asyncio.get_running_loop().create_future()
        self._resets.append(_Reset(why, above, parameters, done))
        self._work.set()
        return await done

    def finish(self) -> None:
        """Let :meth:`run` end once everything that has arrived is committed."""
        self._finishing = True
        self._work.set()

    async def run(self) -> None:
        """Judge and commit. An exception means: we are broken; nothing uncommitted has left this process."""
        while not self._finishing:
            await self._work.wait()
            self._work.clear()
            await self._drain()
            if self._count_due:
                await self._count_dropped()
            if self._flush_due():
                await self._commit(self._writer.flush())
            await self._do_resets()
            if self._snapshot_due():
                await self._snapshot()
        await self._drain()
        await self._do_resets()
        await self._count_dropped()
        # Nothing is judged from here on. Whoever waited for room must go on taking what the broker brings:
        # its acknowledgements of the last version and of the goodbye are among that.
        self._over = True
        self._judged.set()
        if self._recovered.journal.since_entries:
            await self._snapshot()

    async def _do_resets(self) -> None:
        resets, self._resets = self._resets, []
        for reset in resets:
            state = self._writer.state
            version = ModelVersion(max(state.version, reset.above or 0) + 1)
            parameters = state.parameters if reset.parameters is None else reset.parameters
            await self._commit(self._writer.reset(version, parameters, reset.why))
            log.warning("Version %d begins anew: %s", version, reset.why, extra={"event": "model.reset"})
            if not reset.done.done():
                reset.done.set_result(version)

    async def _drain(self) -> None:
        while self._line:
            part = self._line.next_part()
            began = self._clock.now()
            judged = self._writer.judge([waiting.arrival for waiting in part])
            batch = self._with_dropped(judged.batch)
            reached(Step.UPDATES_FOLDED)
            await self._commit(batch)
            self.accounting.judged(batch.totals)
            self._line.leave(part)
            self._judged.set()
            self.staleness.update(judged.staleness)
            for waiting in part:
                waiting.connection.acknowledge(waiting.delivery)
                reached(Step.UPDATE_ACKNOWLEDGED)
            await self._send_receipts(part, judged.receipts)
            self.pacer.note_batch(len(part), self._clock.now() - began, more=bool(self._line))

    def _with_dropped(self, batch: Batch) -> Batch:
        dropped, self._dropped = self._dropped, Tally()
        return Batch([*batch.records, *(Counted(*fate) for fate in dropped.items())])

    async def _count_dropped(self) -> None:
        if self._dropped:
            batch = self._with_dropped(Batch())
            await self._commit(batch)
            self.accounting.judged(batch.totals)

    async def _snapshot(self) -> None:
        """Make the state after the last committed entry durable; only between batches are the two equal."""
        state = self._writer.state
        await self._journal_thread.run(lambda: self._recovered.journal.snapshot(state))

    def _snapshot_due(self) -> bool:
        journal, bounds = self._recovered.journal, self._settings.journal
        if (
            self._settings.aggregator.needs_base
            and journal.since_versions >= self._settings.publish.keep_versions
        ):
            return True  # the files of versions stay as long as a replay may need them as bases
        return journal.since_entries >= bounds.snapshot_every_updates or journal.since_bytes >= max(
            bounds.snapshot_every_bytes, journal.snapshot_bytes
        )

    async def send_down(self, connection: Connection, device: DeviceId, message: DownMessage) -> None:
        """Send one device a sealed message; a lost one is made up for by the device's next attempt."""
        if isinstance(message, Receipt | MissingChunks):
            message = msgspec.structs.replace(message, epoch=self._epoch)
        topic = topics.DOWN.name(self._settings.fleet, device=device)
        try:
            await connection.publish(topic, seal(message, self._key, DOWN_DOMAIN), qos=topics.DOWN.qos)
        except (LinkDown, PublishRefused) as error:
            log.debug("Not sent to %s: %s", device, error, extra={"event": "down.lost"})

    async def _commit(self, batch: Batch) -> None:
        state = self._writer.state
        await self._journal_thread.run(lambda: self._recovered.journal.commit(batch))
        self._note_buffer()
        before, self.committed = self.committed, state
        if state.version != before.version:
            self._on_version()

    async def _send_receipts(self, part: Sequence[Waiting], receipts: Sequence[Receipt | None]) -> None:
        for waiting, receipt in zip(part, receipts, strict=True):
            if receipt is None:
                continue
            if receipt.reason is not None:
                log.info(
                    "Rejected update %d of %s: %s", receipt.counter, receipt.device, receipt.detail,
                    extra={"event": "update.rejected", "reason": receipt.reason.value},
                )  # fmt: skip
            rest_s = max(receipt.retry_after_s, self.pacer.rest_s(receipt.digest))
            paced = msgspec.structs.replace(receipt, retry_after_s=rest_s)
            await self.send_down(waiting.connection, receipt.device, paced)
            reached(Step.RECEIPT_SENT)

    def _note_buffer(self) -> None:
        if self._writer.state.buffer.count == 0:
            self._buffer_since = None
        elif self._buffer_since is None:
            self._buffer_since = self._clock.now()

    def _flush_due(self) -> bool:
        limit_s, since = self._settings.flush_after_s, self._buffer_since
        return limit_s is not None and since is not None and self._clock.now() - since >= limit_s
