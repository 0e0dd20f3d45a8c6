import io
import os
import zipfile
from pathlib import Path
from typing import Final, get_args

import msgspec
import numpy as np
import pytest
from agent_world import tiny_plan

from edge_agent.data_sources import Csv, Custom, DataError, DataSource, Npz, Sensor, Windows
from edge_agent.dataset import Skipped
from edge_agent.plan_session import check_dataset
from edge_agent.readings import Channel
from edge_agent.values import NOT_FINITE, NOT_WHOLE
from edge_agent.window_ring import WindowRing
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.plan import PlanManifest
from fedtide.wire.settings import parse


def floats(name: str, *shape: int | None) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(None, *shape))


LABELS: Final = TensorSpec(name="y", dtype="int64", shape=(None,))
CLASSES: Final = msgspec.structs.replace(tiny_plan().manifest, inputs=(floats("x0", 2),), targets=LABELS)
REGRESSION: Final = msgspec.structs.replace(CLASSES, targets=floats("y"))
AUTOENCODER: Final = msgspec.structs.replace(CLASSES, targets=None)
TWO_INPUTS: Final = msgspec.structs.replace(CLASSES, inputs=(floats("x0", 2), floats("x1", 3)))
KINDS: Final = sorted(kind.__struct_config__.tag for kind in get_args(DataSource))

X: Final = np.array([[1, 2], [3, 4], [5, 6]], np.float64)
Y: Final = np.array([0, 1, 0], np.int32)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "examples.npz"


def test_a_source_is_chosen_by_its_kind(tmp_path: Path) -> None:
    class Settings(msgspec.Struct):
        data: DataSource

    def read(text: str) -> object:
        return parse(text, Settings, "agent.toml", tmp_path).data

    assert read('data = {kind = "npz", path = "a.npz"}') == Npz(path=tmp_path / "a.npz")
    chosen = read('data = {kind = "csv", path = "a.csv", label = "fault", features = ["t", "p"]}')
    assert chosen == Csv(path=tmp_path / "a.csv", label="fault", features=("t", "p"))


