"""The versions that devices hold are made one after the other, and a restart goes on where they ended."""

import msgspec
import numpy as np
import pytest
from small_fleet import PLAN, SCHEMA, constant, make_settings

from coordinator.aggregation import FedAsync, FedBuff
from coordinator.closed_loop import ClosedLoop, Version
from coordinator.journal import Journal
from coordinator.model_grid import DEAD_ZONE, grid_of, step_exponents
from coordinator.model_store import ModelStore
from coordinator.published_versions import PublishedVersions
from coordinator.recovery import kept_models
from coordinator.settings import Publish
from fedtide.wire.model_blob import ModelFormat
from fedtide.wire.parameters import Schema, TensorSpec, fingerprint

LARGE = Schema(tensors=(TensorSpec(name="p.w", dtype="float32", shape=(20, 25)),))
FLOAT32 = Publish(format=ModelFormat.FLOAT32)


def walk(count, seed=0, size=500):
    """A model that drifts and trembles."""
    rng = np.random.default_rng(seed)
    model, drift = rng.standard_normal(size) * 0.1, rng.standard_normal(size) * 0.001
    for _ in range(count):
        model = model + drift + rng.standard_normal(size) * 0.002
        yield model.astype(np.float32)


def test_over_two_hundred_noisy_versions_the_error_stays_below_a_step():
    loop, worst = ClosedLoop(Publish(), LARGE, None), 0.0
    for number, model in enumerate(walk(200)):
        version = loop.version(number, model)
        assert version.fingerprint == fingerprint(version.parameters)
        assert grid_of(version.parameters, LARGE) is not None
        assert version.place.sequence == number
        if number:
            (exponent,) = step_exponents(version.place.spread, model, 8.0, LARGE)
            worst = max(worst, float(np.abs(model - version.parameters).max()) / 2.0**exponent)
    assert 0.6 < worst <= DEAD_ZONE * (1 + 1e-6)


def test_a_version_asked_for_again_is_the_same():
    models = list(walk(3))
    loop = ClosedLoop(Publish(), LARGE, None)
    first = [loop.version(number, model) for number, model in enumerate(models)][-1]
    assert loop.version(2, models[2]) is first


def test_float32_gives_the_model_to_the_bit():
    loop = ClosedLoop(FLOAT32, LARGE, None)
    for number, model in enumerate(walk(3)):
        assert loop.version(number, model).parameters is model


def test_a_finer_step_follows_more_closely():
    def error(step):
        loop = ClosedLoop(Publish(step=step), LARGE, None)
        for number, model in enumerate(walk(50)):
            version = loop.version(number, model)
        return float(np.sqrt(np.mean((model - version.parameters) ** 2)))

    assert error(1.0) < error(4.0) < error(16.0)


def test_a_model_that_jumps_from_end_to_end_of_float32_stops_nothing():
    """The difference, 6e38, is no float32 any more."""
    loop = ClosedLoop(Publish(), SCHEMA, None)
    for number, value in enumerate((3e38, -3e38, 1.0)):
        version = loop.version(number, constant(value))
    assert np.isfinite(version.place.spread).all()
    assert np.isfinite(version.parameters).all()


def test_settings_name_the_format_and_the_step():
    text = '[publish]\nformat = "float32"\nstep = 4.0\ndeltas = false\n'
    publish = msgspec.toml.decode(text, type=dict[str, Publish])["publish"]
    assert (publish.format, publish.step, publish.with_deltas) == (ModelFormat.FLOAT32, 4.0, False)
    assert (Publish().format, Publish().step, Publish().with_deltas) == (ModelFormat.GRID, 8.0, True)
    assert not Publish(format=ModelFormat.FLOAT32).with_deltas


@pytest.mark.parametrize("line", ['format = "int8"', "step = 0.0", "step = 65.0", "deltas = 128"])
def test_settings_that_cannot_be_are_refused(line):
    with pytest.raises(msgspec.ValidationError):
        msgspec.toml.decode(f"[publish]\n{line}\n", type=dict[str, Publish])


def opened(directory, schema=LARGE, **changes):
    settings = make_settings(**changes)
    models = ModelStore(directory / "models", schema, kept_models(settings.publish))
    return PublishedVersions(settings, schema, models, Journal(directory / "journal"))


def publish(versions, number, model):
    version = versions.make(number, model)
    versions.save(version)
    return version


