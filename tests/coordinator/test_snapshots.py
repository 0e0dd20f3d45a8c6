"""Models and snapshots on disk: whole or not used, few, and readable by others."""

import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_fleet import (
    DEVICES,
    PLAN,
    SCHEMA,
    assert_same_state,
    constant,
    make_settings,
    make_update,
)

from coordinator.aggregation import FedBuff
from coordinator.marks import Mark
from coordinator.model_store import ModelStore
from coordinator.server_optimizers import Adam
from coordinator.settings import Journal, Publish
from fedtide.wire.messages import Verdict

ADAM = make_settings(aggregator=FedBuff(goal=2), server_optimizer=Adam())


def fill(bench, number, first=1):
    for counter in range(first, first + number):
        bench.send(make_update(constant(float(counter)), counter=counter))


def snapshot_files(tmp_path):
    return sorted((tmp_path / "state" / "journal").glob("*.safetensors"))


def test_a_snapshot_brings_back_everything(open_bench):
    bench = open_bench(ADAM)
    fill(bench, 5)  # two versions, and one update in the buffer
    bench.snapshot()
    bench.close()
    again = open_bench(ADAM)
    assert again.recovered.replayed == 0
    assert_same_state(again.state, bench.state)
    fill(again, 1, first=6)
    assert again.state.version == 3


def test_after_a_snapshot_only_later_entries_are_replayed(open_bench):
    bench = open_bench(ADAM)
    fill(bench, 3)
    bench.snapshot()
    fill(bench, 2, first=4)
    bench.close()
    again = open_bench(ADAM)
    assert again.recovered.replayed == 2
    assert_same_state(again.state, bench.state)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "removed"])
