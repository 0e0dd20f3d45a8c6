"""What a device tells of its work on its ``ev`` topic: the newest of each kind, now and then."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from edge_agent.mailbox import Mailbox
from fedtide.wire import frame, topics
from fedtide.wire.ids import DeviceId, FleetId, ModelVersion
from fedtide.wire.link import LinkDown, PublishRefused
from fedtide.wire.messages import EvaluationEvent, TrainingEvent, Trouble

log = logging.getLogger(__name__)

_EVERY_S: Final = 5.0  # every update carries its loss anyway; a fast device need not say it twice
_SAME_TROUBLE_EVERY_S: Final = 300.0  # a coordinator that started since has not heard of it
_MOST_DETAIL: Final = 200

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

    async def run(self) -> None:
        """Send what is told, until cancelled."""
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

    def _due(self, kind: type[Report]) -> float:
        return self._not_before.get(kind, 0.0)

    async def _news_within(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._news.wait()
        except TimeoutError:
            pass


def trouble(event: str, error: Exception, version: ModelVersion | None) -> Trouble:
    """A report of what went wrong, its text short enough for a table."""
    return Trouble(event=event, detail=str(error)[:_MOST_DETAIL], version=version)