def saved(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the first for a keyword
    return buffer.getvalue()


# Numpy archives.


def test_an_archive_gives_examples_in_the_plans_dtypes(archive: Path) -> None:
    np.savez(archive, x=X, y=Y)
    dataset = Npz(path=archive).load(CLASSES)
    assert dataset.inputs[0].dtype == np.float32
    assert dataset.inputs[0].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert dataset.targets is not None
    assert dataset.targets.dtype == np.int64
    assert dataset.targets.tolist() == [0, 1, 0]
    assert len(dataset) == 3


def test_an_archives_arrays_are_named_by_the_settings(archive: Path) -> None:
    np.savez(archive, left=X, right=np.ones((3, 3)), fault=Y, notes=np.zeros(7))
    dataset = Npz(path=archive, inputs=("left", "right"), targets="fault").load(TWO_INPUTS)
    assert [array.shape for array in dataset.arrays] == [(3, 2), (3, 3), (3,)]


def test_a_model_that_gives_back_its_input_needs_no_targets(archive: Path) -> None:
    np.savez(archive, x=X)
    assert Npz(path=archive).load(AUTOENCODER).targets is None


@pytest.mark.parametrize(
    ("arrays", "manifest", "complaint"),
    [
        ({"features": X, "y": Y}, CLASSES, "no array 'x'; the archive has features, y"),
        ({"x": X}, CLASSES, "no array 'y'; the archive has x"),
        ({"x": X, "y": Y}, TWO_INPUTS, "the plan takes 2 inputs, not 1"),
        ({"x": X[:, :1], "y": Y}, CLASSES, r"'x0' have shape \(1,\); the plan takes \(2,\)"),
        ({"x": X.reshape(3, 2, 1), "y": Y}, CLASSES, r"shape \(2, 1\); the plan takes \(2,\)"),
        ({"x": X, "y": Y.reshape(3, 1)}, CLASSES, r"'y' have shape \(1,\); the plan takes \(\)"),
        ({"x": X, "y": np.array(7)}, CLASSES, "'y'"),
        ({"x": np.array(7.0), "y": Y}, CLASSES, "'x0'"),
        ({"x": X[:0], "y": Y[:0]}, CLASSES, "no examples for 'x0'; at least 1 is needed"),
        ({"x": X, "y": Y[:2]}, CLASSES, "arrays of one length"),
        (
            {"x": X * np.nan, "y": Y},
            CLASSES,
            "no good example: example 1: NaN, infinite or too large in 'x0'",
        ),
        ({"x": X, "y": Y + 0.5}, CLASSES, "no good example: example 1: not a whole number in 'y'"),
        ({"x": X, "y": ["ok", "ok", "bad"]}, CLASSES, "'y'|invalid literal"),
        ({"x": X + 1j, "y": Y}, CLASSES, "'x0'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_the_reason(
    archive: Path, arrays: dict[str, object], manifest: PlanManifest, complaint: str
) -> None:
    archive.write_bytes(saved(**arrays))
    with pytest.raises(DataError, match=complaint) as refused:
        Npz(path=archive).load(manifest)
    assert str(archive) in str(refused.value)


@pytest.mark.parametrize(
    ("arrays", "manifest", "kept", "skipped"),
    [
        ({"x": np.where(X == 3, np.nan, X), "y": Y}, CLASSES, [0, 2], f"{NOT_FINITE} in 'x0'"),
        ({"x": np.where(X == 3, np.inf, X), "y": Y}, CLASSES, [0, 2], f"{NOT_FINITE} in 'x0'"),
        ({"x": np.where(X == 3, 1e300, X), "y": Y}, CLASSES, [0, 2], f"{NOT_FINITE} in 'x0'"),
        ({"x": X, "y": [0.0, np.nan, 1.0]}, REGRESSION, [0, 2], f"{NOT_FINITE} in 'y'"),
        ({"x": X, "y": [0.0, 1.0, 0.5]}, CLASSES, [0, 1], f"{NOT_WHOLE} in 'y'"),
        ({"x": X, "y": [np.nan, 0.0, 1.0]}, CLASSES, [1, 2], f"{NOT_WHOLE} in 'y'"),
        ({"x": X, "y": [1e30, 0.0, 1.0]}, CLASSES, [1, 2], f"{NOT_WHOLE} in 'y'"),
    ],
)
def test_a_bad_example_of_an_archive_is_skipped_and_counted(
    archive: Path, arrays: dict[str, object], manifest: PlanManifest, kept: list[int], skipped: str
) -> None:
    archive.write_bytes(saved(**arrays))
    dataset = Npz(path=archive).load(manifest)
    assert dataset.inputs[0].tolist() == X[kept].tolist()
    [bad] = {0, 1, 2} - set(kept)
    assert dataset.skipped == (Skipped(skipped, 1, f"example {bad + 1}: {skipped}"),)


def test_an_example_that_is_bad_twice_is_counted_once(archive: Path) -> None:
    archive.write_bytes(saved(x=np.where(X == 3, np.nan, X), y=[0.0, 0.5, 1.0]))
    dataset = Npz(path=archive).load(CLASSES)
    assert len(dataset) == 2
    assert [skip.count for skip in dataset.skipped] == [1]


def one_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, X)
    return buffer.getvalue()


def bad_checksum() -> bytes:
    content = bytearray(saved(x=X, y=Y))
    content[content.index(X.tobytes())] ^= 1
    return bytes(content)


def not_arrays() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x.npy", "no array")
        file.writestr("y.npy", "")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 and no more",
        b"x,y\n1,2\n",
        saved(x=X, y=Y)[:-10],
        saved(x=X, y=Y)[:100],
        bad_checksum(),
        not_arrays(),
        one_array(),
        saved(x=np.array([{"a": "pickle"}], object), y=Y),
    ],
    ids=[
        "empty", "zip header", "text", "cut", "cut early", "bad checksum", "no arrays", "npy", "pickle"
    ],
)  # fmt: skip
def test_a_file_that_is_no_whole_archive_of_arrays_is_refused(archive: Path, content: bytes) -> None:
    archive.write_bytes(content)
    with pytest.raises(DataError) as refused:
        Npz(path=archive).load(CLASSES)
    assert str(archive) in str(refused.value)


