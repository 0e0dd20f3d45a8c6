"""The federated metric: a mean weighted by examples, of reports that can be true."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_fleet import DEVICES

from coordinator.federated import FederatedEvaluations
from coordinator.fleet_view import FleetView
from coordinator.status import DeviceTrouble
from fedtide.wire import frame
from fedtide.wire.messages import EvaluationEvent, TrainingEvent, Trouble

ONE, TWO, THREE = DEVICES[:3]


def found(version=5, num_examples=10, loss=0.5, metric=0.75):
    return EvaluationEvent(version=version, num_examples=num_examples, loss=loss, metric=metric)


def reported(*reports, max_examples=1000, newest=5):
    evaluations = FederatedEvaluations(max_examples)
    for device, event in reports:
        assert evaluations.add(device, event, newest)
    return evaluations


def test_each_device_counts_by_the_examples_it_holds_out():
    evaluations = reported(
        (ONE, found(version=4, num_examples=30, loss=0.2, metric=0.9)),
        (TWO, found(version=5, num_examples=10, loss=1.0, metric=0.5)),
    )
    mean = evaluations.current(DEVICES, 5, 20)
    assert (mean.devices, mean.examples, mean.oldest_version, mean.version) == (2, 40, 4, 5)
    assert mean.loss == pytest.approx(0.4)  # (30 × 0.2 + 10 × 1.0) / 40
    assert mean.metric == pytest.approx(0.8)  # (30 × 0.9 + 10 × 0.5) / 40


def test_only_the_latest_report_of_a_device_counts():
    evaluations = reported((ONE, found(version=4, metric=0.1)), (ONE, found(version=5, metric=0.9)))
    assert evaluations.current(DEVICES, 5, 20).metric == pytest.approx(0.9)


def test_a_report_on_a_version_too_old_does_not_count():
    evaluations = reported((ONE, found(version=1, metric=0.1)), (TWO, found(version=5)), newest=9)
    assert evaluations.current(DEVICES, 9, 4).devices == 1
    assert evaluations.current(DEVICES, 9, 8).devices == 2
    assert evaluations.current(DEVICES, 9, 3) is None


def test_a_device_that_is_not_enrolled_any_more_does_not_count():
    evaluations = reported((ONE, found()), (TWO, found()))
    assert evaluations.current([TWO], 5, 20).devices == 1


def test_no_device_is_the_whole_mean_by_claiming_many_examples():
    evaluations = reported(
        (ONE, found(num_examples=2**60, metric=1.0)), (TWO, found(num_examples=100, metric=0.0)),
        max_examples=100,
    )  # fmt: skip
    assert evaluations.current(DEVICES, 5, 20).metric == pytest.approx(0.5)


def test_a_plan_without_a_metric_has_a_federated_loss():
    mean = reported((ONE, found(metric=None)), (TWO, found(metric=None, loss=1.5))).current(DEVICES, 5, 20)
    assert (mean.loss, mean.metric) == (1.0, None)


@pytest.mark.parametrize(
    "event",
    [
        found(loss=math.nan),
        found(metric=math.nan),
        found(loss=math.inf),
        found(metric=-math.inf),
        found(loss=1e300),  # a sum of such is infinite
        found(num_examples=0),
        found(num_examples=-5),
        found(version=6),  # nobody was offered it
        found(version=-1),
    ],
    ids=str,
)
def test_what_cannot_be_true_is_refused(event):
    evaluations = reported((ONE, found(metric=0.9)))
    assert not evaluations.add(ONE, event, 5)
    assert not evaluations.add(TWO, event, 5)
    assert evaluations.current(DEVICES, 5, 20) == reported((ONE, found(metric=0.9))).current(DEVICES, 5, 20)


def test_the_history_has_a_mean_for_each_version():
    evaluations = reported(
        (ONE, found(version=3, metric=0.2)), (TWO, found(version=3, metric=0.4)),
        (ONE, found(version=5, metric=0.8)),
    )  # fmt: skip
    history = evaluations.by_version()
    assert [(mean.version, mean.devices) for mean in history] == [(3, 2), (5, 1)]
    assert [mean.metric for mean in history] == pytest.approx([0.3, 0.8])


def test_a_device_that_repeats_itself_counts_once_for_a_version():
    evaluations = reported((ONE, found(version=3)), *[(ONE, found(version=3, metric=0.0))] * 5)
    (mean,) = evaluations.by_version()
    assert (mean.devices, mean.metric) == (1, 0.75)


def test_a_device_that_goes_back_and_forth_counts_once_for_a_version():
    evaluations = reported((ONE, found(version=5, metric=0.9)))
    for _ in range(3):  # or one device would be as many as a release gate asks for
        assert not evaluations.add(ONE, found(version=3, metric=0.0), 5)
        assert evaluations.add(ONE, found(version=5, metric=0.9), 5)
    (mean,) = evaluations.by_version()
    assert (mean.version, mean.devices) == (5, 1)
    assert evaluations.latest[ONE].version == 5


def test_the_history_is_bounded():
    evaluations = reported(*((ONE, found(version=version)) for version in range(1200)), newest=1200)
    history = evaluations.by_version()
    assert (len(history), history[0].version, history[-1].version) == (1000, 200, 1199)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(DEVICES),
            st.builds(
                EvaluationEvent,
                version=st.integers(-1, 8),
                num_examples=st.integers(-1, 2**64),
                loss=st.floats(),
                metric=st.none() | st.floats(),
            ),
        ),
        max_size=20,
    )
)
def test_whatever_is_reported_the_mean_is_finite_and_between_the_reports(reports):
    evaluations = FederatedEvaluations(1000)
    kept = {device: event for device, event in reports if evaluations.add(device, event, 5)}
    mean = evaluations.current(DEVICES, 5, 20)
    assert (mean is None) == (not kept)
    if mean is not None:
        losses = [event.loss for event in kept.values()]
        slack = 1e-9 * max(map(abs, losses)) + 1e-300
        assert min(losses) - slack <= mean.loss <= max(losses) + slack
        assert mean.metric is None or math.isfinite(mean.metric)
        assert mean.devices == len(kept)


@pytest.fixture
def view():
    return FleetView(FederatedEvaluations(1000))


def tell(view, event, device=ONE):
    view.note_event(device, event if isinstance(event, bytes) else frame.to_frame(event), 5)


def trained(loss=0.5):
    return TrainingEvent(version=5, num_examples=1, steps=1, seconds=0.1, loss=loss)


def test_trouble_is_shown_until_the_device_trains_again(view):
    tell(view, Trouble(event="data.unusable", detail="x.npz: no such file", version=5))
    (status,) = view.statuses([ONE], {})
    assert status.trouble == DeviceTrouble(event="data.unusable", detail="x.npz: no such file", version=5)
    tell(view, trained())
    (status,) = view.statuses([ONE], {})
    assert (status.trouble, status.loss) == (None, 0.5)
    assert view.trouble_counts == {"data.unusable": 1}


def test_a_devices_evaluation_is_shown_in_its_row(view):
    tell(view, found(version=4, num_examples=7, loss=0.25, metric=0.875))
    (status,) = view.statuses([ONE], {})
    shown = status.evaluation
    assert (shown.version, shown.examples, shown.loss, shown.metric) == (4, 7, 0.25, 0.875)


@pytest.mark.parametrize("event", [b"", b"\x01\xc0", trained(math.nan), found(version=6)], ids=repr)
def test_what_is_no_event_or_cannot_be_true_is_counted_and_changes_nothing(view, event):
    tell(view, event)
    (status,) = view.statuses([ONE], {})
    assert (status.loss, status.evaluation, status.trouble, view.malformed) == (None, None, None, 1)


def test_a_device_cannot_make_up_metrics_without_end(view):
    for number in range(100):
        letters = f"{chr(97 + number % 26)}{chr(97 + number // 26)}"
        tell(view, Trouble(event=f"made.up_{letters}", detail="", version=None))
    assert len(view.trouble_counts) == 33  # 32 words and "other"
    assert view.trouble_counts["other"] == 68


@pytest.mark.parametrize("word", ["Training failed", 'x"} 1\n', "", "a" * 80])
def test_a_word_that_is_none_is_counted_as_another(view, word):
    tell(view, Trouble(event=word, detail="", version=None))
    assert view.trouble_counts == {"other": 1}


def test_trouble_cannot_write_to_the_operators_terminal(view):
    tell(view, Trouble(event="step.failed", detail="\x1b[2Jgone\r\n" + "x" * 5000, version=None))
    (status,) = view.statuses([ONE], {})
    assert status.trouble.detail.startswith(" [2Jgone  x")
    assert len(status.trouble.detail) == 200
