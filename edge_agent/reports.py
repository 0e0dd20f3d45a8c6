"""What a device tells of its work on its ``ev`` topic: the newest of each kind, now and then."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from edge_agent.mailbox import Mailbox
from edge_agent.troubles import event_of, trouble
from fedtide.wire import frame, topics
from fedtide.wire.ids import DeviceId, FleetId
from fedtide.wire.link import LinkDown, PublishRefused
from fedtide.wire.messages import EvaluationEvent, TrainingEvent, Trouble

log = logging.getLogger(__name__)

_EVERY_S: Final = 5.0  # every update carries its loss anyway; a fast device need not say it twice
_SAME_TROUBLE_EVERY_S: Final = 300.0  # a coordinator that started since has not heard of it

Report: TypeAlias = TrainingEvent | EvaluationEvent | Trouble


class Reports:
    """Sends reports while there is a connection. Of each kind the newest waits; older ones are not sent.

    Args:
        fleet: the device's fleet.
        device: the device.
        mailbox: has the connection.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        fleet: FleetId,
        device: DeviceId,
        mailbox: Mailbox,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._topic = topics.EVENT.name(fleet, device=device)
        self._mailbox = mailbox
        self._clock = clock
        self._waiting: dict[type[Report], Report] = {}
        self._not_before: dict[type[Report], float] = {}
        self._trouble: Trouble | None = None
        self._trouble_again = 0.0
        self._damage: Trouble | None = None
        self._news = asyncio.Event()

    def tell(self, report: TrainingEvent | EvaluationEvent) -> None:
        """Send this as soon as its kind may be sent again. A training ends what trouble there was."""
        self._waiting[type(report)] = report
        if isinstance(report, TrainingEvent):
            self._waiting.pop(Trouble, None)
            self._trouble = None
        self._news.set()

    def tell_trouble(self, trouble: Trouble) -> None:
        """Send this if it is other trouble than the last, or that was told minutes ago."""
        now = self._clock()
        same = self._trouble is not None and self._trouble.event == trouble.event
        if same and self._trouble.detail == trouble.detail and now < self._trouble_again:  # type: ignore[union-attr]
            return
        self._trouble, self._trouble_again = trouble, now + _SAME_TROUBLE_EVERY_S
        self._waiting[Trouble] = trouble
        self._waiting.pop(TrainingEvent, None)  # it would end this trouble, which came later
        self._news.set()

    def tell_of_damage(self, files: Sequence[Path]) -> None:
        """Tell once, before anything else, that files were damaged at the start. No training ends that."""
        if files:
            names = ", ".join(file.name for file in files)
            detail = f"damaged on disk: {names} in {files[0].parent}; if this comes again, replace the disk"
            self._damage = trouble("outbox.damaged", OSError(detail), None)

    async def tell_of_protocol(self) -> None:
        """Tell of a coordinator that does not speak this build's protocol, until cancelled."""
        while True:
            error = await self._mailbox.not_understood()
            log.error("Nothing is sent to this coordinator: %s", error, extra={"event": event_of(error)})
            self.tell_trouble(trouble(event_of(error), error, None))
            await self._mailbox.understood()

    async def run(self) -> None:
        """Send what is told, until cancelled."""
        if self._damage is not None:
            await self._send_surely(self._damage)
        while True:
            if not self._waiting:
                self._news.clear()
                await self._news.wait()
            connection = await self._mailbox.connected()
            kind = min(self._waiting, key=self._due)
            wait_s = self._due(kind) - self._clock()
            if wait_s > 0:
                self._news.clear()
                await self._news_within(wait_s)
                continue
            report = self._waiting.pop(kind)
            self._not_before[kind] = self._clock() + _EVERY_S
            try:
                await connection.publish(self._topic, frame.to_frame(report), qos=topics.EVENT.qos)
            except (LinkDown, PublishRefused) as error:
                log.debug("A report was lost: %s", error)

    async def _send_surely(self, report: Report) -> None:
        while True:
            connection = await self._mailbox.connected()
            try:
                await connection.publish(self._topic, frame.to_frame(report), qos=topics.EVENT.qos)
            except PublishRefused:
                return
            except LinkDown:
                await asyncio.sleep(0)  # for the mailbox to see that, and dial
            else:
                return

    def _due(self, kind: type[Report]) -> float:
        return self._not_before.get(kind, 0.0)

    async def _news_within(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._news.wait()
        except TimeoutError:
            pass
