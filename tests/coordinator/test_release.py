"""What is released: the gate, the file that survives a restart, and the head that tells the devices."""

import asyncio
import math
import threading

import msgspec
import numpy as np
import pytest
from recording_connection import RecordingConnection, retained
from small_fleet import DEVICES, PLAN, SCHEMA, constant, make_settings
from test_coordinator_service import AT_ONCE, Outcome, run, update
from test_publisher import HEAD, LARGE, blob, heads, make_publisher, version, whole

from coordinator.aggregation import FedBuff
from coordinator.held_out import EvaluationFailed
from coordinator.model_store import ModelStore, StoredRelease
from coordinator.publisher import Released
from coordinator.release_gate import check_gate, passes, sentence
from coordinator.settings import CoordinatorSettings, Evaluation, ReleaseGate, Stop
from coordinator.staleness import Constant
from fedtide.wire import frame
from fedtide.wire.link import LinkDown
from fedtide.wire.messages import EvaluationEvent
from fedtide.wire.model_blob import keyframe_parameters
from fedtide.wire.parameters import fingerprint
from fedtide.wire.settings import SettingsError

GATE = ReleaseGate(on="federated", metric_at_least=0.5)


@pytest.mark.parametrize(
    ("gate", "loss", "metric", "passed"),
    [
        (ReleaseGate(metric_at_least=0.9), None, 0.9, True),
        (ReleaseGate(metric_at_least=0.9), 0.1, 0.89, False),
        (ReleaseGate(metric_at_least=0.9), 0.1, None, False),
        (ReleaseGate(metric_at_most=2.0), None, 2.0, True),
        (ReleaseGate(metric_at_most=2.0), None, 2.1, False),
        (ReleaseGate(loss_at_most=0.5), 0.5, None, True),
        (ReleaseGate(loss_at_most=0.5), 0.6, 1.0, False),
        (ReleaseGate(loss_at_most=0.5), None, 1.0, False),
        (ReleaseGate(metric_at_least=0.9, loss_at_most=0.5), 0.4, 0.95, True),
        (ReleaseGate(metric_at_least=0.9, loss_at_most=0.5), 0.6, 0.95, False),
    ],
)
def test_a_version_passes_when_every_threshold_is_met(gate, loss, metric, passed):
    assert passes(gate, loss, metric) is passed


def test_the_gate_says_what_it_asks_for():
    assert (
        sentence(ReleaseGate(metric_at_least=0.9, loss_at_most=0.25), "accuracy")
        == "accuracy at least 0.9 and loss at most 0.25 on the coordinator's held-out examples"
    )
    gate = ReleaseGate(on="federated", metric_at_most=2.0, min_devices=5)
    assert sentence(gate, None) == "metric at most 2 on the examples that at least 5 devices hold out"


def test_a_gate_without_a_threshold_is_a_mistake():
    with pytest.raises(ValueError, match="give metric_at_least, metric_at_most or loss_at_most"):
        ReleaseGate()


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["metric_at_least", "metric_at_most", "loss_at_most"])
def test_a_threshold_that_nothing_or_everything_meets_is_a_mistake(name, threshold):
    with pytest.raises(ValueError, match=f"{name} is {threshold}, a finite number is needed"):
        ReleaseGate(**{name: threshold})


def test_a_gate_on_held_out_examples_needs_some():
    with pytest.raises(ValueError, match=r"needs an \[evaluation\] table"):
        make_settings(release=ReleaseGate(loss_at_most=1.0))
    assert isinstance(make_settings(release=GATE), CoordinatorSettings)


def test_a_plan_without_a_metric_is_gated_on_its_loss_only():
    manifest = PLAN.plan.manifest
    check_gate(ReleaseGate(loss_at_most=1.0), manifest)
    check_gate(None, manifest)
    with pytest.raises(SettingsError, match="plan 'hand-made' has none; use loss_at_most"):
        check_gate(ReleaseGate(metric_at_least=0.9), manifest)
    check_gate(ReleaseGate(metric_at_least=0.9), msgspec.structs.replace(manifest, metric="accuracy"))


def store(path):
    return ModelStore(path / "models", SCHEMA, 3)


def test_the_released_version_comes_back_from_its_file(tmp_path):
    assert store(tmp_path).release() is None
    store(tmp_path).save_release(StoredRelease(7, constant(7.0), "accuracy at least 0.9"))
    store(tmp_path).save_release(StoredRelease(9, constant(9.0), "accuracy at least 0.8"))
    found = store(tmp_path).release()
    assert (found.version, found.gate) == (9, "accuracy at least 0.8")
    assert found.parameters.tobytes() == constant(9.0).tobytes()


