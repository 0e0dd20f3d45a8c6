"""Tables: typed columns, labels, windows, and rows that are no use."""

from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest
from agent_world import tiny_plan
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.data_sources import Csv, DataError, DataSource
from edge_agent.dataset import Dataset
from edge_agent.values import MISSING, NOT_A_NUMBER, NOT_FINITE, NOT_WHOLE, UNKNOWN_CLASS, Scale
from fedtide.cli.predict import read_inputs
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.plan import PlanManifest
from fedtide.wire.settings import SettingsError, parse


def floats(name: str, *shape: int | None) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(None, *shape))


LABELS: Final = TensorSpec(name="y", dtype="int64", shape=(None,))
CLASSES: Final = msgspec.structs.replace(tiny_plan().manifest, inputs=(floats("x0", 2),), targets=LABELS)
REGRESSION: Final = msgspec.structs.replace(CLASSES, targets=floats("y"))
AUTOENCODER: Final = msgspec.structs.replace(CLASSES, targets=None)


def taking(*shape: int, targets: TensorSpec | None = None) -> PlanManifest:
    return msgspec.structs.replace(CLASSES, inputs=(floats("x0", *shape),), targets=targets)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "examples.csv"


def targets(dataset: Dataset) -> list[float]:
    assert dataset.targets is not None
    values: list[float] = dataset.targets.tolist()
    return values


def skips(dataset: Dataset) -> list[tuple[str, int, str]]:
    return [(each.reason, each.count, each.first) for each in dataset.skipped]


def test_a_table_gives_examples_by_its_columns(table: Path) -> None:
    table.write_text("t,label,p\n1,0,2\n3,1,4\n")
    dataset = Csv(path=table).load(CLASSES)
    assert dataset.inputs[0].tolist() == [[1, 2], [3, 4]]
    assert dataset.inputs[0].dtype == np.float32
    assert dataset.targets is not None
    assert dataset.targets.tolist() == [0, 1]
    assert dataset.targets.dtype == np.int64


def test_columns_delimiter_and_decimal_are_named_by_the_settings(table: Path) -> None:
    table.write_text("when;p;t;fault\nnoon;2,25;-1e1;0,5\n")
    source = Csv(path=table, label="fault", features=("t", "p"), delimiter=";", decimal=",")
    dataset = source.load(REGRESSION)
    assert dataset.inputs[0].tolist() == [[-10, 2.25]]
    assert targets(dataset) == [0.5]


def test_the_file_of_a_spreadsheet_may_begin_with_a_byte_order_mark(table: Path) -> None:
    table.write_bytes(b"\xef\xbb\xbfa, b ,label\r\n 1 ,2,0\r\n\r\n3,4,1")
    assert Csv(path=table).load(CLASSES).inputs[0].tolist() == [[1, 2], [3, 4]]


def test_a_row_fills_the_inputs_shape_in_order(table: Path) -> None:
    table.write_text("a,b,c,d,label\n1,2,3,4,0\n")
    assert Csv(path=table).load(taking(2, 2)).inputs[0].tolist() == [[[1, 2], [3, 4]]]


def test_a_label_fills_a_target_of_one_value(table: Path) -> None:
    table.write_text("a,b,label\n1,2,0.5\n3,4,1.5\n")
    assert targets(Csv(path=table).load(taking(2, targets=floats("y", 1)))) == [[0.5], [1.5]]


def test_a_model_that_gives_back_its_input_needs_no_label(table: Path) -> None:
    table.write_text("a,b\n1,2\n")
    dataset = Csv(path=table).load(AUTOENCODER)
    assert dataset.inputs[0].tolist() == [[1, 2]]
    assert dataset.targets is None


def test_columns_are_scaled_alike_in_the_whole_fleet(table: Path) -> None:
    table.write_text("t,p,label\n25,1000,0\n15,990,1\n")
    source = Csv(path=table, scale={"t": Scale(mean=20, deviation=5), "p": Scale(deviation=100)})
    # (25 − 20) / 5 = 1, (15 − 20) / 5 = −1; 1000 / 100 = 10, 990 / 100 = 9.9
    assert source.load(CLASSES).inputs[0].tolist() == [[1, 10], [-1, np.float32(9.9)]]


