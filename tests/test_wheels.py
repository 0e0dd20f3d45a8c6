"""What a device installs comes as wheels: nothing is compiled on a 64-bit Raspberry Pi."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
# Raspberry Pi OS Bookworm has CPython 3.11 and glibc 2.36, Trixie 3.13 and 2.41; 2.28 is what the strictest
# of the wheels asks for.
PLATFORMS: Final = tuple(f"manylinux{tag}_aarch64" for tag in ("_2_28", "_2_27", "_2_17", "2014"))


def pip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    return subprocess.run(
        [*command, "--disable-pip-version-check", "--retries", "1", *arguments],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def skip_without_an_index() -> None:
    """What cannot be had for another machine counts only where something can be had for this one."""
    if pip("--no-deps", "packaging").returncode:
        pytest.skip("no package index can be reached, so nobody can say which wheels there are")


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed here")
@pytest.mark.parametrize("python", ["3.13", pytest.param("3.11", marks=pytest.mark.long)])
def test_all_that_an_agent_needs_comes_as_wheels_for_aarch64(python: str, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    report = tmp_path / "report.json"
    wanted = [
        f"--target={tmp_path / 'none'}", "--only-binary=:all:", "--implementation=cp",
        f"--python-version={python}", *(f"--platform={platform}" for platform in PLATFORMS),
        f"--report={report}", *project["dependencies"],
    ]  # fmt: skip
    done = pip(*wanted)
    if done.returncode:
        skip_without_an_index()
    assert done.returncode == 0, done.stderr
    resolved = json.loads(report.read_text(encoding="utf-8"))["install"]
    files = {each["metadata"]["name"]: each["download_info"]["url"].rsplit("/", 1)[1] for each in resolved}
    named = {requirement.partition(">")[0] for requirement in project["dependencies"]}
    assert named <= files.keys()
    assert "torch" not in files
    for file in files.values():
        assert file.endswith(("aarch64.whl", "-any.whl")), files