def test_removing_old_versions_leaves_the_released_one(tmp_path):
    models = store(tmp_path)
    for number in range(1, 6):
        models.save(number, constant(number))
        if number == 1:
            models.save_release(StoredRelease(1, constant(1.0), ""))
        models.remove_old()
    assert store(tmp_path).release().version == 1
    assert len(list((tmp_path / "models").iterdir())) == 3


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_release_is_none(tmp_path, cut):
    store(tmp_path).save_release(StoredRelease(7, constant(7.0), "gate"))
    file = tmp_path / "released.safetensors"
    content = bytearray(file.read_bytes())
    if cut == -1:
        content[-1] ^= 1  # a parameter
    file.write_bytes(content[:cut] if cut >= 0 else content)
    assert store(tmp_path).release() is None


def test_a_release_whose_number_or_gate_is_damaged_is_none(tmp_path):
    store(tmp_path).save_release(StoredRelease(7, constant(7.0), "gate"))
    file = tmp_path / "released.safetensors"
    whole = file.read_bytes()
    for right, wrong in ((b'"7"', b'"9"'), (b'"gate"', b'"fate"')):
        assert right in whole
        file.write_bytes(whole.replace(right, wrong))
        assert store(tmp_path).release() is None


def test_without_a_gate_what_is_offered_is_released(tmp_path):
    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher()
        for number in (1, 2):
            await publisher.publish(connection, version(number))
        return connection

    connection = asyncio.run(scenario())
    for head in heads(connection):
        assert (head.release.version, head.release.parameters_sha256) == (
            head.version,
            head.parameters_sha256,
        )
        assert (head.release.blob, head.release.gate) == (head.full_blob, "")
    assert len(connection.published) == 1 + 2 + 2  # the plan, two models, two heads: nothing twice


def test_with_a_gate_nothing_is_released_before_a_version_passes():
    connection = RecordingConnection()
    asyncio.run(make_publisher(release=GATE).publish(connection, version(1)))
    assert heads(connection)[0].release is None


def test_the_released_model_stays_while_newer_ones_come_and_go():
    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher(release=GATE)
        for number in range(1, 9):
            await publisher.publish(connection, version(number, LARGE + np.float32(number)))
            if number == 2:
                publisher.released = Released(publisher.version, "it is good")
        return connection

    connection = asyncio.run(scenario())
    *_, seventh, last = heads(connection)
    assert (last.release.version, last.release.gate) == (2, "it is good")
    assert whole(connection, last.release.blob, 2) == (LARGE + np.float32(2)).tolist()
    left = {topic.split("/")[5] for topic in retained(connection.published) if "/b/" in topic}
    assert len(left) == 1 + 3 + 1  # the plan, the newest three, the release
    assert seventh.release.blob == last.release.blob


def test_a_model_that_is_the_release_no_longer_is_cleared():
    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher(release=GATE)
        for number in range(1, 9):
            if number in {2, 6}:
                publisher.released = Released(version(number), "")
            await publisher.publish(connection, version(number))
        return connection

    connection = asyncio.run(scenario())
    assert heads(connection)[-1].release.version == 6
    left = {topic.split("/")[5] for topic in retained(connection.published) if "/b/" in topic}
    kept = {head.full_blob.id for head in heads(connection)[-3:]}  # 6, 7 and 8
    assert left == kept | {heads(connection)[0].plan_blob.id}


def test_a_broker_that_forgot_gets_the_release_again():
    async def scenario():
        publisher, empty = make_publisher(release=GATE, released=Released(version(1, LARGE), "")), None
        await publisher.publish(RecordingConnection(), version(5))
        empty = RecordingConnection()
        await publisher.renew(empty, everything=True)
        return empty

    empty = asyncio.run(scenario())
    (head,) = heads(empty)
    assert (head.version, head.release.version) == (5, 1)
    assert empty.topics()[-1] == HEAD


