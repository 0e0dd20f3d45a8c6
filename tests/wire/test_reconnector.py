"""Waiting and dialling again, without a network."""

import asyncio
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtide.wire.link import Broker, Connection, LinkDown, Reconnector, Session, full_jitter

SESSION = Session("pump-1", clean_start=True, expiry_s=0, receive_maximum=4, will=None)
QUICK = Broker(hosts=("a:1", "b:2"), reconnect_min_s=1e-6, reconnect_max_s=1e-5)


class Network:
    """Dials as it is told: ``outcomes`` says for each attempt whether somebody answers."""

    def __init__(self, *outcomes: bool) -> None:
        self._outcomes = iter(outcomes)
        self.attempts: list[int] = []
        self.connection = cast("Connection", object())

    async def dial(self, _session: Session, attempt: int) -> Connection:
        self.attempts.append(attempt)
        if next(self._outcomes):
            return self.connection
        raise LinkDown(f"attempt {attempt}: nobody there")


@given(
    attempt=st.integers(0, 10_000),
    minimum_s=st.floats(1e-3, 10.0),
    maximum_s=st.floats(10.0, 1000.0),
    seed=st.integers(0, 2**32),
)
def test_a_wait_is_within_its_bound(attempt: int, minimum_s: float, maximum_s: float, seed: int) -> None:
    wait_s = full_jitter(attempt, minimum_s, maximum_s, np.random.default_rng(seed))
    assert 0.0 <= wait_s <= min(maximum_s, minimum_s * 2.0 ** min(attempt, 100))


@pytest.mark.parametrize(
    ("attempt", "bound_s"),
    [(0, 1.0), (1, 2.0), (2, 4.0), (6, 64.0), (7, 120.0), (1000, 120.0)],  # 2^7 = 128 is beyond 120
)
def test_waits_fill_their_whole_range_which_doubles_up_to_its_maximum(attempt: int, bound_s: float) -> None:
    rng = np.random.default_rng(5)
    waits = [full_jitter(attempt, 1.0, 120.0, rng) for _ in range(2000)]
    # The mean of 2,000 uniform draws has a standard deviation of bound / √12 / √2000 = 0.0065 bounds.
    assert np.mean(waits) == pytest.approx(bound_s / 2, abs=5 * 0.0065 * bound_s)
    assert min(waits) < 0.01 * bound_s
    assert max(waits) > 0.99 * bound_s


def test_it_dials_until_somebody_answers_and_tells_why_not() -> None:
    network, told = Network(False, False, True), []
    reconnector = Reconnector(
        network.dial, QUICK, np.random.default_rng(1), lambda error, wait_s: told.append((str(error), wait_s))
    )
    assert asyncio.run(reconnector.connect(SESSION)) is network.connection
    assert network.attempts == [0, 1, 2]
    assert [text for text, _ in told] == ["attempt 0: nobody there", "attempt 1: nobody there"]
    assert told[0][1] <= 1e-6
    assert told[1][1] <= 2e-6


def test_after_a_success_it_begins_with_the_first_host_and_the_shortest_wait_again() -> None:
    network = Network(False, True, False, True)
    reconnector = Reconnector(network.dial, QUICK, np.random.default_rng(1), lambda *_: None)

    async def twice() -> None:
        await reconnector.connect(SESSION)
        await reconnector.connect(SESSION)

    asyncio.run(twice())
    assert network.attempts == [0, 1, 0, 1]


def test_what_is_not_a_lost_link_is_not_hidden() -> None:
    async def dial(_session: Session, _attempt: int) -> Connection:
        raise ValueError("a mistake of our own")

    reconnector = Reconnector(dial, QUICK, np.random.default_rng(1), lambda *_: None)
    with pytest.raises(ValueError, match="our own"):
        asyncio.run(reconnector.connect(SESSION))


def test_a_pause_after_a_lost_connection_is_random_and_short() -> None:
    reconnector = Reconnector(Network().dial, QUICK, np.random.default_rng(1), lambda *_: None)
    assert 0.0 <= asyncio.run(reconnector.pause()) <= QUICK.reconnect_min_s


def test_a_cancellation_that_a_task_group_swallowed_is_noticed_at_the_next_pause() -> None:
    reconnector = Reconnector(Network().dial, QUICK, np.random.default_rng(1), lambda *_: None)

    async def stubborn(started: asyncio.Event) -> None:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:  # as a TaskGroup does when a child fails at that moment
            await reconnector.pause()

    async def main() -> bool:
        started = asyncio.Event()
        task = asyncio.create_task(stubborn(started))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main())
