"""The page on data sources: its settings are read and its programs run as they stand there."""

import re
import sys
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import numpy as np
import pytest
from agent_world import tiny_plan

from edge_agent.data_sources import Csv, DataSource, Sensor, Windows
from fedtide.wire.parameters import TensorSpec
from fedtide.wire.settings import parse

PAGE: Final = (Path(__file__).parents[2] / "docs" / "data-sources.md").read_text(encoding="utf-8")
BLOCKS: Final = [match.groups() for match in re.finditer(r"```(toml|python)\n(.*?)```", PAGE, re.DOTALL)]
TABLES: Final = [text for language, text in BLOCKS if language == "toml" and "kind" in text]
PROGRAMS: Final = [text for language, text in BLOCKS if language == "python"]


def read(text: str, folder: Path) -> DataSource:
    class Settings(msgspec.Struct, forbid_unknown_fields=True):
        data: DataSource

    return parse(text, Settings, "agent.toml", folder).data


@pytest.mark.parametrize("text", TABLES)
def test_every_table_on_the_page_is_good(text: str, tmp_path: Path) -> None:
    read(text, tmp_path)


def test_every_kind_is_on_the_page_with_each_of_its_keys() -> None:
    sections = dict(re.findall(r"^## (\w+): .*?$(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
    for kind in get_args(DataSource):
        fields = set(kind.__struct_encode_fields__) - {"min_examples", "min_new_examples"}
        missing = [name for name in fields if name not in sections[kind.__struct_config__.tag]]
        assert missing == [], kind
    assert "min_examples" in PAGE
    assert "min_new_examples" in PAGE


def test_the_defaults_on_the_page_are_the_defaults() -> None:
    path = Path("a")
    assert (Csv(path=path).label, Csv(path=path).delimiter, Csv(path=path).decimal) == ("label", ",", ".")
    assert Csv(path=path).max_bytes == Windows(path=path).max_bytes == 33554432
    assert (Csv(path=path).min_examples, Csv(path=path).min_new_examples) == (1, 0)
    defaults: dict[str, Any] = dict(
        zip(
            Sensor.__struct_fields__[-len(Sensor.__struct_defaults__) :],
            Sensor.__struct_defaults__,
            strict=True,
        )
    )
    assert defaults["max_bytes"] == 16777216
    assert (defaults["stale_s"], defaults["flush_s"]) == (3600, 60)


def test_a_file_that_is_renamed_is_seen_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [program] = [text for text in PROGRAMS if "rename" in text]
    exec(program, {})
    wanted = TensorSpec(name="x0", dtype="float32", shape=(None, 64, 3))
    manifest = msgspec.structs.replace(tiny_plan().manifest, inputs=(wanted,), targets=None)
    assert len(Windows(path=tmp_path / "windows").load(manifest)) == 1


def test_the_class_on_the_page_reads_its_file(tmp_path: Path) -> None:
    np.arange(80, dtype=np.float32).tofile(tmp_path / "pump.bin")
    [program] = [text for text in PROGRAMS if "class PumpLog" in text]
    (tmp_path / "pump_log.py").write_text(program)
    [table] = [text for text in TABLES if 'kind = "custom"' in text]
    table = table.replace("/var/log/pump.bin", str(tmp_path / "pump.bin")).replace("5000", "4")
    wanted = TensorSpec(name="x0", dtype="float32", shape=(None, 8))
    manifest = msgspec.structs.replace(tiny_plan().manifest, inputs=(wanted,), targets=None)
    try:
        dataset = read(table, tmp_path).opened().load(manifest)
    finally:
        sys.modules.pop("pump_log", None)
        sys.path.remove(str(tmp_path))
    assert dataset.inputs[0][:, 0].tolist() == [48, 56, 64, 72]
    assert dataset.newest == 10
