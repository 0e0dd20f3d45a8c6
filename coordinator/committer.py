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

from coordinator.accounting import Accounting
from coordinator.intake import Arrived, Refused
from coordinator.journal import Batch
from coordinator.recovery import Recovered
from coordinator.settings import CoordinatorSettings
from coordinator.writer import Writer
from fedtide.wire import topics
from fedtide.wire.clock import Clock
from fedtide.wire.ids import DeviceId
from fedtide.wire.link import Connection, Delivery, LinkDown, PublishRefused
from fedtide.wire.messages import DownMessage, Receipt
from fedtide.wire.seal import seal
from fedtide.wire.signatures import DOWN_DOMAIN, SigningKey

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Waiting:
    """Something that arrived and waits to be judged."""

    arrival: Arrived | Refused
    delivery: Delivery
    connection: Connection


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
        sequence: number of the last committed entry.
        committed: the model after that entry; what others may see of it. Its buffer is spent.
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
        on_version: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._writer = writer
        self._recovered = recovered
        self._journal_thread = journal_thread
        self._key = key
        self._clock = clock
        self._on_version = on_version
        self.accounting = Accounting.from_totals(recovered.journal.totals())
        self.staleness: Tally[int] = Tally()
        self.sequence = recovered.sequence
        self._snapshot_sequence = recovered.sequence - recovered.replayed
        self.committed = writer.state
        self._waiting: list[Waiting] = []
        self._work = asyncio.Event()
        self._judged = asyncio.Event()
        self._finishing = False
        self._buffer_since = self._clock.now() if writer.state.buffer.count else None

    def put(self, waiting: Waiting) -> None:
        """Take something that arrived."""
        self.accounting.arrived()
        self._waiting.append(waiting)
        self._work.set()

    async def room(self) -> None:
        """Wait until less than a batch waits: at QoS 0 nothing else keeps a flood from piling up here."""
        while len(self._waiting) >= self._settings.journal.max_batch:
            self._judged.clear()
            await self._judged.wait()

    def tick(self) -> None:
        """Look at the time limit of the buffer."""
        if self._flush_due():
            self._work.set()

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
            if self._flush_due():
                await self._commit(self._writer.flush())
            if self.sequence - self._snapshot_sequence >= self._settings.journal.snapshot_every_updates:
                await self._snapshot()
        await self._drain()
        await self._snapshot()

    async def _drain(self) -> None:
        while self._waiting:
            part = self._waiting[: self._settings.journal.max_batch]
            del self._waiting[: len(part)]
            judged = self._writer.judge([waiting.arrival for waiting in part])
            await self._commit(judged.batch)
            self.accounting.judged(judged.batch.totals)
            self._judged.set()
            self.staleness.update(judged.staleness)
            for waiting in part:
                waiting.connection.acknowledge(waiting.delivery)
            await self._send_receipts(part, judged.receipts)

    async def _snapshot(self) -> None:
        """Make the state after the last committed entry durable; only between batches are the two equal."""
        sequence, state = self.sequence, self._writer.state
        await self._journal_thread.run(lambda: self._recovered.snapshots.save(sequence, state))
        self._snapshot_sequence = sequence

    async def send_down(self, connection: Connection, device: DeviceId, message: DownMessage) -> None:
        """Send one device a sealed message; a lost one is made up for by the device's next attempt."""
        topic = topics.DOWN.name(self._settings.fleet, device=device)
        try:
            await connection.publish(topic, seal(message, self._key, DOWN_DOMAIN))
        except (LinkDown, PublishRefused) as error:
            log.debug("Not sent to %s: %s", device, error, extra={"event": "down.lost"})

    async def _commit(self, batch: Batch) -> None:
        state = self._writer.state
        await self._journal_thread.run(lambda: self._recovered.journal.commit(batch))
        self.sequence += len(batch.entries)
        self._note_buffer()
        before, self.committed = self.committed, state
        if state.version != before.version:
            self._on_version()

    async def _send_receipts(self, part: Sequence[Waiting], receipts: Sequence[Receipt | None]) -> None:
        sends = []
        for waiting, receipt in zip(part, receipts, strict=True):
            if receipt is None:
                continue
            if receipt.reason is not None:
                log.info(
                    "Rejected update %d of %s: %s", receipt.counter, receipt.device, receipt.detail,
                    extra={"event": "update.rejected", "reason": receipt.reason.value},
                )  # fmt: skip
            sends.append(self.send_down(waiting.connection, receipt.device, receipt))
        await asyncio.gather(*sends)

    def _note_buffer(self) -> None:
        if self._writer.state.buffer.count == 0:
            self._buffer_since = None
        elif self._buffer_since is None:
            self._buffer_since = self._clock.now()

    def _flush_due(self) -> bool:
        limit_s, since = self._settings.flush_after_s, self._buffer_since
        return limit_s is not None and since is not None and self._clock.now() - since >= limit_s
