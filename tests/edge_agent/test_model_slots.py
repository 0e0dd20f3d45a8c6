import errno
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import COORDINATOR_KEY, STRANGERS_KEY, Release, tiny_plan
from simulated_disk import Operation, PowerCut, SimulatedDisk

from edge_agent.model_slots import InstalledModel, ModelSlots, WrongModel
from fedtide.wire.disk import UNSYNCED_DISK
from fedtide.wire.errors import WireError
from fedtide.wire.ids import PlanId
from fedtide.wire.plan import seal_plan

KEY: Final = COORDINATOR_KEY.public


def open_slots(directory: Path) -> ModelSlots:
    return ModelSlots(directory, KEY, UNSYNCED_DISK)


def install(slots: ModelSlots, release: Release) -> InstalledModel:
    return slots.install(release.sealed_head, release.head, release.plan_blob, release.content)


def version_on_disk(directory: Path) -> int | None:
    model = open_slots(directory).newest()
    return None if model is None else model.head.version


def is_release(model: InstalledModel, release: Release) -> bool:
    return (
        model.head == release.head
        and model.plan == release.plan
        and np.array_equal(model.parameters, release.parameters)
    )


def test_there_is_no_model_before_the_first(tmp_path: Path) -> None:
    assert open_slots(tmp_path / "models").newest() is None


def test_an_installed_model_is_there_after_a_restart_and_read_only(tmp_path: Path) -> None:
    release = Release(7)
    assert is_release(install(open_slots(tmp_path), release), release)
    model = open_slots(tmp_path).newest()
    assert model is not None
    assert is_release(model, release)
    assert not model.parameters.flags.writeable


def test_models_take_turns_in_two_slots_and_the_newest_is_run(tmp_path: Path) -> None:
    slots = open_slots(tmp_path)
    for version in range(1, 6):
        install(slots, Release(version))
        assert version_on_disk(tmp_path) == version
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.model", "b.model", "plans"]


