"""What the coordinator says to everybody: its state and its heads, the newest of each, and what is believed.

Every run of a coordinator has a higher epoch than the one before it. Two that run by mistake, on one
directory and a copy of it, are told apart by that: what comes from a lower epoch than was heard of, is
ignored. The highest is remembered over restarts by the head that each installed model keeps.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fedtide.wire import frame
from fedtide.wire.errors import UnsupportedVersion, WireError
from fedtide.wire.ids import Epoch, FleetId, ModelVersion
from fedtide.wire.messages import CoordinatorState, Head
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import COORDINATOR_DOMAIN, HEAD_DOMAIN, PublicKey

log = logging.getLogger(__name__)

_UNREAD_HEADS: Final = 4  # more than one, so that a forgery does not push a real head out
_NOT_SAID: Final = Epoch(0)  # of builds that did not


@dataclass(frozen=True)
class SealedHead:
    """A head with the bytes it was signed as."""

    head: Head
    sealed: bytes


class CoordinatorView:
    """The coordinator as one device knows it.

    Args:
        fleet: the device's fleet.
        key: the coordinator's, pinned.
        wall: seconds since 1970, as far as the device knows.

    Attributes:
        epoch: the highest that a signed message named.
        state: the newest one heard, or None.
        unsupported: why this build and the coordinator's do not understand each other, if they do not.
    """

    def __init__(self, fleet: FleetId, key: PublicKey, wall: Callable[[], float]) -> None:
        self._fleet = fleet
        self._key = key
        self._wall = wall
        self.epoch = _NOT_SAID
        self.state: CoordinatorState | None = None
        self.unsupported: UnsupportedVersion | None = None
        self._head: SealedHead | None = None
        self._unread_heads: deque[bytes] = deque(maxlen=_UNREAD_HEADS)
        self._floor: tuple[Epoch, ModelVersion] = (_NOT_SAID, ModelVersion(0))
        self._told_expired = False

    @property
    def away(self) -> bool:
        """Whether the coordinator is known not to listen, or to be unable to read what this build sends."""
        return self.unsupported is not None or (self.state is not None and not self.state.online)

    @property
    def shards(self) -> int:
        """Number of ingest shards."""
        return max(1, self.state.shards) if self.state is not None else 1

    def believes(self, epoch: Epoch) -> bool:
        """Whether a signed message of this epoch counts: no later run of the coordinator was heard of."""
        if epoch != _NOT_SAID and epoch < self.epoch:
            return False
        self.epoch = max(self.epoch, epoch)
        return True

    def hear_state(self, sealed: bytes) -> None:
        """Take a message of the ``coord`` topic.

        Raises:
            WireError: it cannot be read, or is not the coordinator's.
        """
        try:
            state = unseal(sealed, CoordinatorState, self._key, COORDINATOR_DOMAIN)
        except UnsupportedVersion as error:
            self.unsupported = error
            raise
        if not self.believes(state.epoch):
            log.warning(
                "Ignored the state of a coordinator of epoch %d: epoch %d has begun", state.epoch, self.epoch,
                extra={"event": "coordinator.fenced"},
            )  # fmt: skip
            return
        self.state, ours = state, frame.PROTOCOL_VERSION
        fits = state.protocol_min <= ours <= state.protocol_max
        theirs = tuple(sorted({state.protocol_min, state.protocol_max}))
        self.unsupported = None if fits else UnsupportedVersion(ours, theirs)

    def never_below(self, head: Head) -> None:
        """From here on older heads are ignored: this model has been run."""
        self._floor = max(self._floor, head.order)
        self.believes(head.epoch)

    def hear_head(self, sealed: bytes) -> None:
        """Take a message of the ``model/head`` topic; it is unsealed when somebody asks."""
        self._unread_heads.append(sealed)

    @property
    def has_unread_heads(self) -> bool:
        """Whether :meth:`newest_head` may give another head than before."""
        return bool(self._unread_heads)

    def newest_head(self) -> SealedHead | None:
        """Unsealed when it is asked for: while a device trains, heads may pass it by."""
        unread = list(self._unread_heads)
        self._unread_heads.clear()
        for sealed in unread:  # all of them: the last to come is not always the newest
            try:
                head = unseal(sealed, Head, self._key, HEAD_DOMAIN)
            except WireError as error:
                log.warning("Ignored a head: %s", error, extra={"event": "head.ignored"})
                continue
            if self._accepts(head):
                self.believes(head.epoch)
                self._head = SealedHead(head, sealed)
        return self._head

    def _accepts(self, head: Head) -> bool:
        newest = max(self._floor, self._head.head.order) if self._head else self._floor
        if head.fleet != self._fleet or head.order < newest or head.version < self._floor[1]:
            log.warning(
                "Ignored the head of version %d, epoch %d: older than what this device has run",
                head.version, head.epoch, extra={"event": "head.older"},
            )  # fmt: skip
            return False
        self._look_at_expiry(head)
        return True

    def _look_at_expiry(self, head: Head) -> None:
        """Tell once: a device whose clock is years ahead would otherwise tell it of every head."""
        expired = self._wall() > head.expires
        if expired and not self._told_expired:
            log.warning(
                "The head of version %d has expired: the coordinator is away, or the clock here is ahead",
                head.version, extra={"event": "head.expired"},
            )  # fmt: skip
        self._told_expired = expired
