"""One class of the owner's own, named in agent.toml."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest
from agent_world import tiny_plan

from edge_agent.data_sources import Custom, DataError, DataSource
from edge_agent.values import NOT_FINITE
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.settings import SettingsError, parse

AUTOENCODER: Final = msgspec.structs.replace(tiny_plan().manifest, targets=None)
CLASSES: Final = msgspec.structs.replace(
    AUTOENCODER, targets=TensorSpec(name="y", dtype="int64", shape=(None,))
)
TWO_INPUTS: Final = msgspec.structs.replace(AUTOENCODER, inputs=AUTOENCODER.inputs * 2)

MODULE: Final = """
from edge_agent.data_sources import Examples

class Counting:
    made = 0

    def __init__(self, first, step=1):
        Counting.made += 1
        self.values = [first, first + step]

    def stamp(self):
        return tuple(self.values)

    def examples(self):
        return Examples(inputs=[[value, 0] for value in self.values], targets=[0] * len(self.values))

class Faulty:
    def __init__(self, fault):
        self.fault = fault

    def stamp(self):
        if self.fault == "stamp":
            raise OSError("the sensor is gone")
        return 0

    def examples(self):
        if self.fault == "examples":
            raise KeyError("volts")
        return eval(self.fault)

class Unfinished:
    def stamp(self):
        return 0

def function(**options):
    return None
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder as of agent.toml, with a module in it."""
    (tmp_path / "owners_source.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("owners_source", None)
    sys.path.remove(str(tmp_path)) if str(tmp_path) in sys.path else None


def read(text: str, folder: Path) -> DataSource:
    class Settings(msgspec.Struct):
        data: DataSource

    return parse(f'[data]\nkind = "custom"\n{text}', Settings, "agent.toml", folder).data


def test_the_class_is_found_beside_the_settings_and_made_with_the_options(folder: Path) -> None:
    source = read('class = "owners_source:Counting"\n[data.options]\nfirst = 7', folder)
    dataset = source.opened().load(CLASSES)
    assert dataset.inputs[0].tolist() == [[7, 0], [8, 0]]
    assert dataset.targets is not None
    assert dataset.targets.tolist() == [0, 0]
    assert source.opened().load(AUTOENCODER).targets is None


def test_it_is_made_once_and_read_again_and_again(folder: Path) -> None:
    reader = read('class = "owners_source:Counting"\noptions = {first = 7, step = 2}', folder).opened()
    assert reader.load(AUTOENCODER).inputs[0][:, 0].tolist() == [7, 9]
    counting = sys.modules["owners_source"].Counting
    stamp = reader.changed_since(None)
    assert reader.changed_since(stamp) is None
    reader._made.values.append(3)  # type: ignore[attr-defined]
    assert reader.changed_since(stamp) == (7, 9, 3)
    assert reader.load(AUTOENCODER).inputs[0][:, 0].tolist() == [7, 9, 3]
    assert counting.made == 1


def faulty(folder: Path, fault: str) -> Custom:
    return Custom(class_=folder / "owners_source:Faulty", options={"fault": fault})


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        ("no_such_module:Source", "no_such_module:Source: ModuleNotFoundError: No module named"),
        (
            "owners_source:Missing",
            "owners_source:Missing: ImportError: module 'owners_source' has no 'Missing'",
        ),
        ("owners_source:Counting", "owners_source:Counting: TypeError: .* argument: 'first'"),
        ("owners_source:Unfinished", "owners_source:Unfinished: TypeError: .* stamp.. and examples"),
        ("owners_source:function", "owners_source:function: TypeError: .* stamp.. and examples"),
    ],
)
def test_a_class_that_cannot_be_made_is_a_data_error_that_names_it(
    folder: Path, named: str, complaint: str
) -> None:
    reader = Custom(class_=folder / named).opened()
    with pytest.raises(DataError, match=complaint):
        reader.changed_since(None)
    with pytest.raises(DataError, match=complaint):
        reader.load(AUTOENCODER)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("examples", "Faulty: KeyError: 'volts'"),
        ("[[1, 2]]", "examples.. gave list; it must give edge_agent.data_sources.Examples"),
        ("Examples(inputs=[[1, 2, 3]])", r"have shape \(3,\); the plan takes \(2,\)"),
        ("Examples(inputs=[['a', 'b']])", "must be an array of numbers"),
        ("Examples(inputs=[[1, 2], [3]])", "Faulty: ValueError"),
        ("Examples(inputs=([[1, 2]], [[1, 2]]))", "the plan takes 1 inputs, not 2"),
        ("Examples(inputs=[[float('nan'), 2]])", "no good example: example 1"),
        ("Examples(inputs=[[1, 2]], total=0)", "total is 0, and there are 1 examples"),
    ],
)
def test_what_it_raises_or_gives_wrongly_is_a_data_error_that_names_it(
    folder: Path, fault: str, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint) as refused:
        faulty(folder, fault).opened().load(AUTOENCODER)
    assert str(refused.value).startswith("owners_source:Faulty: ")


def test_a_stamp_that_cannot_be_had_is_a_data_error(folder: Path) -> None:
    with pytest.raises(DataError, match="owners_source:Faulty: OSError: the sensor is gone"):
        faulty(folder, "stamp").opened().changed_since(None)


def test_labels_are_needed_where_the_plan_takes_them(folder: Path) -> None:
    with pytest.raises(DataError, match="there are no labels for 'y'"):
        faulty(folder, "Examples(inputs=[[1, 2]])").opened().load(CLASSES)


def test_bad_examples_are_skipped_like_everyones(folder: Path) -> None:
    dataset = faulty(folder, "Examples(inputs=[[1, 2], [float('inf'), 2]])").opened().load(AUTOENCODER)
    assert len(dataset) == 1
    assert [(skip.reason, skip.count) for skip in dataset.skipped] == [(f"{NOT_FINITE} in 'x0'", 1)]


def test_several_inputs_are_a_tuple(folder: Path) -> None:
    dataset = faulty(folder, "Examples(inputs=([[1, 2]], [[3, 4]]))").opened().load(TWO_INPUTS)
    assert [array.tolist() for array in dataset.inputs] == [[[1, 2]], [[3, 4]]]


def test_it_may_have_no_examples_yet_and_count_those_that_are_gone(folder: Path) -> None:
    none_yet = "Examples(inputs=__import__('numpy').zeros((0, 2)))"
    assert len(faulty(folder, none_yet).opened().load(AUTOENCODER)) == 0
    counted = faulty(folder, "Examples(inputs=[[1, 2], [3, 4]], total=10)").opened().load(AUTOENCODER)
    assert (counted.newest, counted.new_since(9)) == (10, 1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('class = "owners_source"', "class 'owners_source' must be 'package.module:ClassName'"),
        ('class = "a:b:c"', "must be 'package.module:ClassName'"),
        ('class = "../elsewhere:Class; print(1)"', "must be 'package.module:ClassName'"),
        ("", "missing required field `class`"),
        ('class = "a:B"\npath = "c"', "unknown field `path` - at `$.data`"),
    ],
)
def test_a_mistake_in_the_settings_is_named(folder: Path, text: str, complaint: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read(text, folder)
    assert complaint in str(refused.value)


def test_a_module_beside_the_settings_hides_nothing_that_is_installed(folder: Path) -> None:
    (folder / "json.py").write_text("raise SystemExit")
    with pytest.raises(DataError, match="module 'json' has no 'Source'"):
        Custom(class_=folder / "json:Source").opened().load(AUTOENCODER)