def test_the_label_may_be_scaled_too(table: Path) -> None:
    table.write_text("a,b,label\n1,2,30\n3,4,10\n")
    # (30 − 20) / 5 = 2, (10 − 20) / 5 = −2
    assert targets(Csv(path=table, scale={"label": Scale(mean=20, deviation=5)}).load(REGRESSION)) == [2, -2]


def test_on_and_off_are_one_and_zero(table: Path) -> None:
    table.write_text("a,b,label\nON,false,0\noff,True,1\n")
    assert Csv(path=table).load(CLASSES).inputs[0].tolist() == [[1, 0], [0, 1]]


def test_a_column_of_categories_becomes_one_input_each(table: Path) -> None:
    table.write_text("mode,t,label\nheat,1,0\noff,2,1\nboost,3,1\n")
    source = Csv(path=table, categories={"mode": ("off", "heat")})
    dataset = source.load(taking(3, targets=LABELS))
    assert dataset.inputs[0].tolist() == [[0, 1, 1], [1, 0, 2]]
    assert skips(dataset) == [
        (UNKNOWN_CLASS, 1, "line 4, column 'mode': 'boost' is not among the classes")
    ]  # fmt: skip


def test_labels_may_be_text(table: Path) -> None:
    table.write_text("a,b,label\n1,2,sit\n3,4,walk\n5,6,run\n")
    dataset = Csv(path=table, classes=("walk", "sit")).load(CLASSES)
    assert targets(dataset) == [1, 0]
    assert skips(dataset) == [(UNKNOWN_CLASS, 1, "line 4, column 'label': 'run' is not among the classes")]


@pytest.mark.parametrize(
    ("row", "reason", "first"),
    [
        ("1,two,0", NOT_A_NUMBER, "line 3, column 'b': 'two' is not a number"),
        ("1,1_0,0", NOT_A_NUMBER, "line 3, column 'b': '1_0' is not a number"),
        ("1,,0", MISSING, "line 3, column 'b': missing"),
        ("1,2", MISSING, "line 3, column 'label': missing"),
        ("1,nan,0", NOT_FINITE, "line 3, column 'b': nan is NaN, infinite or too large"),
        ("1,-inf,0", NOT_FINITE, "line 3, column 'b': -inf is NaN, infinite or too large"),
        ("1,1e39,0", NOT_FINITE, "line 3, column 'b': 1e+39 is NaN, infinite or too large"),
        ("1,2,0.5", NOT_WHOLE, "line 3, column 'label': '0.5' is not a whole number"),
        ("1,2,0,9", "more values than columns", "line 3, more values than columns"),
        ('"1\n",x,0', NOT_A_NUMBER, "line 4, column 'b': 'x' is not a number"),
        (
            '1,"' + "2" * 200_000 + '",0',
            "not readable as a row",
            "line 3: field larger than field limit (131072)",
        ),
        ("\x00\ufffd,2,0", NOT_A_NUMBER, "line 3, column 'a': '\\x00\ufffd' is not a number"),
    ],
)
def test_a_bad_row_is_skipped_and_counted_with_its_place(
    table: Path, row: str, reason: str, first: str
) -> None:
    table.write_text(f"a,b,label\n1,2,0\n{row}\n3,4,1\n")
    dataset = Csv(path=table).load(CLASSES)
    assert dataset.inputs[0].tolist() == [[1, 2], [3, 4]]
    assert skips(dataset) == [(reason, 1, first)]


def test_bad_rows_are_counted_by_reason_and_the_first_of_each_is_told(table: Path) -> None:
    table.write_text("a,b,label\nx,2,0\n1,2,0\n1,,0\n1,y,0\n")
    dataset = Csv(path=table).load(CLASSES)
    assert skips(dataset) == [
        (NOT_A_NUMBER, 2, "line 2, column 'a': 'x' is not a number"),
        (MISSING, 1, "line 4, column 'b': missing"),
    ]


