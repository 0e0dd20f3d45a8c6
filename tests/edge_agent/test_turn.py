"""A device's turn: drawn anew whenever others may be back at the same moment, and only then."""

from typing import Final

import numpy as np
import pytest

from edge_agent.turn import Turn
from fedtide.wire.ids import Epoch, FleetId
from fedtide.wire.messages import CoordinatorState


class HandClock:
    """Shows what a test sets."""

    def __init__(self) -> None:
        self.moment = 1000.0

    def now(self) -> float:
        return self.moment

    def wall(self) -> float:
        return self.moment


def state(
    spread_s: float = 100.0, *, online: bool = True, epoch: int = 1, run: str = "a"
) -> CoordinatorState:
    return CoordinatorState(
        fleet=FleetId("pumps"),
        epoch=Epoch(epoch),
        run=run,
        online=online,
        protocol_min=1,
        protocol_max=1,
        spread_s=spread_s,
    )


FIRST: Final = state()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def turn(clock: HandClock) -> Turn:
    return Turn(np.random.default_rng(7), clock)


def test_before_anything_was_heard_it_is_the_devices_turn(turn: Turn) -> None:
    assert turn.left_s == 0.0
    turn.come_back(None)
    assert turn.left_s == 0.0


def test_a_small_fleet_does_not_wait(turn: Turn) -> None:
    turn.hear(None, state(spread_s=0.0))
    assert turn.left_s == 0.0


def test_the_moments_of_a_fleet_are_spread_evenly(clock: HandClock) -> None:
    waits = []
    for number in range(1000):
        turn = Turn(np.random.default_rng(number), clock)
        turn.hear(None, FIRST)
        waits.append(turn.left_s)
    assert 0.0 <= min(waits) < 1.0
    assert 99.0 < max(waits) <= 100.0
    assert max(np.histogram(waits, bins=10, range=(0, 100))[0]) < 150


def test_the_turn_comes_when_the_time_has_passed(turn: Turn, clock: HandClock) -> None:
    turn.hear(None, FIRST)
    wait_s = turn.left_s
    assert wait_s > 0
    clock.moment += wait_s
    assert turn.left_s == 0.0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (state(online=False), FIRST),
        (FIRST, state(epoch=2)),
        (FIRST, state(run="b")),
    ],
    ids=["it is online again", "another epoch", "another run"],
)
def test_a_coordinator_that_is_back_begins_it_anew(
    turn: Turn, clock: HandClock, before: CoordinatorState, after: CoordinatorState
) -> None:
    clock.moment += 10_000
    turn.hear(before, after)
    assert turn.left_s > 0


def test_who_has_had_its_turn_does_not_wait_again_when_the_spread_changes(
    turn: Turn, clock: HandClock
) -> None:
    turn.hear(None, FIRST)
    clock.moment += 100.0
    turn.hear(FIRST, state(spread_s=500.0))
    assert turn.left_s == 0.0


def test_who_waits_spreads_over_the_shorter_time_and_never_waits_longer(clock: HandClock) -> None:
    for number in range(100):
        turn = Turn(np.random.default_rng(number), clock)
        turn.hear(None, FIRST)
        before = turn.left_s
        turn.hear(FIRST, state(spread_s=10.0))
        assert turn.left_s <= min(before, 10.0)
        turn.hear(state(spread_s=10.0), state(spread_s=1000.0))
        assert turn.left_s <= min(before, 10.0)


def test_nonsense_is_no_wait_and_no_wait_is_longer_than_an_hour(turn: Turn) -> None:
    for nonsense in (-1.0, float("nan")):
        turn.hear(None, state(spread_s=nonsense))
        assert turn.left_s == 0.0
    turn.hear(None, state(spread_s=float("inf")))
    assert turn.left_s <= 3600.0
