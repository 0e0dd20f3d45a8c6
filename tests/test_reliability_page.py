"""The failure matrix of docs/reliability.md is whole, and every test that it names is there."""

import ast
import re
from functools import cache
from pathlib import Path

import msgspec
import pytest

from coordinator.rollback import Rollback
from coordinator.settings import Journal, Pacing, Share

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()
ROW = re.compile(r"^\| F(?P<number>\d+) \|(?P<rest>.*)\|$", re.MULTILINE)
ROWS = {int(match["number"]): match["rest"] for match in ROW.finditer(PAGE)}
TABLES = msgspec.toml.decode(PAGE.split("```toml")[1].split("```")[0])
NAMED = re.compile(r"`(?P<file>tests/[\w/]+\.py)(?:::(?P<test>\w+))?`")


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_the_matrix_has_every_row() -> None:
    assert sorted(ROWS) == list(range(1, 24))


@pytest.mark.parametrize("number", sorted(ROWS))
def test_a_row_names_tests_that_are_there(number: int) -> None:
    named = list(NAMED.finditer(ROWS[number]))
    assert named
    for match in named:
        assert (ROOT / match["file"]).exists(), match[0]
        assert match["test"] is None or match["test"] in functions_of(match["file"]), match[0]


def test_every_file_that_the_page_names_elsewhere_is_there() -> None:
    for match in NAMED.finditer(PAGE):
        assert (ROOT / match["file"]).exists(), match[0]


@pytest.mark.parametrize(("name", "kind"), [("journal", Journal), ("pacing", Pacing), ("share", Share)])
def test_the_settings_shown_are_the_defaults(name: str, kind: type) -> None:
    assert msgspec.convert(TABLES[name], kind) == kind()


def test_the_rollback_shown_is_one() -> None:
    assert msgspec.convert(TABLES["rollback"], Rollback).loss_factor == 2.0
    assert set(TABLES) == {"journal", "pacing", "share", "rollback"}