def test_a_damaged_snapshot_gives_way_to_the_one_before(open_bench, tmp_path, damage):
    bench = open_bench(ADAM)
    fill(bench, 3)
    bench.snapshot()
    fill(bench, 2, first=4)
    bench.snapshot()
    bench.close()
    newest = snapshot_files(tmp_path)[-1]
    content = newest.read_bytes()
    match damage:
        case "flipped":
            newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "truncated":
            newest.write_bytes(content[: len(content) // 2])
        case "emptied":
            newest.write_bytes(b"")
        case "removed":
            newest.unlink()
    again = open_bench(ADAM)
    assert again.recovered.replayed == 2
    assert_same_state(again.state, bench.state)


def test_without_any_whole_snapshot_the_journal_is_replayed_from_its_start(open_bench, tmp_path):
    bench = open_bench(ADAM)
    fill(bench, 3)
    bench.snapshot()
    fill(bench, 2, first=4)
    bench.snapshot()
    bench.close()
    for file in snapshot_files(tmp_path):
        file.write_bytes(file.read_bytes()[:-1])
    again = open_bench(ADAM)
    assert again.recovered.replayed == 1 + 5  # the plan's parameters and five updates
    assert_same_state(again.state, bench.state)


def test_a_snapshot_begins_a_segment_at_the_record_after_it(open_bench, tmp_path):
    bench = open_bench(ADAM)
    fill(bench, 3)
    before = bench.journal.last_sequence()
    bench.snapshot()
    fill(bench, 2, first=4)
    names = sorted(file.name for file in (tmp_path / "state" / "journal").iterdir())
    assert names == [
        "000000000001.segment",
        f"{before + 1:012d}.safetensors",
        f"{before + 1:012d}.segment",
        "end",
    ]
    assert [snapshot.ledger.sequence for snapshot in bench.journal.snapshots()] == [before]


def test_a_snapshot_taken_twice_after_the_same_record_is_one(open_bench, tmp_path):
    bench = open_bench(ADAM)
    fill(bench, 1)
    bench.snapshot()
    bench.snapshot()
    assert len(snapshot_files(tmp_path)) == 1
    bench.close()
    assert_same_state(open_bench(ADAM).state, bench.state)


def small(**bounds):
    return make_settings(aggregator=FedBuff(goal=2), server_optimizer=Adam(), journal=Journal(**bounds))


def test_the_oldest_segments_go_when_all_are_longer_than_allowed(open_bench, tmp_path):
    bench = open_bench(small(keep_bytes=16_000))
    for counter in range(1, 13):
        fill(bench, 4, first=10 * counter)
        bench.snapshot()
    directory = tmp_path / "state" / "journal"
    assert sum(file.stat().st_size for file in directory.iterdir()) < 16_000 + 5_000
    segments = sorted(int(file.stem) for file in directory.glob("*.segment"))
    assert 3 < len(segments) < 12
    assert [int(file.stem) for file in snapshot_files(tmp_path)] == segments  # each begins with one
    bench.close()
    again = open_bench(small(keep_bytes=16_000))
    assert_same_state(again.state, bench.state)
    assert (again.journal.marks(), again.journal.totals()) == (bench.journal.marks(), bench.journal.totals())


def test_however_little_may_be_kept_two_snapshots_are(open_bench, tmp_path):
    bench = open_bench(small(keep_bytes=1))
    for counter in range(1, 6):
        fill(bench, 1, first=counter)
        bench.snapshot()
    assert len(snapshot_files(tmp_path)) == 2
    bench.close()
    newest = snapshot_files(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert_same_state(open_bench(small(keep_bytes=1)).state, bench.state)


def test_records_that_are_no_longer_kept_are_not_silently_left_out(open_bench):
    bench = open_bench(small(keep_bytes=1))
    for counter in range(1, 6):
        fill(bench, 1, first=counter)
        bench.snapshot()
    with pytest.raises(FileNotFoundError, match=r"records before \d+ are no longer kept"):
        list(bench.journal.entries_after(0))


def test_a_snapshot_with_the_marks_of_a_hundred_thousand_devices_takes_well_under_a_second(open_bench):
    bench = open_bench(ADAM)
    for number in range(100_000):
        device = f"device-{number}"
        bench.journal.ledger.marks[device] = Mark(device, number, 2**63 - 1, Verdict.APPLIED, applied=number)
    begun = time.process_time()
    fill(bench, 1)
    bench.snapshot()
    assert time.process_time() - begun < 1.0
    bench.close()
    assert open_bench(ADAM).journal.marks() == bench.journal.marks()


def test_folding_after_recovery_does_not_write_to_the_snapshot(open_bench, tmp_path):
    bench = open_bench(ADAM)
    fill(bench, 1)
    bench.snapshot()
    bench.close()
    before = snapshot_files(tmp_path)[0].read_bytes()
    again = open_bench(ADAM)
    again.send(make_update(counter=2, device=DEVICES[1]))
    assert snapshot_files(tmp_path)[0].read_bytes() == before


def test_a_published_model_is_a_file_of_named_tensors(open_bench, tmp_path):
    open_bench(make_settings())
    tensors = load_file(tmp_path / "state" / "models" / "000000000000.safetensors")
    assert set(tensors) == {"p.weight", "p.bias"}
    np.testing.assert_array_equal(tensors["p.weight"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(tensors["p.bias"], [6, 7])


def test_only_the_last_models_stay_on_disk(open_bench, tmp_path):
    publish = Publish(keep_versions=2, deltas=False)
    bench = open_bench(make_settings(aggregator=FedBuff(goal=1), publish=publish))
    for counter in range(1, 4):
        base_version = max(bench.writer.published)
        base_sha256 = bench.writer.published[base_version]
        bench.send(make_update(counter=counter, base_version=base_version, base_sha256=base_sha256))
        bench.publish()
    names = sorted(file.stem for file in (tmp_path / "state" / "models").glob("*.safetensors"))
    assert [int(name) for name in names] == [2, 3]
    assert sorted(bench.writer.published) == [2, 3]


def test_a_kept_model_is_read_back_after_a_restart(tmp_path):
    ModelStore(tmp_path, SCHEMA, keep=2).save(7, constant(3.5))
    store = ModelStore(tmp_path, SCHEMA, keep=2)
    assert store.parameters(7).tolist() == [3.5] * PLAN.initial.size
    with pytest.raises(FileNotFoundError):
        store.parameters(6)


def test_models_in_memory_are_bounded(tmp_path):
    """Twenty versions of 16 MiB: 64 MiB hold four of them."""
    schema = type(SCHEMA)(tensors=(type(SCHEMA.tensors[0])(name="p", dtype="float32", shape=(4 << 20,)),))
    store = ModelStore(tmp_path, schema, keep=1)
    parameters = np.zeros(schema.size, np.float32)
    for version in range(6):
        store.save(version, parameters)
        store.remove_old()
    assert sorted(store._recent) == [2, 3, 4, 5]
