"""Sending updates: from the outbox, in chunks, again and again, until the receipt comes."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

import numpy as np

from edge_agent.mailbox import Mailbox
from edge_agent.outbox import Pending
from edge_agent.settings import AgentSettings
from edge_agent.submission import Submission
from fedtide.wire import topics
from fedtide.wire.chunks import chunk_bytes, update_chunks
from fedtide.wire.envelope import update_digest
from fedtide.wire.link import Connection, LinkDown
from fedtide.wire.messages import MissingChunks, Reason, Receipt, Verdict
from fedtide.wire.steps import Step, reached

_LONGEST_RECEIPT_WAIT_S: Final = 120.0


@dataclass
class Tally:
    """What one agent has done since it started."""

    trained: int = 0
    sent: int = 0
    """Attempts to send an update, repetitions included."""
    resent: int = 0
    applied: int = 0
    duplicate: int = 0
    rejected: int = 0


class Sender:
    """Sends one update at a time.

    Args:
        settings: from ``agent.toml``.
        submission: has the outbox, and is told what came of an update.
        mailbox: has the connection, and the coordinator's answers.
        rng: draws the waits.
        tally: counts what became of them.
    """

    def __init__(
        self,
        settings: AgentSettings,
        submission: Submission,
        mailbox: Mailbox,
        rng: np.random.Generator,
        tally: Tally,
    ) -> None:
        self._settings = settings
        self._submission = submission
        self._outbox = submission.outbox
        self._mailbox = mailbox
        self._rng = rng
        self._tally = tally

    async def deliver(self, pending: Pending) -> float | None:
        """Send an update until its receipt comes; it stays in the outbox until then.

        Returns:
            Seconds that the coordinator asks for before the next update. None: it was never sent and cannot
            be for a long time, so it is left for a newer one to take its place.

        Raises:
            PublishRefused: the broker does not take it.
            OSError: the disk did not take what the receipt says; ``Submission.finish`` does it.
        """
        settings = self._settings
        attempts = count()
        while True:
            # One that carries what earlier ones left out stays: from the same version, what would take its
            # place is the same again, and both together would be twice too much.
            stays = self._outbox.was_sent(pending.counter) or self._submission.has_feedback(pending.counter)
            try:
                connection = await self._mailbox.online(None if stays else settings.training.retrain_after_s)
            except TimeoutError:
                return None
            try:
                receipt = await self._mailbox.turn(connection, pending)
                if receipt is None:
                    receipt = await self._attempt(connection, pending, next(attempts))
            except LinkDown:
                continue
            if receipt is None:
                self._tally.resent += 1
                continue
            if receipt.reason is Reason.UNKNOWN_DEVICE:
                await asyncio.sleep(receipt.retry_after_s)  # until the operator has enrolled this device
                continue
            reached(Step.RECEIPT_TAKEN)
            self._outbox.go_above(receipt.highest)
            self._count(receipt)
            self._submission.settle(pending.counter, receipt.verdict, receipt.reason)
            return receipt.retry_after_s

    async def _attempt(self, connection: Connection, pending: Pending, attempt: int) -> Receipt | None:
        """Publish every chunk and wait for the receipt; None: it is time to try again."""
        device, fleet = self._settings.device, self._settings.fleet
        topic = topics.UPDATE.name(fleet, shard=topics.shard_of(device, self._mailbox.shards), device=device)
        chunks = update_chunks(pending.envelope, pending.counter, chunk_bytes(connection.max_packet_bytes))
        messages = frozenset(map(update_digest, chunks))
        self._outbox.note_sent(pending.counter)
        self._mailbox.forget_answers()
        self._tally.sent += 1
        await _publish(connection, topic, chunks)
        reached(Step.UPDATE_SENT)
        longest_s = min(_LONGEST_RECEIPT_WAIT_S, self._settings.receipt_timeout_s * 2.0 ** min(attempt, 10))
        while True:
            wait_s = longest_s * float(self._rng.uniform(0.75, 1.0))
            answer = await self._mailbox.answer(pending, connection, wait_s, messages)
            if not isinstance(answer, MissingChunks):
                return answer
            await _publish(connection, topic, [chunks[i] for i in answer.indexes if 0 <= i < len(chunks)])

    def _count(self, receipt: Receipt) -> None:
        match receipt.verdict:
            case Verdict.APPLIED:
                self._tally.applied += 1
            case Verdict.DUPLICATE:
                self._tally.duplicate += 1
            case Verdict.REJECTED:
                self._tally.rejected += 1


async def _publish(connection: Connection, topic: str, chunks: Sequence[bytes]) -> None:
    async def one(chunk: bytes) -> None:
        await connection.publish(topic, chunk)
        reached(Step.CHUNK_SENT)

    await asyncio.gather(*map(one, chunks))