def test_a_bad_value_in_a_column_that_is_not_read_does_not_matter(table: Path) -> None:
    table.write_text("a,note,b,label\n1,???,2,no label\n")
    assert Csv(path=table, features=("a", "b")).load(AUTOENCODER).skipped == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b,label\n1,two,0\n1,2,x\n", "no good row: line 2, column 'b': 'two' is not a number"),
        ("a,b,label\nx\n" * 1000, "no good row: line 2, column 'a': 'x'"),
        ("a,b\n1,2\n", "no column 'label'; the table has a, b"),
        ("a,a,label\n1,2,0\n", "column 'a' is there 2 times"),
        ("", "no column 'label'"),
        ("a,b,label\n", "no examples for 'x0'; at least 1 is needed"),
        ("a,b,c,label\n1,2,3,0\n", "3 columns.*plan takes 2"),
        ("a,label\n1,0\n", "1 columns.*plan takes 2"),
        ('"' + "a" * 200_000 + '"\n', "field larger"),
    ],
)
def test_a_table_of_which_nothing_can_be_used_is_refused_with_the_reason(
    table: Path, text: str, complaint: str
) -> None:
    table.write_text(text)
    with pytest.raises(DataError, match=complaint) as refused:
        Csv(path=table).load(CLASSES)
    assert str(table) in str(refused.value)


def test_a_file_that_is_no_table_is_refused(table: Path) -> None:
    table.write_bytes(bytes(range(256)) * 50)
    with pytest.raises(DataError, match="no column 'label'"):
        Csv(path=table).load(CLASSES)


def test_a_table_has_one_input_only(table: Path) -> None:
    table.write_text("a,b,label\n1,2,0\n")
    two = msgspec.structs.replace(CLASSES, inputs=(floats("x0", 2), floats("x1", 3)))
    with pytest.raises(DataError, match="the plan takes 2 inputs, not 1"):
        Csv(path=table).load(two)


@given(content=st.binary(max_size=200))
def test_no_content_does_worse_than_a_data_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"a,b,label\n1,2,0\n" + content)
    dataset = Csv(path=path).load(CLASSES)
    assert dataset.inputs[0][0].tolist() == [1, 2]


def test_memory_is_bounded_by_the_newest_rows(table: Path) -> None:
    rows = range(1000)
    table.write_text("a,b,label\n" + "".join(f"{row},0,{row}\n" for row in rows))
    dataset = Csv(path=table, max_bytes=1200).load(CLASSES)
    # 1200 bytes / (3 columns · 4 bytes) = 100 rows
    assert targets(dataset) == list(range(900, 1000))
    assert dataset.newest == 1000
    assert dataset.new_since(990) == 10


def test_rows_that_were_appended_are_new(table: Path) -> None:
    source = Csv(path=table)
    table.write_text("a,b,label\n1,2,0\nx,2,0\n")
    mark = source.load(CLASSES).newest
    assert mark == 1
    table.write_text("a,b,label\n1,2,0\nx,2,0\n3,4,0\n5,6,1\n")
    assert source.load(CLASSES).new_since(mark) == 2


# Windows.


def counted(rows: int, columns: str = "a,label") -> str:
    """A table whose column ``a`` counts from 0."""
    return columns + "\n" + "".join(f"{row},{row % 3}\n" for row in range(rows))


def test_rows_become_windows_and_the_last_row_gives_the_label(table: Path) -> None:
    table.write_text(counted(7))
    dataset = Csv(path=table, window=3, stride=2).load(taking(3, targets=LABELS))
    # windows at rows 0, 2 and 4; labels of rows 2, 4 and 6, modulo 3
    assert dataset.inputs[0].tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert targets(dataset) == [2, 1, 0]


def test_windows_do_not_overlap_unless_a_stride_says_so(table: Path) -> None:
    table.write_text(counted(7))
    dataset = Csv(path=table, window=3).load(taking(3))
    assert dataset.inputs[0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("labels", "majority"),
    [("0110", 0), ("1101", 1), ("2210", 2), ("0122", 2), ("3333", 3)],
)  # fmt: skip
def test_the_most_frequent_label_may_be_a_windows(table: Path, labels: str, majority: int) -> None:
    table.write_text("a,label\n" + "".join(f"1,{label}\n" for label in labels))
    dataset = Csv(path=table, window=4, window_label="majority").load(taking(4, targets=LABELS))
    assert targets(dataset) == [majority]


def test_measurements_have_no_majority(table: Path) -> None:
    table.write_text("a,label\n" + "".join(f"1,{row / 7}\n" for row in range(1002)))
    source = Csv(path=table, window=2, window_label="majority")
    with pytest.raises(DataError, match="1002 distinct labels are no classes"):
        source.load(taking(2, targets=floats("y")))


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((3, 2), [[0, 5], [1, 6], [2, 7]]),  # (rows, channels): recurrent nets, transformers
        ((2, 3), [[0, 1, 2], [5, 6, 7]]),  # (channels, rows): 1-D convolutions
        ((6,), [0, 5, 1, 6, 2, 7]),  # row after row: dense nets
    ],
)
def test_a_window_is_turned_as_the_plan_takes_it(
    table: Path, shape: tuple[int, ...], window: list[Any]
) -> None:
    table.write_text("a,b\n0,5\n1,6\n2,7\n")
    assert Csv(path=table, window=3).load(taking(*shape)).inputs[0].tolist() == [window]