def test_models_that_a_lost_connection_kept_from_being_cleared_are_cleared_on_the_next_one():
    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher(release=GATE)

        def lose(publication):
            if publication.payload == b"":
                raise LinkDown("lost")

        for number in range(1, 9):
            if number in {1, 6}:
                publisher.released = Released(version(number, LARGE + np.float32(number)), "")
            if number == 8:  # clears two models: the release before, and the oldest of four
                connection.on_publish = lose
                with pytest.raises(LinkDown):
                    await publisher.publish(connection, version(number, LARGE + np.float32(number)))
            else:
                await publisher.publish(connection, version(number, LARGE + np.float32(number)))
        connection.on_publish = lambda _publication: None
        await publisher.renew(connection, everything=True)
        return connection

    connection = asyncio.run(scenario())
    left = {topic.split("/")[5] for topic in retained(connection.published) if "/b/" in topic}
    kept = {head.full_blob.id for head in heads(connection) if head.version >= 6}
    assert left == kept | {heads(connection)[0].plan_blob.id}


def test_a_has_news_until_a_head_names_it():
    async def scenario():
        connection, publisher = RecordingConnection(), make_publisher(release=GATE)
        await publisher.publish(connection, version(1))
        assert not publisher.has_news
        publisher.released = Released(version(1), "")
        assert publisher.has_news
        await publisher.renew(connection, everything=False)
        assert not publisher.has_news
        return connection

    assert [head.release and head.release.version for head in heads(asyncio.run(scenario()))] == [None, 1]


def first_parameter(parameters):
    # The first parameter starts at 0, and every applied update adds 1 to it.
    return Outcome(loss=0.0, metric=float(parameters[0]))


def make(gate, tmp_path, **changes):
    return make_settings(
        aggregator=FedBuff(goal=1), publish=AT_ONCE, evaluation=Evaluation(data=tmp_path), release=gate,
        staleness=Constant(), **changes,
    )  # fmt: skip


def releases(fleet):
    return [head.release and head.release.version for head in fleet.heads()]


async def send_each(fleet, counters):
    """Updates on version 0, one version each."""
    for counter in counters:
        fleet.send(update(counter))
        await fleet.connection.until(lambda counter=counter: fleet.heads()[-1].version >= counter)


def test_a_release_is_announced_although_no_newer_version_comes(tmp_path):
    async def scenario(fleet, _running):
        await send_each(fleet, (1, 2, 3))
        await fleet.connection.until(lambda: releases(fleet)[-1] == 3)
        return fleet.service.status("running")

    fleet = run(
        tmp_path, make(ReleaseGate(metric_at_least=3.0), tmp_path), scenario, evaluate=first_parameter
    )
    last = fleet.heads()[-1]
    assert last.release.parameters_sha256 == last.parameters_sha256
    assert {released for released in releases(fleet) if released is not None} == {3}
    status = fleet.outcome
    assert status.released_version == 3
    assert status.release_gate == "metric at least 3 on the coordinator's held-out examples"


def test_a_restart_of_the_coordinator_keeps_the_release(tmp_path):
    gate = make(ReleaseGate(metric_at_least=2.0, metric_at_most=2.0), tmp_path)

    async def pass_with_the_second(fleet, _running):
        await send_each(fleet, (1, 2))
        await fleet.connection.until(lambda: releases(fleet)[-1] == 2)
        await send_each(fleet, (3, 4))

    async def look(fleet, _running):
        return fleet.service.status("running")

    before = run(tmp_path, gate, pass_with_the_second, evaluate=first_parameter)
    after = run(tmp_path, gate, look, evaluate=first_parameter)
    first = after.heads()[0]
    assert (first.epoch, first.version, first.release.version) == (2, 4, 2)
    assert first.release == before.heads()[-1].release
    assert after.outcome.released_version == 2
    parameters = keyframe_parameters(blob(after.connection, first.release.blob), 2, SCHEMA)
    assert fingerprint(parameters) == first.release.parameters_sha256


def test_a_version_that_is_being_evaluated_at_the_end_is_evaluated_once(tmp_path):
    evaluated = []

    def slow(parameters):
        evaluated.append(float(parameters[0]))
        threading.Event().wait(0.6 * evaluated[-1])  # version 1: longer than until the coordinator stops
        return first_parameter(parameters)

    async def scenario(fleet, running):
        fleet.send(update(1))
        assert await running == "versions reached 1"
        return fleet.service.status("stopped")

    settings = make(ReleaseGate(metric_at_least=1.0), tmp_path, stop=Stop(versions=1))
    fleet = run(tmp_path, settings, scenario, evaluate=slow)
    assert evaluated == [0.0, 1.0]
    assert [point.version for point in fleet.outcome.evaluations] == [0, 1]
    assert releases(fleet)[-1] == 1


