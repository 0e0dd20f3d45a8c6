"""Plants one defect at a time in a copy of the source, and runs the tests that must notice.

python tests/rig/plant_defects.py [--only NAME ...] [--list]

Prints a table and, as its last line, JSON. Exit code 1 if a defect survives, or if nobody can tell: the tests
did not run, did not end, or fail without any defect.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from defects import DEFECTS, Defect

ROOT: Final = Path(__file__).parents[2]
_COPIED: Final = (
    *("fedtide", "coordinator", "edge_agent", "broker_config", "tests", "docs", "benchmarks"),
    "pyproject.toml",
)
_NOT_COPIED: Final = shutil.ignore_patterns("__pycache__", "*.egg-info", ".pytest_cache")
_DEADLINE_S: Final = 300.0
_DEADLINE_OF_ALL_S: Final = 1800.0
_ALL_PASSED: Final = 0
_SOME_FAILED: Final = 1  # pytest's; 2 and above mean that tests did not run


class Outcome(StrEnum):
    """What became of a defect."""

    CAUGHT = "caught"
    SURVIVED = "SURVIVED"
    UNDECIDED = "UNDECIDED"


class CannotPlant(Exception):
    """The source is not what the defect was written for."""


@dataclass(frozen=True)
class Finding:
    """One defect's end.

    Attributes:
        defect: which.
        outcome: whether its tests noticed.
        seconds: what they took.
        by: the first test that failed, or what pytest said last.
    """

    defect: Defect
    outcome: Outcome
    seconds: float
    by: str


def planted(defect: Defect, source: str) -> str:
    """The source with the defect in it.

    Raises:
        CannotPlant: its text does not stand there exactly once, or what comes out is no Python.
    """
    found = source.count(defect.text)
    if found != 1:
        raise CannotPlant(
            f"{defect.name}: its text stands {found} times in {defect.file}; it must stand there once"
        )
    result = source.replace(defect.text, defect.planted)
    try:
        compile(result, defect.file, "exec")
    except SyntaxError as error:
        raise CannotPlant(f"{defect.name}: {error}") from error
    return result


def try_out(defect: Defect, copy: Path) -> Finding:
    """Plant a defect in the copy, run its tests, and take it out again."""
    file = copy / defect.file
    source = file.read_text()
    file.write_text(planted(defect, source))
    began = time.monotonic()
    try:
        outcome, by = _run(defect.tests, copy)
    finally:
        file.write_text(source)
    return Finding(defect, outcome, time.monotonic() - began, by)


def _run(tests: Sequence[str], copy: Path, deadline_s: float = _DEADLINE_S) -> tuple[Outcome, str]:
    command = [
        *(sys.executable, "-B", "-m", "pytest", "-x", "-q", "-m", "not long"),
        *("-p", "no:cacheprovider", "--no-header", *tests),
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome.UNDECIDED, f"did not end within {deadline_s:g} s"
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    failed = next((line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")), None)
    if ran.returncode == _SOME_FAILED and failed is not None:
        return Outcome.CAUGHT, failed.partition(" - ")[0].rpartition("::")[2]
    if ran.returncode == _ALL_PASSED:
        return Outcome.SURVIVED, lines[-1]
    return Outcome.UNDECIDED, (lines or ran.stderr.splitlines() or ["no output"])[-1]


def copied(target: Path) -> Path:
    """A copy of what the tests need."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=_NOT_COPIED)
        else:
            shutil.copy(source, target / name)
    return target


def plant(defects: Sequence[Defect]) -> list[Finding]:
    """Try out each of these.

    Raises:
        CannotPlant: a defect's text is not there, or its tests fail without it.
    """
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = copied(Path(folder))
        for defect in defects:
            planted(defect, (copy / defect.file).read_text())
        tests = sorted({test for defect in defects for test in defect.tests})
        outcome, by = _run(tests, copy, _DEADLINE_OF_ALL_S)
        if outcome is not Outcome.SURVIVED:
            raise CannotPlant(f"without any defect the tests do not pass: {by}")
        return [_reported(try_out(defect, copy)) for defect in defects]


def _reported(finding: Finding) -> Finding:
    defect = finding.defect
    print(f"{finding.outcome:10} {defect.name:40} {finding.seconds:6.1f} s  {finding.by}", flush=True)
    return finding


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these defects, instead of all")
    parser.add_argument("--list", action="store_true", help="say what there is, and plant nothing")
    options = parser.parse_args(arguments)
    names = {defect.name for defect in DEFECTS}
    if unknown := sorted(set(options.only or ()) - names):
        parser.error(f"no defect named {', '.join(unknown)}; there are: {', '.join(sorted(names))}")
    chosen = [defect for defect in DEFECTS if not options.only or defect.name in options.only]
    if options.list:
        for defect in chosen:
            print(f"{defect.name:40} {defect.says} ({defect.file})")
        return 0
    try:
        findings = plant(chosen)
    except CannotPlant as error:
        print(error, file=sys.stderr)
        return 1
    outcomes = {finding.defect.name: finding.outcome.value.lower() for finding in findings}
    caught = sum(finding.outcome is Outcome.CAUGHT for finding in findings)
    seconds = round(sum(finding.seconds for finding in findings), 1)
    print(json.dumps({"planted": len(findings), "caught": caught, "seconds": seconds, "defects": outcomes}))
    return 0 if caught == len(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