# Files.


@pytest.mark.parametrize("kind", [Npz, Csv, Windows])
def test_a_missing_file_is_a_data_error_that_names_it(
    tmp_path: Path, kind: type[Npz | Csv | Windows]
) -> None:
    source = kind(path=tmp_path / "not there")
    with pytest.raises(DataError, match="not there"):
        source.load(CLASSES)
    with pytest.raises(DataError, match="not there"):
        source.changed_since(None)


def test_a_file_that_was_written_again_has_another_stamp(archive: Path) -> None:
    source = Npz(path=archive)
    archive.write_text("x")
    stamp = source.changed_since(None)
    assert stamp is not None
    assert source.changed_since(stamp) is None
    os.utime(archive, ns=(0, 1))
    assert source.changed_since(stamp) == (1, 1)


# Every kind.


def a_source(kind: str, folder: Path) -> DataSource:
    """A source of this kind with the examples ``X`` and, where the kind has labels, ``Y``."""
    match kind:
        case "npz":
            np.savez(folder / "a.npz", x=X, y=Y)
            return Npz(path=folder / "a.npz")
        case "csv":
            (folder / "a.csv").write_text("t,p,label\n1,2,0\n3,4,1\n5,6,0\n")
            return Csv(path=folder / "a.csv")
        case "windows":
            np.savez(folder / "a.npz", x=X, y=Y)
            return Windows(path=folder)
        case "sensor":
            channels = (Channel(topic="s", field="t"), Channel(topic="s", field="p"))
            source = Sensor(path=folder, channels=channels, window=1)
            WindowRing(folder, source.layout, source.max_bytes).append(X.astype(np.float32))
            return source
        case "custom":
            (folder / "their_source.py").write_text(THEIR_SOURCE)
            return Custom(class_=folder / "their_source:Theirs", options={"first": 1.0})
    raise AssertionError(f"say here how to make a source of kind {kind!r}")


THEIR_SOURCE: Final = """
from edge_agent.data_sources import Examples

class Theirs:
    def __init__(self, first):
        self.first = first

    def stamp(self):
        return self.first

    def examples(self):
        return Examples(inputs=[[self.first, 2], [3, 4], [5, 6]], targets=[0, 1, 0])
"""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_contiguous_examples_in_the_plans_dtypes(kind: str, tmp_path: Path) -> None:
    reader = a_source(kind, tmp_path).opened()
    dataset = reader.load(AUTOENCODER)
    assert dataset.inputs[0].tolist() == X.tolist()
    assert dataset.inputs[0].dtype == np.float32
    assert dataset.inputs[0].flags.c_contiguous
    assert dataset.targets is None
    assert dataset.skipped == ()
    check_dataset(AUTOENCODER, dataset)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sensor"])
def test_every_kind_but_a_sensor_gives_labels(kind: str, tmp_path: Path) -> None:
    dataset = a_source(kind, tmp_path).opened().load(CLASSES)
    assert dataset.targets is not None
    assert dataset.targets.tolist() == [0, 1, 0]
    check_dataset(CLASSES, dataset)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_no_new_examples_until_some_come(kind: str, tmp_path: Path) -> None:
    reader = a_source(kind, tmp_path).opened()
    first = reader.load(AUTOENCODER)
    assert first.new_since(0) == 3
    assert reader.load(AUTOENCODER).new_since(first.newest) == 0
    stamp = reader.changed_since(None)
    assert stamp is not None
    assert reader.changed_since(stamp) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_refuses_a_plan_of_other_shapes(kind: str, tmp_path: Path) -> None:
    wide = msgspec.structs.replace(AUTOENCODER, inputs=(floats("x0", 7),))
    with pytest.raises(DataError, match="7"):
        a_source(kind, tmp_path).opened().load(wide)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_how_many_examples_a_training_needs(kind: str, tmp_path: Path) -> None:
    source = a_source(kind, tmp_path)
    assert (source.min_examples, source.min_new_examples) == (1, 0)
