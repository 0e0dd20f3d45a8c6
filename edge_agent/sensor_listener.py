"""Listening to sensors: a connection of its own beside the agent's, whose windows go into the ring on disk.

It dials by the same rules as the agent. What is wrong with a message is counted and told now and then, never
fatal; a disk that takes nothing costs the windows, not the agent.
"""

import asyncio
import logging
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.readings import Sampler, Sampling, topic_filters
from edge_agent.window_ring import Layout, WindowRing
from edge_agent.windows import Floats
from fedtide.wire.disk import OS_DISK, Disk
from fedtide.wire.link import Broker, Connection, Dial, LinkDown, Reconnector, Session

log = logging.getLogger(__name__)

_RECEIVE_MAXIMUM: Final = 16
_MOST_WAITING: Final = 4096  # windows in memory until the next write; the newest are kept


@dataclass(frozen=True)
class Listening:
    """What is listened to and where it goes.

    Attributes:
        sampling: how readings become windows.
        broker: where the sensors publish.
        client_id: MQTT's client identifier, another than the agent's own.
        ring: the directory of the ring.
        layout: of its windows.
        max_bytes: of the ring on disk.
        flush_s: seconds between writes.
    """

    sampling: Sampling
    broker: Broker
    client_id: str
    ring: Path
    layout: Layout
    max_bytes: int
    flush_s: float


class SensorListener:
    """Listens until cancelled.

    Args:
        listening: to what.
        dial: makes connections to ``listening.broker``.
        rng: draws the waits between connections.
        disk: where the ring is.

    Attributes:
        listening: what it was made with.
        connected: set while it listens.
    """

    def __init__(
        self, listening: Listening, dial: Dial, rng: np.random.Generator, disk: Disk = OS_DISK
    ) -> None:
        self.listening = listening
        self._sampler = Sampler(listening.sampling)
        self._reconnector = Reconnector(dial, listening.broker, rng, self._log_failure)
        self._disk = disk
        self._ring: WindowRing | None = None
        self._waiting: list[Floats] = []
        self._writing = threading.Lock()  # whoever is cancelled does not wait for the thread that writes
        self._told = 0
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """Listen, sample and write; what is not yet on disk is written at the end."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(), name="sensor.listen")
                group.create_task(self._sample(), name="sensor.sample")
                group.create_task(self._write(), name="sensor.write")
        finally:
            self._append(self._take_waiting())

    async def _listen(self) -> None:
        session = Session(
            client_id=self.listening.client_id,
            clean_start=True,
            expiry_s=0,
            receive_maximum=_RECEIVE_MAXIMUM,
            will=None,
        )
        while True:
            connection = await self._reconnector.connect(session)
            try:
                await self._hear(connection)
            except LinkDown as lost:
                log.warning("Sensors' broker: %s", lost, extra={"event": "sensor.link_down"})
            finally:
                self.connected.clear()
                connection.abort()
            await self._reconnector.pause()

    async def _hear(self, connection: Connection) -> None:
        # At most once: a reading that is lost is followed by the next, and memory stays bounded.
        await connection.subscribe(topic_filters(self.listening.sampling.channels), qos=0)
        log.info("Listening to sensors", extra={"event": "sensor.link_up"})
        self.connected.set()
        async for delivery in connection.deliveries():
            connection.acknowledge(delivery)
            self._keep(
                self._sampler.take(
                    delivery.topic, delivery.payload, time.monotonic(), retained=delivery.retained
                )
            )
            self._tell()

    async def _sample(self) -> None:
        """Take the rows that are due; messages alone do not tell the time."""
        while math.isfinite(wait_s := self._sampler.next_row(time.monotonic())):
            await asyncio.sleep(wait_s)
            self._keep(self._sampler.tick(time.monotonic()))

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(self.listening.flush_s)
            await asyncio.to_thread(self._append, self._take_waiting())

    def _keep(self, windows: list[Floats]) -> None:
        self._waiting += windows
        del self._waiting[:-_MOST_WAITING]

    def _take_waiting(self) -> list[Floats]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def _append(self, windows: list[Floats]) -> None:
        if not windows:
            return
        listening = self.listening
        with self._writing:
            try:
                if self._ring is None:
                    self._ring = WindowRing(listening.ring, listening.layout, listening.max_bytes, self._disk)
                self._ring.append(np.stack(windows).reshape(len(windows), listening.layout.values))
            except OSError as error:
                self._ring = None  # the next one looks at what is there
                log.error(  # noqa: TRY400 - the text says all; a trace of ours would not help
                    "%d windows are lost, the disk did not take them: %s", len(windows), error,
                    extra={"event": "sensor.not_written"},
                )  # fmt: skip

    def _tell(self) -> None:
        """Log bad messages when there is the first, and whenever there are ten times as many."""
        count = sum(skip.count for skip in self._sampler.bad.skipped)
        if count >= max(1, 10 * self._told):
            self._told = count
            log.warning(
                "Skipped %d readings: %s", count, "; ".join(map(str, self._sampler.bad.skipped)),
                extra={"event": "sensor.skipped"},
            )  # fmt: skip

    def _log_failure(self, error: LinkDown, wait_s: float) -> None:
        log.warning("Sensors: %s; next attempt in %.1f s", error, wait_s, extra={"event": "sensor.retry"})