def test_after_a_restart_the_loop_goes_on_from_what_devices_hold(tmp_path):
    models = list(walk(40))
    straight = ClosedLoop(Publish(), LARGE, None)
    expected = [straight.version(number, model) for number, model in enumerate(models)]
    versions = opened(tmp_path)
    for number, model in enumerate(models[:25]):
        publish(versions, number, model)
    versions = opened(tmp_path)
    again = versions.make(24, models[24])  # what a coordinator does first: offer the version it stopped at
    assert (again.number, again.fingerprint, again.place) == (
        expected[24].number, expected[24].fingerprint, expected[24].place
    )  # fmt: skip
    made = [publish(versions, number, model) for number, model in enumerate(models[24:], 24)]
    assert [version.fingerprint for version in made] == [version.fingerprint for version in expected[24:]]


def test_after_a_restart_versions_are_found_by_their_place(tmp_path):
    versions = opened(tmp_path)
    made = [publish(versions, 3 * number, model) for number, model in enumerate(walk(5))]
    for looked_into in (versions, opened(tmp_path)):
        assert looked_into.earlier(5) is None
        for version in made:
            number, parameters = looked_into.earlier(version.place.sequence)
            assert (number, parameters.tobytes()) == (version.number, version.parameters.tobytes())


def test_versions_that_deltas_start_from_stay_on_disk(tmp_path):
    few = Publish(keep_versions=2)
    versions = opened(tmp_path, SCHEMA, publish=few)
    for number in range(140):
        publish(versions, number, constant(number))
    after = opened(tmp_path, SCHEMA, publish=few)  # in memory there may be more
    assert after.earlier(139 - 129) is None
    assert after.earlier(139 - 128)[0] == 11
    assert sorted(versions.fingerprints()) == [138, 139]  # an update may start from fewer


@pytest.mark.parametrize("publishing", [Publish(keep_versions=2, deltas=False), Publish(
    keep_versions=2, format=ModelFormat.FLOAT32)])  # fmt: skip
def test_without_deltas_no_more_versions_stay_than_updates_start_from(publishing):
    assert kept_models(publishing) == 2


def test_fedasync_finds_its_bases_as_they_were_aggregated(tmp_path):
    versions = opened(tmp_path, aggregator=FedAsync())
    models = list(walk(3))
    held = [publish(versions, number, model) for number, model in enumerate(models)]
    store = ModelStore(tmp_path / "models", LARGE, 100)
    for number, model in enumerate(models):
        assert store.base(number).tobytes() == model.tobytes()
        assert store.parameters(number).tobytes() == held[number].parameters.tobytes()
    assert sorted(versions.fingerprints()) == [0, 1, 2]


def test_an_update_for_fedasync_starts_only_from_versions_kept_as_aggregated(tmp_path):
    """The fleet went over from FedBuff, which keeps only what devices hold."""
    models = list(walk(4))
    versions = opened(tmp_path, aggregator=FedBuff())
    for number in range(2):
        publish(versions, number, models[number])
    versions = opened(tmp_path, aggregator=FedAsync())
    assert versions.fingerprints() == {}
    kept = {number: publish(versions, number, models[number]).fingerprint for number in (2, 3)}
    assert versions.fingerprints() == kept


def test_the_journal_keeps_both_fingerprints(tmp_path):
    versions = opened(tmp_path)
    (model,) = walk(1)
    version = publish(versions, 0, model)
    (row,) = Journal(tmp_path / "journal").published()
    assert (row.fingerprint, row.exact) == (version.fingerprint, fingerprint(model))
    assert row.fingerprint != row.exact


def test_where_the_models_were_lost_the_journal_has_what_is_offered_now(tmp_path):
    """What devices held of a version is not in the journal; what they are offered instead must be."""
    models = list(walk(3))
    versions = opened(tmp_path)
    held = [publish(versions, number, model) for number, model in enumerate(models)]
    for file in (tmp_path / "models").iterdir():
        file.unlink()
    again = publish(opened(tmp_path), 2, models[2])
    assert again.fingerprint != held[2].fingerprint  # or this test would say nothing
    *_, row = Journal(tmp_path / "journal").published()
    assert (row.version, row.fingerprint, row.exact) == (2, again.fingerprint, fingerprint(models[2]))


def test_a_fleet_that_goes_over_to_the_grid_begins_it_anew(tmp_path):
    models = list(walk(3))
    versions = opened(tmp_path, publish=FLOAT32)
    publish(versions, 0, models[0])
    versions = opened(tmp_path)
    assert versions.make(0, models[0]).parameters.tobytes() == models[0].tobytes()  # devices hold this one
    following = publish(versions, 1, models[1])
    assert grid_of(following.parameters, LARGE) is not None


def test_the_plans_own_parameters_are_version_zero_of_every_fleet():
    version = ClosedLoop(Publish(), SCHEMA, None).version(0, PLAN.initial)
    assert version == Version.of(0, version.parameters)
    assert np.abs(version.parameters - PLAN.initial).max() <= 0.0625  # half of 1/8: rms 2.9 and 6.5 over 32