def test_a_square_window_needs_to_be_told_which_way_round(table: Path) -> None:
    table.write_text("a,b\n0,5\n1,6\n")
    with pytest.raises(DataError, match="in both orders: set channels_first"):
        Csv(path=table, window=2).load(taking(2, 2))
    loaded = [
        Csv(path=table, window=2, channels_first=first).load(taking(2, 2)).inputs[0].tolist()
        for first in (False, True)
    ]
    assert loaded == [[[[0, 5], [1, 6]]], [[[0, 1], [5, 6]]]]


def test_channels_first_flattens_channel_after_channel(table: Path) -> None:
    table.write_text("a,b\n0,5\n1,6\n")
    dataset = Csv(path=table, window=2, channels_first=True).load(taking(4))
    assert dataset.inputs[0].tolist() == [[0, 1, 5, 6]]


def test_windows_of_another_shape_are_refused_with_what_would_fit(table: Path) -> None:
    table.write_text("a,b\n0,5\n1,6\n2,7\n")
    with pytest.raises(DataError, match=r"shape \(2, 3\) or \(3, 2\) or \(6,\); the plan takes \(4, 2\)"):
        Csv(path=table, window=3).load(taking(4, 2))
    with pytest.raises(DataError, match=r"the plan takes \(2, 3\)"):
        Csv(path=table, window=3, channels_first=False).load(taking(2, 3))


def test_a_window_never_spans_a_skipped_row(table: Path) -> None:
    table.write_text("a\n0\n1\n2\nx\n4\n5\n6\n7\n")
    dataset = Csv(path=table, window=2, stride=1).load(taking(2))
    assert dataset.inputs[0].tolist() == [[0, 1], [1, 2], [4, 5], [5, 6], [6, 7]]
    assert skips(dataset) == [(NOT_A_NUMBER, 1, "line 5, column 'a': 'x' is not a number")]


def test_a_window_never_spans_a_change_of_group(table: Path) -> None:
    table.write_text("who,a\nann,0\nann,1\nann,2\nbob,3\nbob,4\nann,5\nann,6\n")
    dataset = Csv(path=table, window=2, group="who").load(taking(2))
    assert dataset.inputs[0].tolist() == [[0, 1], [3, 4], [5, 6]]


def test_a_row_without_a_group_is_skipped(table: Path) -> None:
    table.write_text("a,who\n0,ann\n1\n2,ann\n3, \n")
    dataset = Csv(path=table, window=1, group="who").load(taking(1))
    assert dataset.inputs[0].tolist() == [[0], [2]]
    assert skips(dataset) == [(MISSING, 2, "line 3, column 'who': missing")]


def test_rows_too_few_for_a_window_are_an_error_that_says_how_many_there_are(table: Path) -> None:
    table.write_text("a\n0\n1\nx\n3\n")
    with pytest.raises(DataError, match="a window has 3 rows; at most 2 good rows follow one another"):
        Csv(path=table, window=3).load(taking(3))


def test_memory_is_bounded_by_the_newest_windows(table: Path) -> None:
    table.write_text(counted(200, "a,b"))
    dataset = Csv(path=table, window=16, stride=1, max_bytes=1280).load(taking(16, 2))
    # 1280 / (16 rows · 2 columns · 4 bytes) = 10 windows, of the last 1280 / (3 · 4) = 106 rows
    assert dataset.inputs[0].shape == (10, 16, 2)
    assert dataset.inputs[0][-1, -1, 0] == 199
    assert dataset.arrived is not None
    assert dataset.arrived.tolist() == list(range(191, 201))


@pytest.mark.parametrize("stride", [4, 6])
def test_windows_begin_at_the_same_rows_whatever_memory_has_let_go(table: Path, stride: int) -> None:
    """Others would share readings with windows that were held out before."""
    source = Csv(path=table, window=4, stride=stride, max_bytes=1024)  # 1024 / (2 · 4) = 128 rows
    for rows in (400, 401, 403):
        table.write_text(counted(rows))
        begin = source.load(taking(4)).inputs[0][:, 0]
        assert (begin % stride == 0).all()
        assert 400 - 128 <= begin[0] < 403 - 128 + stride


