"""The models a device holds: the newest, to train on, and the released one, for inference."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from edge_agent.coordinator_view import SealedHead
from edge_agent.fetch import Fetcher, FetchFailed, Superseded
from edge_agent.mailbox import Mailbox
from edge_agent.model_slots import InstalledModel, ModelSlots, WrongModel
from edge_agent.model_source import HeldModel, ModelSource
from edge_agent.settings import Inference
from fedtide.wire.errors import WireError
from fedtide.wire.link import LinkDown
from fedtide.wire.messages import Head, Release
from fedtide.wire.parameters import Schema, to_bytes
from fedtide.wire.steps import Step, reached

log = logging.getLogger(__name__)

_AFTER_FAILURE_S: Final = 30.0
_CAUSES: Final = (FetchFailed, WrongModel, WireError)


class Models:
    """Fetches, verifies and installs what heads name.

    What is fetched to be trained on, is fetched at once. What is fetched only for inference or evaluation
    waits until ``settings.min_interval_s`` after the last such fetch, so that an idle device does not take
    every version of a busy fleet.

    Args:
        settings: whether and how often the released model is kept.
        slots: the files.
        mailbox: has the connection; it ignores heads older than what was installed.
        fetcher: gets the blobs.
        clock: seconds that only grow.

    Attributes:
        newest: the newest model installed, or None.
        released: the head that names the released model installed, or None.
    """

    def __init__(
        self,
        settings: Inference,
        slots: ModelSlots,
        mailbox: Mailbox,
        fetcher: Fetcher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._slots = slots
        self._mailbox = mailbox
        self._fetcher = fetcher
        self._source = ModelSource(mailbox.connected, fetcher)
        self._clock = clock
        self._idle_fetch_after = 0.0
        self._release_after = 0.0
        slots.take_over()
        self.newest: InstalledModel | None = slots.newest()
        released = slots.released()  # only its head is kept: training needs the memory
        self.released: Head | None = None if released is None else released.head
        if (last := slots.last_head()) is not None:
            mailbox.never_below(last, held=False)  # it was run, even if its file is damaged since
        if self.newest is not None:
            mailbox.never_below(self.newest.head)

    def holds(self, head: Head) -> bool:
        """Whether this model, or a newer one, is installed."""
        return self.newest is not None and head.order <= self.newest.head.order

    def may_fetch_idly(self) -> bool:
        """Whether something may be fetched now that is not to be trained on."""
        return self._clock() >= self._idle_fetch_after

    @property
    def turning_points(self) -> tuple[float, float]:
        """By its clock: from when that may be, and from when a release that failed is tried again."""
        return self._idle_fetch_after, self._release_after

    async def install(self, newest: SealedHead, *, idle: bool = False) -> InstalledModel:
        """The model of this head, fetched if a newer one is not installed already.

        Args:
            newest: the head.
            idle: it is not to be trained on.

        Raises:
            LinkDown, FetchFailed, WrongModel, WireError: it could not be had now.
        """
        head = newest.head
        if self.newest is not None and self.holds(head):
            return self.newest
        if idle:
            self._note_idle_fetch()
        plan_blob = await self._plan_blob(head)
        schema = self._slots.plan(plan_blob, head.plan).manifest.schema
        held = self._held(head)
        if held and self.newest and self.newest.head.parameters_sha256 == head.parameters_sha256:
            parameters = held.parameters  # the coordinator began anew, at the version it had
        else:
            parameters = await self._source.parameters(head, schema, held)
        reached(Step.MODEL_FETCHED)
        self.newest = self._slots.install(newest.sealed, head, plan_blob, to_bytes(parameters))
        reached(Step.MODEL_INSTALLED)
        self._mailbox.never_below(head)
        return self.newest

    def _held(self, head: Head) -> HeldModel | None:
        """What deltas of this head's plan may start from."""
        if self.newest is None or self.newest.head.plan != head.plan:
            return None
        return HeldModel(self.newest.head.version, self.newest.parameters)

    def wants_release(self, head: Head) -> bool:
        """Whether this head names a newer release than the one held, and it may be had now.

        Newer: of a higher version, or named by a later run of the coordinator, whose operator may go back.
        """
        release = head.release
        if release is None or not self._settings.keep or self._clock() < self._release_after:
            return False
        held = self.released and self.released.release
        if self.released and held and (head.epoch, release.version) <= (self.released.epoch, held.version):
            return False
        return self._is_here(release) or self.may_fetch_idly()

    async def keep_release(self, newest: SealedHead) -> None:
        """Install the release that this head names. Trouble with it stops nothing else: it is tried again.

        Raises:
            LinkDown, Superseded: the connection was lost, or a newer head came.
        """
        release = newest.head.release
        if release is None:
            return
        try:
            plan_blob = await self._plan_blob(newest.head)
            schema = self._slots.plan(plan_blob, newest.head.plan).manifest.schema
            content = await self._release_content(newest, release, schema)
            self._slots.install_release(newest.sealed, newest.head, plan_blob, content)
        except Superseded:
            raise
        except _CAUSES as error:
            self._release_after = self._clock() + _AFTER_FAILURE_S
            log.warning("The released version %d could not be installed: %s", release.version, error,
                        extra={"event": "release.failed"})  # fmt: skip
            return
        self.released = newest.head
        log.info("Version %d is installed for inference", release.version,
                 extra={"event": "release.installed"})  # fmt: skip

    async def keep_releases_left_behind(self) -> None:
        """While the coordinator is away, keep what it released last: the broker has it. Until cancelled."""
        while True:
            await self._mailbox.left_alone()
            newest = await self._mailbox.head(self.wants_release, lambda: _AFTER_FAILURE_S)
            try:
                await self.keep_release(newest)
            except (LinkDown, Superseded):
                await asyncio.sleep(0)  # for the mailbox to see it

    def _is_here(self, release: Release) -> bool:
        held = self.released and self.released.release
        return (
            self.newest is not None and self.newest.head.parameters_sha256 == release.parameters_sha256
        ) or (held is not None and held.parameters_sha256 == release.parameters_sha256)

    async def _release_content(self, newest: SealedHead, release: Release, schema: Schema) -> bytes:
        if self.newest is not None and self.newest.head.parameters_sha256 == release.parameters_sha256:
            return to_bytes(self.newest.parameters)
        content = self._slots.content(release.parameters_sha256)
        if content is not None:
            return content
        if release.parameters_sha256 == newest.head.parameters_sha256 and not self.holds(newest.head):
            return to_bytes((await self.install(newest, idle=True)).parameters)
        self._note_idle_fetch()
        return to_bytes(await self._source.keyframe(release.blob, release.version, schema))

    async def _plan_blob(self, head: Head) -> bytes:
        blob = self._slots.plan_blob(head.plan)
        return blob or await self._fetcher.fetch(await self._mailbox.connected(), head.plan_blob)

    def _note_idle_fetch(self) -> None:
        self._idle_fetch_after = self._clock() + self._settings.min_interval_s
