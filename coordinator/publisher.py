"""The publisher: makes a version available, and only then points at it.

Order: the model file and its fingerprint are durable, every chunk is acknowledged by the broker, then the
signed head. What is on the broker, and when it is cleared, is the shelf's part.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from coordinator.closed_loop import Version
from coordinator.model_blobs import BlobMaker, VersionBlobs
from coordinator.model_deltas import Catalogue, Published
from coordinator.settings import CoordinatorSettings
from coordinator.shelf import Shelf
from fedtide.wire.chunks import blob_ref, chunk_bytes
from fedtide.wire.frame import PROTOCOL_VERSION
from fedtide.wire.ids import Epoch, PlanId
from fedtide.wire.link import Connection
from fedtide.wire.messages import BlobRef, CoordinatorState, Head, ModelDelta, Release
from fedtide.wire.seal import seal
from fedtide.wire.signatures import COORDINATOR_DOMAIN, HEAD_DOMAIN, SigningKey
from fedtide.wire.steps import Step, reached
from fedtide.wire.topics import COORDINATOR, HEAD


@dataclass(frozen=True)
class Released:
    """A version for inference, and the gate that it passed, for people."""

    version: Version
    gate: str


@dataclass(frozen=True)
class Identity:
    """Who publishes: fixed for one run of the coordinator."""

    epoch: Epoch
    run: str
    plan: PlanId
    plan_blob: bytes
    key: SigningKey


@dataclass(frozen=True)
class _Offer:
    """What a head names, and the contents of it."""

    plan: BlobRef
    model: Published
    keyframe: BlobRef
    release: Release | None
    contents: dict[BlobRef, bytes]


class Publisher:
    """Publishes the head and its blobs on whatever connection there is.

    Args:
        settings: the coordinator's.
        identity: who publishes.
        remember: makes a version's file and fingerprint durable; awaited before the version is offered.
        clock: seconds since 1970.
        maker: encodes versions.
        shelf: has the blobs on the broker.
        parent: fingerprint of the version that an earlier run published last.
        released: the version that passed the release gate last, in an earlier run.
        on_version: called when a version is durable, before it is sent.

    Attributes:
        version: the last one offered.
        released: the one for inference, where there is a gate. Without a gate it is the one offered.
        training: whether devices shall train.
        online: whether the coordinator said last that it is there.
        issued: when the last head was made, seconds since 1970.
        spread_s: what the coordinator's state asks of devices that come back together.
        keyframe_bytes: of the last version offered.
        delta_bytes: of the delta to it from the version before; None where there is none.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        identity: Identity,
        remember: Callable[[Version], Awaitable[None]],
        clock: Callable[[], float],
        *,
        maker: BlobMaker,
        shelf: Shelf,
        parent: bytes = bytes(32),
        released: Released | None = None,
        on_version: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._remember = remember
        self._clock = clock
        self._maker = maker
        self._shelf = shelf
        self._catalogue = Catalogue()
        self._parent = parent
        self._on_version = on_version
        self._offering = asyncio.Lock()  # one at a time, or an older head could be the last to arrive
        self._anew = True
        self._blobs: VersionBlobs | None = None
        self._release_keyframe: tuple[Released, bytes] | None = None
        self.version: Version | None = None
        self.training = True
        self.online = False
        self.released = released
        self._announced: Version | None = None
        self._announced_release: Released | None = None
        self.issued = 0.0
        self.spread_s = 0.0
        self.keyframe_bytes: int | None = None
        self.delta_bytes: int | None = None

    @property
    def has_news(self) -> bool:
        """Whether no head has named the version, or the released version, yet."""
        return self.version is not self._announced or self.released is not self._announced_release

    def state_message(self, *, online: bool) -> bytes:
        """The sealed coordinator state, also used as the will."""
        state = CoordinatorState(
            fleet=self._settings.fleet,
            epoch=self._identity.epoch,
            run=self._identity.run,
            online=online,
            protocol_min=PROTOCOL_VERSION,
            protocol_max=PROTOCOL_VERSION,
            spread_s=self.spread_s,
        )
        return seal(state, self._identity.key, COORDINATOR_DOMAIN)

    async def announce(self, connection: Connection, *, online: bool) -> None:
        """Say whether the coordinator is there."""
        self.online = online
        topic = COORDINATOR.name(self._settings.fleet)
        await connection.publish(topic, self.state_message(online=online), retain=True)

    async def renew(self, connection: Connection, *, everything: bool) -> None:
        """Publish the head again; with ``everything``, its blobs too: the broker forgot them.

        Raises:
            LinkDown: the connection was lost; the next one renews.
        """
        async with self._offering:
            if everything:
                self._forget()
            if self.version is not None:
                await self._offer(connection, self.version)

    async def publish(self, connection: Connection, version: Version) -> None:
        """Offer a new version; one that is older than the last is left.

        Raises:
            LinkDown: the connection was lost; the next one renews.
        """
        async with self._offering:
            if self.version is not None and version.number < self.version.number:
                return
            await self._remember(version)
            if self.version is not None and version.number > self.version.number:
                self._parent = self.version.fingerprint
            self.version = version
            self._on_version()
            await self._offer(connection, version)

    def _forget(self) -> None:
        """Deltas of earlier versions are left out from here on; they could not be sent again."""
        self._shelf.forget()
        self._catalogue.clear()
        if not self._anew:  # else what is encoded already is right: the connection before this was lost early
            self._anew, self._blobs = True, None

    async def _offer(self, connection: Connection, version: Version) -> None:
        released = self.released
        offer = await self._assembled(version, released, connection.max_packet_bytes)
        await self._shelf.put(connection, offer.contents)
        reached(Step.BLOBS_PUBLISHED)
        head = self._head(version, offer)
        sealed = seal(head, self._identity.key, HEAD_DOMAIN)
        await connection.publish(HEAD.name(self._settings.fleet), sealed, retain=True)
        reached(Step.HEAD_PUBLISHED)
        self.issued, self._announced, self._announced_release = head.issued, version, released
        self._catalogue.add(offer.model)
        self._anew = False
        self.keyframe_bytes = offer.keyframe.size_bytes
        self.delta_bytes = next((delta.blob.size_bytes for delta in head.deltas), None)
        named = [*offer.contents, *self._catalogue.blobs()]
        await self._shelf.keep_only(connection, version.number, named)

    async def _assembled(
        self, version: Version, released: Released | None, max_packet_bytes: int | None
    ) -> _Offer:
        size_bytes = chunk_bytes(max_packet_bytes, self._settings.chunk_bytes)
        contents: dict[BlobRef, bytes] = {}

        def named(content: bytes) -> BlobRef:
            ref = blob_ref(content, size_bytes)
            contents[ref] = content
            return ref

        blobs = await self._encoded(version)
        plan, keyframe = named(self._identity.plan_blob), named(blobs.keyframe)
        deltas = tuple(ModelDelta(start, version.number, named(delta)) for start, delta in blobs.deltas)
        model = Published(version.place.sequence, version.number, deltas)
        index = self._catalogue.index(model, size_bytes)
        if index is not None:
            model = Published(model.sequence, model.version, deltas, named(index))
        release: Release | None = None
        if released is not None:
            blob = named(await self._released_keyframe(released))
            release = _release(released.version, blob, released.gate)
        elif self._settings.release is None:  # without a gate, what is offered is for inference too
            release = _release(version, keyframe, "")
        return _Offer(plan, model, keyframe, release, contents)

    async def _encoded(self, version: Version) -> VersionBlobs:
        if self._blobs is None or self._blobs.version is not version:
            anew = self._anew
            self._blobs = await asyncio.to_thread(lambda: self._maker.blobs(version, anew=anew))
        return self._blobs

    async def _released_keyframe(self, released: Released) -> bytes:
        if self._release_keyframe is None or self._release_keyframe[0] is not released:
            keyframe = await asyncio.to_thread(lambda: self._maker.keyframe(released.version))
            self._release_keyframe = (released, keyframe)
        return self._release_keyframe[1]

    def _head(self, version: Version, offer: _Offer) -> Head:
        now = self._clock()
        return Head(
            fleet=self._settings.fleet,
            epoch=self._identity.epoch,
            version=version.number,
            parent_sha256=self._parent,
            plan=self._identity.plan,
            parameters_sha256=version.fingerprint,
            plan_blob=offer.plan,
            full_blob=offer.keyframe,
            deltas=offer.model.deltas[:1],
            delta_index=offer.model.index,
            update_codec=self._settings.update.request_at(version.number),
            training=self.training,
            release=offer.release,
            issued=now,
            expires=now + self._settings.publish.head_lifetime_s,
        )


def _release(version: Version, blob: BlobRef, gate: str) -> Release:
    return Release(version=version.number, parameters_sha256=version.fingerprint, blob=blob, gate=gate)
