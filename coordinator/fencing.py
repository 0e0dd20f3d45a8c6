"""Fencing: of two coordinators that were started for one fleet by mistake, one goes on. Pure.

The lock in its directory keeps a second coordinator out. One that runs on a copy of the directory has the
same key, the same journal and no lock to stop it. What tells them apart is the claim each run makes: its
epoch, one above the last in its journal, and a run id that it draws. The signed state on the ``coord`` topic
holds both, and every run listens there:

- A new run looks first, over a connection of its own. Another that claims the same epoch, or a higher one,
  was there before it, and devices may have receipts from that: the new run ends and has disturbed nothing.
- On the connection that takes updates, none is looked at until the run's own state has come back: what
  another run had said there by then has been heard. The greater claim, by epoch and then by run id, goes on;
  the other run ends, before it acknowledges or receipts anything more. Its client identifier is the same, so
  there is never a connection of both, and what each finds on the topic is the last word of the other.
- A run that ended so leaves a note in its directory, and starts there end at once until a person decides that
  this directory is the one to go on with. Else what starts ended services again would have them take turns.

What holds: within one connection's time one run is left, whose receipts are all true: what it receipted is in
its journal. Devices believe no receipt of a lower epoch than they have heard of, and send such updates again.

What cannot hold: a copied journal forks history. What a run receipted after its directory was copied is in
its own journal and in no other. A run on the copy that then claims a higher epoch (the copy was taken while
that run was going) goes on without it, as does one that a person lets take over. Where two brokers do not
know of each other, nor do the coordinators at them.
"""

from dataclasses import dataclass
from enum import Enum, auto

from fedtide.wire.errors import WireError
from fedtide.wire.ids import Epoch, FleetId
from fedtide.wire.messages import CoordinatorState
from fedtide.wire.seal import unseal
from fedtide.wire.signatures import COORDINATOR_DOMAIN, PublicKey


@dataclass(frozen=True, order=True)
class Claim:
    """What a run says of itself; the greater one goes on.

    Attributes:
        epoch: claimed in its journal.
        run: drawn by it.
    """

    epoch: Epoch
    run: str


class Fenced(Exception):
    """Another run of this coordinator has the fleet.

    Attributes:
        rival: its claim.
    """

    def __init__(self, rival: Claim, own: Epoch) -> None:
        super().__init__(
            f"another coordinator with this key has the fleet, in epoch {rival.epoch}; this is epoch {own}. "
            "Is this directory a copy of another, or an old backup? If it is the one to go on with, stop the "
            "other coordinator, then: fedtide coordinator run --take-over"
        )
        self.rival = rival


class Heard(Enum):
    """What a message on the ``coord`` topic means to a run."""

    NOTHING = auto()
    """Nobody's."""
    OURS = auto()
    """Our own state has come back: whatever was said before it has been heard."""
    OUR_WILL = auto()
    """The last word of an earlier connection of ours, which may come late where there are several brokers."""
    LOSER = auto()
    """Another run's that has to end."""


class Fence:
    """One run's claim, held against those of others.

    Args:
        fleet: whose.
        key: the coordinator's.
        own: this run's claim.
    """

    def __init__(self, fleet: FleetId, key: PublicKey, own: Claim) -> None:
        self._fleet = fleet
        self._key = key
        self._own = own

    def hear(self, sealed: bytes, *, looking: bool = False) -> Heard:
        """Take a message of the ``coord`` topic.

        Args:
            sealed: as it came, from anybody.
            looking: this run has said nothing yet, so that one of the same epoch was there before it.

        Raises:
            Fenced: this run has to end.
        """
        try:
            state = unseal(sealed, CoordinatorState, self._key, COORDINATOR_DOMAIN)
        except WireError:
            return Heard.NOTHING
        if state.fleet != self._fleet:
            return Heard.NOTHING
        rival = Claim(state.epoch, state.run)
        if rival == self._own:
            return Heard.OURS if state.online else Heard.OUR_WILL
        if rival > self._own or (looking and rival.epoch == self._own.epoch):
            raise Fenced(rival, self._own.epoch)
        return Heard.LOSER
