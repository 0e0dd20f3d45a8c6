"""A flipped bit anywhere in what a device keeps is noticed, and what it spoilt is not used."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from agent_world import COORDINATOR_KEY, DEVICE_KEY
from coarse_codec import TABLE
from device_life import KEPT_PLAN, MODELS, SETTINGS, STATE, Device, model_of, release_of
from simulated_disk import SimulatedDisk

from edge_agent.feedback_file import FeedbackFile
from edge_agent.kept_state import KeptFile
from edge_agent.model_slots import ModelSlots
from edge_agent.new_examples import TrainedTo
from edge_agent.outbox import Outbox
from edge_agent.plan_trial import PlanTrial
from edge_agent.settings import FEEDBACK_FILE, KEPT_FILE, TRIAL_FILE
from edge_agent.submission import Submission
from fedtide.wire import codecs
from fedtide.wire.messages import Verdict

OUTBOX: Final = STATE / "outbox"
UNUSED_PLAN: Final = release_of(1).plan.id
"""Of a model that was written over; nobody reads it."""


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimulatedDisk:
    """A device's after two updates, the second of them waiting, and three models, the third released."""
    monkeypatch.setattr(codecs, "CODECS", TABLE)
    device = Device(SimulatedDisk())
    device.train((5, 5, 5))
    device.deliver(Verdict.APPLIED)
    device.train((3, 3, 3))
    for _ in range(3):
        device.install()
    return device.disk


KEPT: Final = pytest.mark.parametrize(
    ("files", "event"),
    [
        ("outbox/*.update", "outbox.damaged"),
        ("outbox/counter*", "outbox.damaged"),
        ("error-feedback", "feedback.damaged"),
        ("error-feedback.applied", "feedback.damaged"),
        ("models/?.model", "slot.damaged"),
        ("models/released.model", "slot.damaged"),
        ("models/plans/*.plan", "slot.damaged"),
        ("kept", "kept.damaged"),
        ("trained-to", "examples.unknown"),
        ("plan-trial", "trial.damaged"),
    ],
)


@KEPT
def test_a_flipped_bit_is_noticed(
    disk: SimulatedDisk, files: str, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(1)
    for path in looked_at(disk, files):
        bits = 8 * disk.size(path)
        for bit in {*range(64), bits - 1, *map(int, rng.integers(bits, size=40))}:
            assert is_noticed(disk, path, bit, event, caplog), f"bit {bit} of {path}"


@pytest.mark.long
@KEPT
def test_every_flipped_bit_is_noticed(
    disk: SimulatedDisk, files: str, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in looked_at(disk, files):
        for bit in range(8 * disk.size(path)):
            assert is_noticed(disk, path, bit, event, caplog), f"bit {bit} of {path}"


def looked_at(disk: SimulatedDisk, files: str) -> list[Path]:
    found = [path for path in disk.files() if path.match(str(STATE / files)) and path.stem != UNUSED_PLAN]
    assert found
    return found


def is_noticed(
    disk: SimulatedDisk, path: Path, bit: int, event: str, caplog: pytest.LogCaptureFixture
) -> bool:
    content = bytearray(disk.read(path))
    content[bit // 8] ^= 1 << bit % 8
    damaged = disk.killed()
    damaged.damage(path, bytes(content))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        READERS[event](damaged)
    return event in {getattr(record, "event", "") for record in caplog.records}


def read_outbox(disk: SimulatedDisk) -> None:
    """What is damaged is set aside and told; whichever file it is, no counter comes back."""
    before = {int(path.stem) for path in disk.files() if path.suffix == ".update"}
    outbox = Outbox(OUTBOX, lambda: 0.0, disk)
    assert len(outbox.damaged) == 1
    assert outbox.reserve() > max(before)
    (counter,) = before
    assert (len(outbox) == 0) == outbox.was_damaged(counter)
    assert (OUTBOX / f"{counter}.update" in outbox.damaged) == outbox.was_damaged(counter)


def read_feedback(disk: SimulatedDisk) -> None:
    assert FeedbackFile(STATE / FEEDBACK_FILE, disk).residual(model_of("coarse").plan) is None
    assert STATE / FEEDBACK_FILE not in disk.files()


def read_models(disk: SimulatedDisk) -> None:
    slots = ModelSlots(MODELS, COORDINATOR_KEY.public, disk)
    newest, released = slots.newest(), slots.released()
    assert newest is None or newest.head.version in {2, 3}
    assert released is None or released.release.version == 3
    for model in (newest, released):
        assert model is None or set(model.parameters.tolist()) == {float(model.head.version)}


def read_kept(disk: SimulatedDisk) -> None:
    assert not KeptFile(STATE / KEPT_FILE, disk).of(KEPT_PLAN)


def read_trained_to(disk: SimulatedDisk) -> None:
    assert TrainedTo(STATE / "trained-to", disk).mark is None


def read_trial(disk: SimulatedDisk) -> None:
    PlanTrial(STATE / TRIAL_FILE, disk).check(model_of("coarse").plan.id)


READERS: Final[dict[str, Callable[[SimulatedDisk], None]]] = {
    "outbox.damaged": read_outbox,
    "feedback.damaged": read_feedback,
    "slot.damaged": read_models,
    "kept.damaged": read_kept,
    "examples.unknown": read_trained_to,
    "trial.damaged": read_trial,
}


def test_without_a_flipped_bit_nothing_is_noticed(
    disk: SimulatedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    device = Submission(SETTINGS, DEVICE_KEY, lambda: 0.0, disk)
    assert (len(device.outbox), device.outbox.damaged) == (1, ())
    slots = ModelSlots(MODELS, COORDINATOR_KEY.public, disk)
    newest, released = slots.newest(), slots.released()
    assert newest is not None
    assert released is not None
    assert (newest.head.version, released.release.version) == (3, 3)
    assert caplog.records == []
    assert {Path(*path.parts[2:]).parts[0] for path in disk.files()} == {
        "outbox", "error-feedback", "error-feedback.applied", "models", "kept", "trained-to", "plan-trial"
    }  # fmt: skip
