"""Whatever a power cut leaves of a device's files: nothing lost, nothing twice, never half a model."""

import math

import numpy as np
import pytest
from coarse_codec import TABLE
from device_life import SCRIPT, Device, Life
from simulated_disk import Operation, PowerCut, SimulatedDisk

from edge_agent import error_feedback
from fedtide.wire import codecs

CODECS = ("coarse", "float32")  # with error feedback and without


@pytest.fixture(autouse=True)
def everything_left_out_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "CODECS", TABLE)
    monkeypatch.setattr(error_feedback, "MOST_CARRIED", math.inf)


@pytest.mark.parametrize("codec", CODECS)
def test_a_device_survives_every_power_cut_of_a_few_lives(codec: str) -> None:
    assert states_survived(codec, range(4), actions=40, states_per_change=0.6) > 300


@pytest.mark.long
@pytest.mark.parametrize("codec", CODECS)
def test_a_device_survives_every_power_cut_of_many_lives(codec: str) -> None:
    assert states_survived(codec, range(100, 130), actions=80, states_per_change=0.8) > 7_000


def states_survived(codec: str, seeds: range, *, actions: int, states_per_change: float) -> int:
    states = 0
    for seed in seeds:
        life = Life(seed, codec=codec, states_per_change=states_per_change)
        try:
            life.live(actions)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        states += life.states
        assert life.device.disk.used_bytes < 12_000  # a life leaves nothing behind that grows
    return states


@pytest.mark.parametrize("codec", CODECS)
def test_a_device_that_was_killed_survives_the_power_cut_that_follows(codec: str) -> None:
    killed_and_cut(codec, every=37, states_each=1)


@pytest.mark.long
@pytest.mark.parametrize("codec", CODECS)
def test_a_device_that_was_killed_at_any_time_survives_every_power_cut_that_follows(codec: str) -> None:
    assert killed_and_cut(codec, every=2, states_each=1) > 6_000


def killed_and_cut(codec: str, *, every: int, states_each: int) -> int:
    """End the process after a change, go on with what it wrote, and cut the power at each later change."""
    rng, states, kill_at = np.random.default_rng(1), 0, 0
    while True:
        device = Device(SimulatedDisk(page_bytes=128), codec)
        changes = 0

        def kill(_: Operation) -> None:
            nonlocal changes
            changes += 1
            if changes > kill_at:  # noqa: B023 - called in this pass only
                raise PowerCut

        def look(_: Operation) -> None:
            nonlocal states
            for state in device.disk.crash_states(rng, max(2, states_each)):  # noqa: B023
                device.check(state)  # noqa: B023
                states += 1

        device.disk.watch(kill)
        for action in SCRIPT:
            try:
                action(device)
            except PowerCut:
                device.replace_disk(device.disk.killed())
                device.disk.watch(look)
                for state in device.disk.crash_states(rng, 20):
                    device.check(state)
                    states += 1
        if changes <= kill_at:
            return states
        kill_at += every
