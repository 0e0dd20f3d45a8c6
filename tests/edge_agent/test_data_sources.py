import io
import os
import zipfile
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pytest
from agent_world import tiny_plan

from edge_agent.data_sources import Csv, DataError, DataSource, Npz
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
SQUARES: Final = msgspec.structs.replace(CLASSES, inputs=(floats("x0", 2, 2),))

X: Final = np.array([[1, 2], [3, 4], [5, 6]], np.float64)
Y: Final = np.array([0, 1, 0], np.int32)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "examples.npz"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "examples.csv"


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
        ({"x": np.where(X == 3, np.nan, X), "y": Y}, CLASSES, "NaN or infinite values for 'x0'"),
        ({"x": np.where(X == 3, np.inf, X), "y": Y}, CLASSES, "NaN or infinite values for 'x0'"),
        ({"x": np.where(X == 3, 1e300, X), "y": Y}, CLASSES, "NaN or infinite values for 'x0'"),
        ({"x": X, "y": [0.0, np.nan, 1.0]}, REGRESSION, "NaN or infinite values for 'y'"),
        ({"x": X, "y": [0.0, 0.5, 1.0]}, CLASSES, "'y' must be whole numbers"),
        ({"x": X, "y": [0.0, np.nan, 1.0]}, CLASSES, "'y' must be whole numbers"),
        ({"x": X, "y": [0.0, 1e30, 1.0]}, CLASSES, "'y' must be whole numbers"),
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


# Tables.


def test_a_table_gives_examples_by_its_columns(table: Path) -> None:
    table.write_text("t,label,p\n1,0,2\n3,1,4\n")
    dataset = Csv(path=table).load(CLASSES)
    assert dataset.inputs[0].tolist() == [[1, 2], [3, 4]]
    assert dataset.inputs[0].dtype == np.float32
    assert dataset.targets is not None
    assert dataset.targets.tolist() == [0, 1]
    assert dataset.targets.dtype == np.int64


def test_a_tables_columns_and_delimiter_are_named_by_the_settings(table: Path) -> None:
    table.write_text("when;p;t;fault\nnoon;2;1;0.5\n")
    dataset = Csv(path=table, label="fault", features=("t", "p"), delimiter=";").load(REGRESSION)
    assert dataset.inputs[0].tolist() == [[1, 2]]
    assert dataset.targets is not None
    assert dataset.targets.tolist() == [0.5]


def test_a_tables_row_fills_the_inputs_shape_in_order(table: Path) -> None:
    table.write_text("a,b,c,d,label\n1,2,3,4,0\n")
    assert Csv(path=table).load(SQUARES).inputs[0].tolist() == [[[1, 2], [3, 4]]]


def test_a_table_for_a_model_that_gives_back_its_input_needs_no_label(table: Path) -> None:
    table.write_text("a,b\n1,2\n")
    dataset = Csv(path=table).load(AUTOENCODER)
    assert dataset.inputs[0].tolist() == [[1, 2]]
    assert dataset.targets is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b,label\n1,2,0\n1,two,0\n", "line 3, column 'b': 'two' is not a number"),
        ("a,b,label\n1,,0\n", "line 2, column 'b': '' is not a number"),
        ("a,b,label\n1,2\n", "line 2, column 'label': None is not a number"),
        ('a,b,label\n"1\n",2,0\n1,x,0\n', "line 4, column 'b'"),
        ("a,b\n1,2\n", "no column 'label'; the table has a, b"),
        ("", "no column 'label'"),
        ("a,b,label\n", "no examples for 'x0'; at least 1 is needed"),
        ("a,b,label\n1,nan,0\n", "NaN or infinite values for 'x0'"),
        ("a,b,label\n1,-inf,0\n", "NaN or infinite values for 'x0'"),
        ("a,b,label\n1,2,0.5\n", "'y' must be whole numbers"),
        ("a,b,label\n1,2,nan\n", "'y' must be whole numbers"),
        ("a,b,c,label\n1,2,3,0\n", "3 columns.*plan takes 2"),
        ("a,label\n1,0\n", "1 columns.*plan takes 2"),
        ('a,b,label\n1,"' + "2" * 200_000 + '",0\n', "field larger"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_line_and_column(
    table: Path, text: str, complaint: str
) -> None:
    table.write_text(text)
    with pytest.raises(DataError, match=complaint) as refused:
        Csv(path=table).load(CLASSES)
    assert str(table) in str(refused.value)


def test_a_table_that_is_no_text_is_refused(table: Path) -> None:
    table.write_bytes(b"a,b,label\n\xff\xfe,2,0\n")
    with pytest.raises(DataError, match="utf-8"):
        Csv(path=table).load(CLASSES)


def test_a_table_has_one_input_only(table: Path) -> None:
    table.write_text("a,b,label\n1,2,0\n")
    with pytest.raises(DataError, match="the plan takes 2 inputs, not 1"):
        Csv(path=table).load(TWO_INPUTS)


# Files.


@pytest.mark.parametrize("kind", [Npz, Csv])
def test_a_missing_file_is_a_data_error_that_names_it(tmp_path: Path, kind: type[Npz | Csv]) -> None:
    source = kind(path=tmp_path / "not there")
    with pytest.raises(DataError, match="not there"):
        source.load(CLASSES)
    with pytest.raises(DataError, match="not there"):
        source.changed_since(None)


def test_a_file_that_was_written_again_has_another_stamp(table: Path) -> None:
    source = Csv(path=table)
    table.write_text("a,b,label\n1,2,0\n")
    stamp = source.changed_since(None)
    assert stamp is not None
    assert source.changed_since(stamp) is None
    os.utime(table, ns=(0, 1))
    assert source.changed_since(stamp) == (1, stamp[1])
