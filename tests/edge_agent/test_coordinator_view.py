"""What a device believes of what is said in the coordinator's name: epochs, protocol versions, expiry."""

import logging
from dataclasses import replace

import pytest
from agent_world import COORDINATOR_KEY, FLEET, STRANGERS_KEY, Release

from edge_agent.coordinator_view import CoordinatorView
from fedtide.wire import frame
from fedtide.wire.errors import BadSignature, UnsupportedVersion
from fedtide.wire.ids import Epoch
from fedtide.wire.messages import CoordinatorState
from fedtide.wire.seal import seal
from fedtide.wire.signatures import COORDINATOR_DOMAIN

ISSUED, EXPIRES = 1_700_000_000.0, 1_700_086_400.0
TEN_YEARS_S = 10 * 365.25 * 86_400


def view(wall: float = ISSUED) -> CoordinatorView:
    return CoordinatorView(FLEET, COORDINATOR_KEY.public, lambda: wall)


def state(
    epoch: int, *, online: bool = True, spoken: tuple[int, int] = (1, 1), shards: int = 1
) -> CoordinatorState:
    return CoordinatorState(
        fleet=FLEET,
        epoch=Epoch(epoch),
        online=online,
        protocol_min=spoken[0],
        protocol_max=spoken[1],
        shards=shards,
    )


def sealed(message: CoordinatorState) -> bytes:
    return seal(message, COORDINATOR_KEY, COORDINATOR_DOMAIN)


def test_a_state_of_an_earlier_epoch_is_ignored() -> None:
    seen = view()
    seen.hear_state(sealed(state(5, shards=3)))
    seen.hear_state(sealed(state(4, online=False)))
    assert (seen.away, seen.shards, seen.epoch) == (False, 3, 5)


def test_of_states_of_one_epoch_the_last_to_come_counts() -> None:
    seen = view()
    seen.hear_state(sealed(state(5, online=False)))
    assert seen.away
    seen.hear_state(sealed(state(5)))
    assert not seen.away


@pytest.mark.parametrize(("epoch", "believed"), [(4, False), (5, True), (6, True), (0, True)])
def test_what_names_an_epoch_below_the_highest_heard_of_is_not_believed(epoch: int, believed: bool) -> None:  # noqa: FBT001
    seen = view()
    seen.hear_state(sealed(state(5)))
    assert seen.believes(Epoch(epoch)) == believed  # 0: a build that does not say it
    assert seen.epoch == max(5, epoch)


def test_a_head_raises_the_epoch_below_which_nothing_is_believed() -> None:
    seen = view()
    seen.hear_head(Release(3, epoch=7).sealed_head)
    assert seen.newest_head() is not None
    assert not seen.believes(Epoch(6))
    seen.hear_state(sealed(state(6, online=False)))
    assert not seen.away


def test_the_epoch_of_the_installed_model_still_counts_after_a_restart() -> None:
    restarted = view()
    restarted.never_below(Release(3, epoch=7).head)
    assert not restarted.believes(Epoch(6))
    restarted.hear_head(Release(9, epoch=6).sealed_head)
    assert restarted.newest_head() is None


def test_what_somebody_else_signed_raises_no_epoch() -> None:
    seen = view()
    with pytest.raises(BadSignature):
        seen.hear_state(seal(state(9), STRANGERS_KEY, COORDINATOR_DOMAIN))
    seen.hear_head(replace(Release(3, epoch=9), key=STRANGERS_KEY).sealed_head)
    assert seen.newest_head() is None
    assert (seen.epoch, seen.away) == (0, False)


@pytest.mark.parametrize(
    ("spoken", "text"),
    [
        ((2, 3), "sent in protocol version 1; the receiver speaks 2, 3: upgrade fedtide at the sender"),
        ((0, 0), "sent in protocol version 1; the receiver speaks 0: upgrade fedtide at the receiver"),
    ],
)
def test_a_coordinator_that_cannot_read_this_build_is_as_good_as_away(
    spoken: tuple[int, int], text: str
) -> None:
    seen = view()
    seen.hear_state(sealed(state(5, spoken=spoken)))
    assert seen.away
    assert str(seen.unsupported) == text
    seen.hear_state(sealed(state(6, spoken=(1, 2))))
    assert not seen.away
    assert seen.unsupported is None


def test_a_state_in_another_protocol_version_says_that_the_coordinator_was_upgraded_first() -> None:
    seen = view()
    seen.hear_state(sealed(state(5)))
    newer = bytes((frame.PROTOCOL_VERSION + 1,)) + b"whatever that version holds"
    with pytest.raises(UnsupportedVersion, match=r"version 2; the receiver speaks 1: .* the receiver"):
        seen.hear_state(newer)
    assert seen.away
    seen.hear_state(sealed(state(6)))
    assert not seen.away


def expiries(caplog: pytest.LogCaptureFixture) -> int:
    return sum(getattr(record, "event", None) == "head.expired" for record in caplog.records)


def test_a_device_whose_clock_is_ten_years_ahead_takes_every_head_and_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = view(ISSUED + TEN_YEARS_S)
    with caplog.at_level(logging.WARNING):
        for version in range(1, 6):
            seen.hear_head(Release(version).sealed_head)
            newest = seen.newest_head()
            assert newest is not None
            assert newest.head.version == version
    assert expiries(caplog) == 1


def test_a_device_whose_clock_is_ten_years_behind_takes_every_head(caplog: pytest.LogCaptureFixture) -> None:
    seen = view(ISSUED - TEN_YEARS_S)
    with caplog.at_level(logging.WARNING):
        for version in range(1, 6):
            seen.hear_head(Release(version).sealed_head)
            assert seen.newest_head() is not None
    assert expiries(caplog) == 0


def test_a_clock_that_was_set_right_in_between_warns_of_the_next_head_that_expires(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = [EXPIRES + 1.0, EXPIRES - 1.0, EXPIRES + 1.0]
    seen = CoordinatorView(FLEET, COORDINATOR_KEY.public, lambda: clock.pop(0))
    with caplog.at_level(logging.WARNING):
        for version in (1, 2, 3):
            seen.hear_head(Release(version).sealed_head)
            seen.newest_head()
    assert expiries(caplog) == 2