def test_a_group_that_begins_after_what_memory_has_let_go_begins_its_own_windows(table: Path) -> None:
    rows = 401  # of which 128 are held, 273 and on
    lines = "".join(f"{row},0,{'old' if row < 274 else 'new'}\n" for row in range(rows))
    table.write_text("a,label,who\n" + lines)
    source = Csv(path=table, window=4, group="who", max_bytes=1024)
    assert source.load(taking(4)).inputs[0][0, 0] == 274


def test_windows_of_appended_rows_are_new(table: Path) -> None:
    source = Csv(path=table, window=2)
    table.write_text(counted(5))
    first = source.load(taking(2))
    table.write_text(counted(8))
    # Windows at 0, 2, 4, 6; those at 0 and 2 were there.
    assert source.load(taking(2)).new_since(first.newest) == 2


# Settings.


def read(text: str) -> DataSource:
    class Settings(msgspec.Struct):
        data: DataSource

    return parse(f'[data]\nkind = "csv"\npath = "a.csv"\n{text}', Settings, "agent.toml", Path("/etc")).data


def test_a_table_is_described_in_toml() -> None:
    text = """
        features = ["temperature", "mode"]
        classes = ["walk", "sit"]
        window = 128
        stride = 64
        group = "session"
        min_new_examples = 50
        [data.scale]
        temperature = {mean = 20, deviation = 5}
        [data.categories]
        mode = ["off", "heat"]
    """
    assert read(text) == Csv(
        path=Path("/etc/a.csv"),
        features=("temperature", "mode"),
        classes=("walk", "sit"),
        window=128,
        stride=64,
        group="session",
        min_new_examples=50,
        scale={"temperature": Scale(mean=20, deviation=5)},
        categories={"mode": ("off", "heat")},
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("windows = 3", "unknown field `windows` - at `$.data`"),
        ("scale = {t = {mean = 1, std = 2}}", "unknown field `std` - at `$.data.scale[...]`"),
        ("scale = {t = {deviation = 0}}", "> 0.0 - at `$.data.scale[...].deviation`"),
        ("scale = {t = {mean = nan}}", "mean nan and deviation 1.0 must be finite - at `$.data.scale[...]`"),
        ("window = 0", ">= 1 - at `$.data.window`"),
        ("stride = 2", "stride needs window"),
        ('delimiter = ","\ndecimal = ","', "delimiter and decimal are both ','"),
        ('window_label = "first"', "at `$.data.window_label`"),
        ('features = ["a"]\nscale = {t = {}}', "no column 't'; the features and the label are a, label"),
        ('features = ["a"]\ncategories = {label = ["x"]}', "no column 'label'; the features are a"),
        ('scale = {t = {}}\ncategories = {t = ["x"]}', "column 't' is in both scale and categories"),
        ("categories = {t = []}", "length >= 1"),
        ("min_examples = 0", ">= 1 - at `$.data.min_examples`"),
        ("min_new_examples = -1", ">= 0 - at `$.data.min_new_examples`"),
    ],
)
def test_a_mistake_in_a_tables_settings_is_named(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read(text)
    assert complaint in str(refused.value)


def test_a_scale_of_a_column_that_is_not_there_is_refused(table: Path) -> None:
    table.write_text("a,b,label\n1,2,0\n")
    with pytest.raises(DataError, match="no column 't'; the features and the label are a, b, label"):
        Csv(path=table, scale={"t": Scale()}).load(CLASSES)
    with pytest.raises(DataError, match="no column 'b'; the features and the label are a, label"):
        Csv(path=table, scale={"b": Scale()}, group="b").load(CLASSES)


# Predicting from a table.


def test_a_prediction_is_of_every_row_however_few_the_agent_holds_in_memory(table: Path) -> None:
    table.write_text("a,b\n" + "".join(f"{row},0\n" for row in range(1000)))
    agents = Csv(path=table.with_name("own.csv"), max_bytes=1200)
    (inputs,) = read_inputs(table, agents, AUTOENCODER)
    assert inputs[:, 0].tolist() == list(range(1000))
