import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest
from agent_world import tiny_plan
from simulated_disk import SimulatedDisk, full

from edge_agent.kept_state import NOTHING_KEPT, Kept, KeptFile, own_tensors, with_own_statistics
from fedtide.wire.parameters import Schema, TensorSpec
from fedtide.wire.plan import Plan

MOMENT = TensorSpec(name="o.m", dtype="float32", shape=(2, 2))
STEPS = TensorSpec(name="o.step", dtype="float32", shape=())
COUNT = TensorSpec(name="b.count", dtype="int64", shape=())
SCHEMA = Schema(
    tensors=(
        TensorSpec(name="p.w", dtype="float32", shape=(2,)),
        TensorSpec(name="b.mean", dtype="float32", shape=(3,)),
        TensorSpec(name="b.var", dtype="float32", shape=(1, 2)),
    )
)


def plan(name: str = "line", buffers: str = "local") -> Plan:
    tiny = tiny_plan(name)
    manifest = msgspec.structs.replace(
        tiny.manifest, schema=SCHEMA, local_state=(MOMENT, STEPS), local_buffers=(COUNT,), buffers=buffers
    )
    return Plan(manifest, tiny.train, tiny.evaluation)


def example() -> Kept:
    return Kept(
        optimizer=(np.arange(4, dtype=np.float32).reshape(2, 2), np.array(7, np.float32)),
        statistics=(np.array([1, 2, 3], np.float32), np.array([[4, 5]], np.float32)),
        counters=(np.array(9, np.int64),),
    )


def same(found: Kept, expected: Kept) -> bool:
    return all(
        len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))
        for ours, theirs in (
            (found.optimizer, expected.optimizer),
            (found.statistics, expected.statistics),
            (found.counters, expected.counters),
        )
    )


@pytest.mark.parametrize(
    "kept", [example(), Kept(optimizer=example().optimizer), Kept(statistics=example().statistics)]
)
def test_what_was_kept_is_there_after_a_restart(tmp_path: Path, kept: Kept) -> None:
    KeptFile(tmp_path / "kept").keep(plan(), kept)
    found = KeptFile(tmp_path / "kept").of(plan())
    assert same(found, kept)
    assert [array.dtype for array in found.counters] == [array.dtype for array in kept.counters]


def test_nothing_is_kept_at_first(tmp_path: Path) -> None:
    assert KeptFile(tmp_path / "kept").of(plan()) == NOTHING_KEPT


def test_another_plan_starts_without_it(tmp_path: Path) -> None:
    file = KeptFile(tmp_path / "kept")
    file.keep(plan("one"), example())
    assert not file.of(plan("two"))
    assert not KeptFile(tmp_path / "kept").of(plan("two"))


def test_keeping_nothing_forgets_what_there_was(tmp_path: Path) -> None:
    file = KeptFile(tmp_path / "kept")
    file.keep(plan(), example())
    file.keep(plan(), NOTHING_KEPT)
    assert not file.of(plan())
    assert not KeptFile(tmp_path / "kept").of(plan())


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "short"])
def test_a_damaged_file_is_left_out_with_a_log_line(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kept"
    KeptFile(path).keep(plan(), example())
    whole = path.read_bytes()
    damaged = {
        "flip": whole[:-1] + bytes((whole[-1] ^ 1,)),
        "truncate": whole[:-1],
        "empty": b"",
        "short": whole[:20],
    }
    path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert not KeptFile(path).of(plan())
    assert "not usable" in caplog.text


def test_what_a_full_disk_did_not_take_is_not_kept_in_memory_either() -> None:
    disk, path = SimulatedDisk(), Path("/kept")
    file = KeptFile(path, disk)
    file.keep(plan(), Kept(statistics=example().statistics))
    disk.fail(full)
    with pytest.raises(OSError, match="No space left"):
        file.keep(plan(), example())
    for each in (file, KeptFile(path, disk)):
        assert same(each.of(plan()), Kept(statistics=example().statistics))


def test_what_is_not_finite_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = KeptFile(tmp_path / "kept")
    file.keep(plan(), example())
    spoilt = Kept(optimizer=(np.full((2, 2), np.inf, np.float32), np.array(7, np.float32)))
    file.keep(plan(), spoilt)
    assert not file.of(plan())
    assert not (tmp_path / "kept").exists()
    assert "not finite" in caplog.text


def test_tensors_of_other_sizes_are_not_used(tmp_path: Path) -> None:
    # Whole and of this plan by its id, but not what the plan's manifest lists.
    wrong = Kept(optimizer=(np.zeros(3, np.float32), np.zeros((), np.float32)))
    KeptFile(tmp_path / "kept").keep(plan(), wrong)
    assert not KeptFile(tmp_path / "kept").of(plan())
    KeptFile(tmp_path / "kept").keep(plan(), Kept(optimizer=wrong.optimizer[:1]))
    assert not KeptFile(tmp_path / "kept").of(plan())


def test_own_statistics_take_the_place_of_the_global_ones() -> None:
    parameters = np.full(7, 8, np.float32)
    own = with_own_statistics(plan().manifest, parameters, example())
    assert own.tolist() == [8, 8, 1, 2, 3, 4, 5]
    assert parameters.tolist() == [8] * 7
    assert with_own_statistics(plan().manifest, parameters, NOTHING_KEPT) is parameters


def test_only_local_buffers_are_a_devices_own() -> None:
    assert [tensor.name for tensor, _ in own_tensors(plan().manifest)] == ["b.mean", "b.var"]
    assert not list(own_tensors(plan(buffers="averaged").manifest))