def test_after_a_restart_the_slot_in_use_is_not_the_one_written_to(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        slots = open_slots(tmp_path)
        slots.newest()
        install(slots, Release(version))
    (tmp_path / "a.model").unlink()
    assert version_on_disk(tmp_path) == 2


def test_a_higher_epoch_is_newer_than_a_higher_version(tmp_path: Path) -> None:
    slots = open_slots(tmp_path)
    install(slots, Release(9, epoch=1))
    install(slots, Release(3, epoch=2))
    assert version_on_disk(tmp_path) == 3


def test_whenever_the_power_is_cut_a_whole_model_is_left_and_it_never_gets_older() -> None:
    rng, disk, models = np.random.default_rng(1), SimulatedDisk(page_bytes=256), Path("/state/models")
    disk.make_directory(models)
    releases = {
        version: Release(version, plan=tiny_plan("line" if version < 4 else "curve"))
        for version in range(1, 6)
    }
    slots, installed, found, states = ModelSlots(models, KEY, disk), 0, set(), 0

    def look(_: Operation) -> None:
        nonlocal states
        for state in disk.crash_states(rng, 25):
            model = ModelSlots(models, KEY, state).newest()
            version = 0 if model is None else model.head.version
            assert version in {installed, installed + 1}
            assert model is None or is_release(model, releases[version])
            found.add((installed, version))
            states += 1

    for release in releases.values():
        disk.watch(look)
        install(slots, release)
        disk.watch(None)
        installed += 1
        look(Operation(0, "syncdir", models))
        assert len(disk.files()) <= 2 + 2  # slots and plans
    assert {(version, version + 1) for version in range(5)} < found
    assert states > 200


def test_what_a_killed_process_installed_is_durable_before_it_is_run() -> None:
    disk, models = SimulatedDisk(), Path("/state/models")
    disk.make_directory(models)
    slots = ModelSlots(models, KEY, disk)
    install(slots, Release(1))

    def kill(operation: Operation) -> None:
        if operation.kind == "replace":
            raise PowerCut

    disk.watch(kill)
    with pytest.raises(PowerCut):
        install(slots, Release(2))
    started = disk.killed()
    again = ModelSlots(models, KEY, started)
    again.take_over()
    model = again.newest()
    assert model is not None
    assert model.head.version == 2
    for state in started.crash_states(np.random.default_rng(1)):
        left = ModelSlots(models, KEY, state).newest()
        assert left is not None
        assert left.head.version == 2


def test_a_slot_that_cannot_be_read_is_not_used_and_the_other_one_is(tmp_path: Path) -> None:
    disk, models = SimulatedDisk(), Path("/state/models")
    disk.make_directory(models)
    slots = ModelSlots(models, KEY, disk)
    install(slots, Release(1))
    install(slots, Release(2))
    disk.fail(lambda operation: errno.EIO if operation.path.name == "b.model" else None)
    model = ModelSlots(models, KEY, disk).newest()
    assert model is not None
    assert model.head.version == 1


def test_plans_that_a_power_cut_left_unfinished_do_not_stay(tmp_path: Path) -> None:
    slots = open_slots(tmp_path)
    install(slots, Release(1))
    (tmp_path / "plans" / f"{tiny_plan('wave').id}.plan.new").write_bytes(b"half of a pl")
    install(slots, Release(2, plan=tiny_plan("curve")))
    plans = {tiny_plan(name).id for name in ("line", "curve")}
    assert {file.name for file in (tmp_path / "plans").iterdir()} == {f"{plan}.plan" for plan in plans}


def test_parameters_that_are_not_the_heads_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    slots, good, next_one = open_slots(tmp_path), Release(1), Release(2)
    install(slots, good)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(WrongModel, match="fingerprint of version 2"):
        slots.install(next_one.sealed_head, next_one.head, next_one.plan_blob, good.content)
    with pytest.raises(WrongModel, match="8 bytes of parameters; the plan has 3"):
        slots.install(next_one.sealed_head, next_one.head, next_one.plan_blob, next_one.content[:8])
    other_plan = Release(2, plan=tiny_plan("curve"))
    with pytest.raises(WrongModel, match=f"the plan is {other_plan.plan.id}; the head names {good.plan.id}"):
        slots.install(next_one.sealed_head, next_one.head, other_plan.plan_blob, next_one.content)
    with pytest.raises(WireError):
        slots.install(
            next_one.sealed_head, next_one.head, seal_plan(tiny_plan(), STRANGERS_KEY), next_one.content
        )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_plan_that_is_damaged_on_disk_is_not_here(tmp_path: Path) -> None:
    """It would be taken for the coordinator's, and refused, for ever."""
    install(open_slots(tmp_path), Release(1))
    (file,) = (tmp_path / "plans").iterdir()
    file.write_bytes(torn(file.read_bytes()))
    slots = open_slots(tmp_path)
    assert slots.newest() is None
    assert slots.plan_blob(Release(2).plan.id) is None
    assert install(slots, Release(2)).head.version == 2
    assert slots.plan_blob(Release(2).plan.id) == Release(2).plan_blob
    assert version_on_disk(tmp_path) == 2


def test_a_plan_is_here_once_it_was_fetched_even_if_its_parameters_are_not(tmp_path: Path) -> None:
    """While a keyframe cannot be had, the plan is not fetched again with every attempt."""
    slots, release = open_slots(tmp_path), Release(1)
    slots.plan(release.plan_blob, release.plan.id)
    assert slots.plan_blob(release.plan.id) == release.plan_blob
    assert slots.plan_blob(tiny_plan("curve").id) is None


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"\0" * 12, lambda _: b"junk", torn, flipped])
def test_a_damaged_slot_is_not_used_and_the_other_one_is(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    slots = open_slots(tmp_path)
    install(slots, Release(1))
    install(slots, Release(2))
    slot = tmp_path / "b.model"
    slot.write_bytes(damage(slot.read_bytes()))
    again = open_slots(tmp_path)
    model = again.newest()
    assert model is not None
    assert model.head.version == 1
    install(again, Release(3))
    assert version_on_disk(tmp_path) == 3


def test_whichever_bit_of_the_newest_slot_flips_it_still_says_which_version_was_run(tmp_path: Path) -> None:
    slots = open_slots(tmp_path)
    assert slots.last_head() is None
    install(slots, Release(1))
    install(slots, Release(2))
    slot = tmp_path / "b.model"
    whole = slot.read_bytes()
    for place in range(len(whole)):
        slot.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        again = open_slots(tmp_path)
        assert version_on_disk(tmp_path) == 1
        assert again.last_head() == Release(2).head


def test_without_a_plan_the_slots_still_say_which_version_was_run(tmp_path: Path) -> None:
    install(open_slots(tmp_path), Release(3))
    (plan,) = (tmp_path / "plans").iterdir()
    plan.unlink()
    again = open_slots(tmp_path)
    assert again.newest() is None
    assert again.last_head() == Release(3).head
    assert ModelSlots(tmp_path, STRANGERS_KEY.public, UNSYNCED_DISK).last_head() is None


def test_a_slot_whose_plan_is_missing_or_damaged_is_not_used(tmp_path: Path) -> None:
    slots = open_slots(tmp_path)
    install(slots, Release(1))
    (plan,) = (tmp_path / "plans").iterdir()
    good = plan.read_bytes()
    plan.write_bytes(good[:-1])
    assert version_on_disk(tmp_path) is None
    plan.unlink()
    assert version_on_disk(tmp_path) is None
    plan.write_bytes(good)
    assert version_on_disk(tmp_path) == 1


def test_a_model_that_another_coordinator_signed_is_not_loaded(tmp_path: Path) -> None:
    slots = open_slots(tmp_path)
    install(slots, Release(1))
    assert ModelSlots(tmp_path, STRANGERS_KEY.public, UNSYNCED_DISK).newest() is None


def test_a_plan_is_kept_under_its_id_and_written_again_when_it_is_damaged(tmp_path: Path) -> None:
    slots, release = open_slots(tmp_path), Release(1)
    assert slots.plan_blob(release.plan.id) is None
    install(slots, release)
    assert slots.plan_blob(release.plan.id) == release.plan_blob
    (tmp_path / "plans" / f"{release.plan.id}.plan").write_bytes(b"damaged")
    after_a_restart = open_slots(tmp_path)
    assert after_a_restart.newest() is None
    install(after_a_restart, Release(2))
    assert version_on_disk(tmp_path) == 2


@pytest.mark.parametrize("name", ["../../etc/passwd", "x", "..", "/", "0g"])
def test_a_name_from_the_network_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    slots, release = open_slots(tmp_path), Release(1)
    with pytest.raises(ValueError, match="hex"):
        slots.plan_blob(PlanId(name))
    head = msgspec.structs.replace(release.head, plan=PlanId(name))
    with pytest.raises(WrongModel, match="the head names"):
        slots.install(release.sealed_head, head, release.plan_blob, release.content)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_plans_of_models_long_gone_are_forgotten(tmp_path: Path) -> None:
    slots = open_slots(tmp_path)
    plans = [tiny_plan(name) for name in ("line", "curve", "wave")]
    for version, plan in enumerate(plans, start=1):
        install(slots, Release(version, plan=plan))
    kept = {file.stem for file in (tmp_path / "plans").iterdir()}
    assert kept == {plans[1].id, plans[2].id}