def test_an_evaluation_that_fails_ends_no_training_and_releases_nothing(tmp_path, caplog):
    def stopped_at_first(parameters):
        if parameters[0] < 2:
            raise EvaluationFailed("a run took longer than 30 s")
        return first_parameter(parameters)

    async def scenario(fleet, _running):
        await send_each(fleet, (1, 2))
        await fleet.connection.until(lambda: releases(fleet)[-1] == 2)
        return fleet.service.status("running")

    settings = make(ReleaseGate(metric_at_least=0.0), tmp_path)
    fleet = run(tmp_path, settings, scenario, evaluate=stopped_at_first)
    assert {released for released in releases(fleet) if released is not None} == {2}
    assert [point.version for point in fleet.outcome.evaluations] == [2]
    assert "Version 1 could not be evaluated: a run took longer than 30 s" in caplog.messages


def test_a_release_of_an_earlier_run_is_shown_with_the_gate_that_it_passed(tmp_path):
    async def pass_with_the_first(fleet, _running):
        await send_each(fleet, (1,))
        await fleet.connection.until(lambda: releases(fleet)[-1] == 1)

    async def look(fleet, _running):
        return fleet.service.status("running")

    mild, strict = ReleaseGate(metric_at_least=1.0), ReleaseGate(metric_at_least=9.0)
    run(tmp_path, make(mild, tmp_path), pass_with_the_first, evaluate=first_parameter)
    status = run(tmp_path, make(strict, tmp_path), look, evaluate=first_parameter).outcome
    assert status.released_version == 1
    assert status.release_gate == "metric at least 1 on the coordinator's held-out examples"


def test_without_a_gate_an_old_release_is_not_offered(tmp_path):
    async def pass_with_the_first(fleet, _running):
        await send_each(fleet, (1,))
        await fleet.connection.until(lambda: releases(fleet)[-1] == 1)
        await send_each(fleet, (2,))

    async def look(_fleet, _running):
        pass

    gate = ReleaseGate(metric_at_least=1.0, metric_at_most=1.0)
    run(tmp_path, make(gate, tmp_path), pass_with_the_first, evaluate=first_parameter)
    after = run(tmp_path, make(None, tmp_path), look, evaluate=first_parameter)
    assert releases(after) == [2]


def tell(fleet, device, version, metric, num_examples=10):
    event = EvaluationEvent(version=version, num_examples=num_examples, loss=0.5, metric=metric)
    fleet.connection.deliver(f"fl/1/pumps/ev/{device}", frame.to_frame(event), qos=0)


def test_devices_release_a_version_only_where_the_operator_asked_them_and_only_together(tmp_path):
    async def scenario(fleet, _running):
        await send_each(fleet, (1, 2))
        tell(fleet, DEVICES[0], 1, 1.0)
        tell(fleet, DEVICES[1], 1, 0.8)  # with 0.9 on average version 1 passes
        tell(fleet, DEVICES[2], 2, 1.0)  # one device is too few for version 2
        await fleet.connection.until(lambda: releases(fleet)[-1] == 1)
        return fleet.service.status("running")

    gate = ReleaseGate(on="federated", metric_at_least=0.9, min_devices=2)
    fleet = run(tmp_path, make(gate, tmp_path), scenario)
    status = fleet.outcome
    assert status.released_version == 1
    assert status.federated.devices == 3
    assert [(mean.version, mean.devices) for mean in status.federated_history] == [(1, 2), (2, 1)]


def test_reports_of_devices_do_not_open_a_gate_on_held_out_examples(tmp_path):
    async def scenario(fleet, running):
        await send_each(fleet, (1,))
        for device in DEVICES:
            tell(fleet, device, 1, 1e6)
        assert await running == "seconds reached 1"

    settings = make(ReleaseGate(metric_at_least=100.0), tmp_path, stop=Stop(seconds=1.0))
    fleet = run(tmp_path, settings, scenario, evaluate=first_parameter)
    assert set(releases(fleet)) == {None}


def test_events_of_a_stranger_are_not_heard(tmp_path):
    async def scenario(fleet, _running):
        tell(fleet, "stranger", 0, 1.0)
        tell(fleet, DEVICES[0], 0, 0.5)
        await fleet.connection.until(lambda: len(fleet.connection.acknowledged) == 2)
        return fleet.service.status("running")

    status = run(tmp_path, make(None, tmp_path), scenario).outcome
    assert (status.federated.devices, status.federated.metric) == (1, 0.5)
