"""Publishing: which version is offered when. What an offer consists of, is the publisher's part."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from coordinator.closed_loop import Version
from coordinator.committer import Committer, JournalThread
from coordinator.journal import Journal
from coordinator.published_versions import PublishedVersions
from coordinator.publisher import Publisher
from coordinator.settings import Publish
from coordinator.writer import Writer
from fedtide.wire.clock import Clock
from fedtide.wire.link import Connection, LinkDown, PublishRefused

log = logging.getLogger(__name__)

_AGAIN_EVERY_S: Final = 2.0
_QUIET_S: Final = 60.0
_LONGEST_QUIET_S: Final = 3600.0


class Publishing:
    """Makes the versions that are due and has them offered.

    Args:
        settings: the pace.
        committer: has the committed model.
        writer: is told which versions updates may start from.
        versions: makes versions and their files.
        publisher: offers them.
        journal: knows since when versions count.
        journal_thread: where files are written.
        connection: the live one, or None.
        clock: tells the time.
    """

    def __init__(
        self,
        settings: Publish,
        *,
        committer: Committer,
        writer: Writer,
        versions: PublishedVersions,
        publisher: Publisher,
        journal: Journal,
        journal_thread: JournalThread,
        connection: Callable[[], Connection | None],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._committer = committer
        self._writer = writer
        self._versions = versions
        self._publisher = publisher
        self._journal = journal
        self._journal_thread = journal_thread
        self._connection = connection
        self._clock = clock
        self._news = asyncio.Event()
        self._publishing = asyncio.Lock()  # the last version may come while the one before is on its way
        self._published_at = self._tried_at = float("-inf")
        self._received = 0
        self._quiet_since, self._quiet_s = clock.now(), _QUIET_S

    def wake(self) -> None:
        """There may be something to publish."""
        self._news.set()

    async def run(self) -> None:
        """Publish what is due, at its pace, for ever."""
        pace = self._settings
        while True:
            await self._news.wait()
            self._news.clear()
            await asyncio.sleep(self._published_at + pace.min_interval_s - self._clock.now())
            await self.publish_newest(pace.every_versions)

    async def publish_newest(self, every_versions: int = 1) -> None:
        """Publish the committed version, if it is so many versions newer than the last one."""
        async with self._publishing:
            await self._make_and_publish(every_versions)

    async def tick(self) -> None:
        """Issue the head anew when it is time, and publish again what the broker did not take."""
        connection, publisher = self._connection(), self._publisher
        # A clock that was set back counts too.
        age_s = abs(self._clock.wall() - publisher.issued)
        old, quiet = age_s > self._settings.head_lifetime_s / 2, self._has_been_quiet()
        if connection and publisher.version and (old or quiet):
            with contextlib.suppress(LinkDown, PublishRefused):
                await publisher.renew(connection, everything=quiet)
        if publisher.has_news and self._clock.now() - self._tried_at >= _AGAIN_EVERY_S:
            self.wake()

    async def remember(self, version: Version) -> None:
        """Make a version's file and fingerprint durable before any device sees it."""
        keep, published = self._settings.keep_versions, self._writer.published
        for old in sorted({*published, version.number})[:-keep]:
            published.pop(old, None)  # before its file goes, which an update based on it would need
        await self._journal_thread.run(lambda: self._versions.save(version))
        if version.number >= self._writer.line_since:  # else the model was reset meanwhile
            published[version.number] = version.fingerprint

    def _has_been_quiet(self) -> bool:
        """Whether no update has come for so long that the broker may have lost or damaged what it retains.

        A head that a living broker lost would stop every device, and nobody would say so. An idle fleet pays
        for this with a head an hour in the end.
        """
        received, now = self._committer.accounting.received, self._clock.now()
        if received != self._received or not self._publisher.training:
            self._received, self._quiet_since, self._quiet_s = received, now, _QUIET_S
        if now - self._quiet_since < self._quiet_s:
            return False
        self._quiet_since, self._quiet_s = now, min(2 * self._quiet_s, _LONGEST_QUIET_S)
        return True

    async def _make_and_publish(self, every_versions: int) -> None:
        connection, state = self._connection(), self._committer.committed
        newest = self._publisher.version
        due = (
            newest is None
            or state.version - newest.number >= every_versions
            or newest.number < self._journal.ledger.line_since <= state.version
        )
        if connection is None or not (due or self._publisher.has_news):
            return
        self._published_at = self._tried_at = self._clock.now()
        try:
            if due:
                # Not in the journal's thread: the commits of updates would wait for it.
                version = await asyncio.to_thread(self._versions.make, state.version, state.parameters)
                await self._publisher.publish(connection, version)
            else:
                await self._publisher.renew(connection, everything=False)
        except (LinkDown, PublishRefused) as error:
            log.warning("Publishing stopped: %s", error, extra={"event": "publish.interrupted"})
