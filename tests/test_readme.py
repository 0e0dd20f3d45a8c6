"""The README's three-terminal run, executed as it is written, in an empty directory."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"<!-- test: (?P<name>[a-z0-9 ]+) -->\n```sh\n(?P<script>.*?)```", re.DOTALL)
BLOCKS = {match["name"]: match["script"] for match in BLOCK.finditer(README)}


class Terminal:
    """A shell that runs one block, in a process group of its own, as a terminal would."""

    def __init__(self, directory: Path, name: str) -> None:
        self.log = directory / f"{name}.log"
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-euc", f"{BLOCKS[name]}\nwait"],
                cwd=directory, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def failed(self) -> bool:
        return self._process.poll() not in {None, 0}

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGINT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    return tmp_path


def wait_for(path: Path, terminals: list[Terminal], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        tails = "\n".join(terminal.log.read_text()[-2000:] for terminal in terminals)
        assert not any(terminal.failed() for terminal in terminals), tails
        assert time.monotonic() < deadline, f"{path} did not appear:\n{tails}"
        time.sleep(0.1)


def fleet_status(directory: Path) -> dict[str, object]:
    command = BLOCKS["status"].strip() + " --json"
    fedtide = Path(sys.executable).parent / "fedtide"
    shown = subprocess.run(
        command.replace("fedtide", str(fedtide), 1).split(),
        cwd=directory,
        capture_output=True,
        check=True,
        text=True,
    )
    return json.loads(shown.stdout)


@pytest.mark.mosquitto
def test_the_three_terminal_run_of_the_readme_trains_a_model(workplace: Path) -> None:
    terminals: list[Terminal] = []
    try:
        terminals.append(Terminal(workplace, "terminal 1"))
        wait_for(workplace / "my-fleet" / "broker" / "mosquitto.conf", terminals, 30)
        terminals.append(Terminal(workplace, "terminal 2"))
        wait_for(workplace / "my-fleet" / "status.json", terminals, 90)
        terminals.append(Terminal(workplace, "terminal 3"))
        deadline = time.monotonic() + 120
        while not has_trained(status := fleet_status(workplace)):
            tails = "\n".join(terminal.log.read_text()[-2000:] for terminal in terminals)
            assert time.monotonic() < deadline, tails
            time.sleep(0.25)
    finally:
        for terminal in reversed(terminals):
            terminal.close()

    assert {device["device"] for device in status["devices"]} == {"device-1", "device-2"}
    assert all(device["applied"] >= 1 for device in status["devices"])


def has_trained(status: dict[str, object]) -> bool:
    """Whether half of ten kinds of digits are told apart; guessing gives a tenth. After how long, differs."""
    evaluations = status["evaluations"]
    return status["version"] >= 4 and bool(evaluations) and evaluations[-1]["metric"] > 0.5


def test_every_relative_link_of_the_documents_leads_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
    for document in documents:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_every_command_stands_in_the_readme() -> None:
    from fedtide.cli import command  # noqa: PLC0415

    for name in command.list_commands(None):
        assert f"`fedtide {name}" in README, name
