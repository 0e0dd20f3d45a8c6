from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtide.wire import frame
from fedtide.wire.errors import MalformedFrame
from fedtide.wire.ids import ModelVersion
from fedtide.wire.training import Constant, Cosine, Exponential, Schedule, StepDecay, Training

SCHEDULES = (
    Constant(),
    StepDecay(every_versions=10, by=0.5),
    Exponential(half_life_versions=20.0),
    Cosine(versions=100, floor=0.1),
)


def test_every_schedule_is_tested():
    assert {type(schedule) for schedule in SCHEDULES} == set(get_args(Schedule))


@pytest.mark.parametrize(
    ("schedule", "version", "factor"),
    [
        (Constant(), 1_000_000, 1.0),
        (StepDecay(every_versions=10, by=0.5), 9, 1.0),
        (StepDecay(every_versions=10, by=0.5), 10, 0.5),
        (StepDecay(every_versions=10, by=0.5), 35, 0.125),  # 35 // 10 = 3 halvings
        (Exponential(half_life_versions=20.0), 20, 0.5),
        (Exponential(half_life_versions=20.0), 60, 0.125),
        (Cosine(versions=100, floor=0.1), 50, 0.55),  # half way: 0.1 + 0.9 / 2
        (Cosine(versions=100, floor=0.1), 100, 0.1),
        (Cosine(versions=100, floor=0.1), 5000, 0.1),
        (Cosine(versions=60), 20, 0.75),  # cos(pi / 3) = 1/2, (1 + 1/2) / 2
    ],
)
def test_the_learning_rate_follows_the_schedule(schedule, version, factor):
    training = Training(learning_rate=0.2, schedule=schedule)
    assert training.learning_rate_at(ModelVersion(version)) == pytest.approx(0.2 * factor)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(version=st.integers(0, 2**40))
def test_every_schedule_starts_at_one_and_stays_between_zero_and_one(schedule, version):
    assert schedule.factor(ModelVersion(0)) == 1.0
    assert 0 <= schedule.factor(ModelVersion(version)) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_comes_back_from_its_frame(schedule):
    training = Training(schedule=schedule)
    assert frame.unpack(frame.pack(training), Training) == training


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"schedule": {"kind": "cosine", "version": 300}}', "unknown field `version`"),
        ('{"schedule": {"kind": "linear"}}', "Invalid value 'linear'"),
        ('{"schedule": {"kind": "step", "every_versions": 0}}', ">= 1"),
        ('{"local_epochs": 0}', ">= 1"),
        ('{"max_seconds": 0.0}', "> 0"),
        ('{"evaluation_share": 1.0}', "< 1"),
        ('{"optimizer_state": "forget"}', "Invalid enum value 'forget'"),
    ],
)
def test_what_makes_no_sense_is_refused(text, complaint):
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.json.decode(text, type=Training)


def test_a_frame_with_an_impossible_value_is_malformed():
    packed = frame.pack(msgspec.structs.replace(Training(), proximal=-1.0))
    with pytest.raises(MalformedFrame, match="proximal"):
        frame.unpack(packed, Training)
