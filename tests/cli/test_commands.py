"""The command line: exit codes, explained errors, help with examples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from coordinator.settings import CoordinatorSettings
from edge_agent.data_sources import Windows
from edge_agent.settings import AgentSettings
from fedtide.cli import command
from fedtide.fleet_directory import FleetDirectory
from fedtide.wire.settings import load
from fedtide.wire.signatures import SigningKey

KEY = str(SigningKey.from_seed(bytes(32)).public)
AGENT_INIT = ["agent", "init", "pump", "--fleet", "pumps", "--device", "pump-7", "--coordinator-key", KEY,
              "--data", "readings.npz"]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(command, list(arguments))


def fedtide(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fedtide", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=60,
    )  # fmt: skip


def subcommands(group, path=()):
    for name in group.list_commands(None):
        found = group.get_command(None, name)
        if hasattr(found, "commands"):
            yield from subcommands(found, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("path", list(subcommands(command)), ids=" ".join)
def test_every_command_has_help_with_an_example(path):
    shown = CliRunner().invoke(command, [*path, "--help"]).output

    assert "Example" in shown
    assert f"fedtide {' '.join(path)}" in shown


def test_a_new_fleet_has_settings_that_load_and_a_key_only_its_owner_reads(run, tmp_path):
    shown = run("init", "pumps", "--fleet", "pumps", "--broker", "127.0.0.1:1884", "--goal", "3")

    assert shown.exit_code == 0, shown.output
    directory = FleetDirectory(tmp_path / "pumps")
    settings = directory.settings()
    assert (settings.fleet, settings.broker.hosts, settings.aggregator.goal) == (
        "pumps",
        ("127.0.0.1:1884",),
        3,
    )
    assert directory.key_file.stat().st_mode & 0o777 == 0o600
    assert str(directory.key().public) in shown.output


def test_a_fleet_is_never_overwritten(tmp_path):
    assert fedtide("init", str(tmp_path / "pumps")).returncode == 0

    again = fedtide("init", str(tmp_path / "pumps"))

    assert again.returncode == 1
    assert "holds a fleet already" in again.stderr
    assert "Traceback" not in again.stderr


def test_tls_makes_an_authority_and_enrolment_a_certificate_for_the_device(run, tmp_path):
    run("init", "pumps", "--tls", "broker.local", "--tls", "192.0.2.10")

    shown = run("enrol", "pump-7", "--key", KEY, "--dir", "pumps")

    assert "Copy to the device" in shown.output
    assert (tmp_path / "pumps/tls/devices/pump-7.key").stat().st_mode & 0o777 == 0o600
    assert "require_certificate true" in (tmp_path / "pumps/broker/mosquitto.conf").read_text()
    assert load(tmp_path / "pumps/coordinator.toml", CoordinatorSettings).broker.username == "coordinator"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "x", "--fleet", "Pumps!"], "fleet id 'Pumps!' is not allowed"),
        (["init", "x", "--broker", "nowhere"], "give HOST:PORT"),
        (["status", "--dir", "empty"], "no coordinator has run in empty"),
        (["coordinator", "run", "--dir", "empty"], "coordinator.toml"),
        (["agent", "run", "--config", "none.toml"], "none.toml: No such file or directory"),
        (["plan", "show", "none.plan"], "does not exist"),
        ([*AGENT_INIT[:-1], "readings.txt"], ".npz and .csv are read"),
        ([*AGENT_INIT[:8], "abc", *AGENT_INIT[9:]], "64 hexadecimal digits"),
        (["demo", "--devices", "3", "--slow", "4"], "are more than --devices 3"),
    ],
)
def test_mistakes_are_explained_in_one_sentence(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    failed = fedtide(*arguments)

    assert failed.returncode in {1, 2}
    assert said in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr


def test_a_typo_in_the_settings_is_an_error_with_its_place(run, tmp_path):
    run("init", "pumps")
    file = tmp_path / "pumps" / "coordinator.toml"
    file.write_text(file.read_text().replace("goal = 10", "gaol = 10"))

    failed = fedtide("coordinator", "run", "--dir", str(tmp_path / "pumps"))

    assert failed.returncode == 1
    assert "unknown field `gaol` - at `$.aggregator`" in failed.stderr


def test_a_new_agent_has_settings_that_load_and_says_how_to_enrol(run, tmp_path):
    shown = run(*AGENT_INIT)

    settings = load(tmp_path / "pump" / "agent.toml", AgentSettings)
    public = SigningKey.load(settings.key).public
    assert (settings.fleet, settings.device) == ("pumps", "pump-7")
    assert f"fedtide enrol pump-7 --key {public}" in shown.output
    assert settings.data.path == tmp_path / "readings.npz"
    assert "settings are good" in run("agent", "run", "--config", "pump/agent.toml", "--check").output


def test_a_new_agents_data_may_be_a_folder_of_windows(run, tmp_path):
    (tmp_path / "windows").mkdir()
    run(*AGENT_INIT[:-1], "windows")

    data = load(tmp_path / "pump" / "agent.toml", AgentSettings).data
    assert data == Windows(path=tmp_path / "windows")


def test_enrolling_twice_with_another_key_is_refused(run):
    run("init", "pumps")
    run("enrol", "pump-7", "--key", KEY, "--dir", "pumps")
    other = str(SigningKey.from_seed(bytes([1]) * 32).public)

    failed = run("enrol", "pump-7", "--key", other, "--dir", "pumps")

    assert failed.exit_code == 1
    assert "enrolled with key" in str(failed.exception)


def test_the_key_a_device_has_shown_is_accepted_without_typing_it(run, tmp_path):
    run("init", "pumps")
    (tmp_path / "pumps/pending").mkdir()
    (tmp_path / "pumps/pending/pump-7.pub").write_text(KEY)

    shown = run("enrol", "pump-7", "--dir", "pumps")

    assert f"Enrolled pump-7 with key {KEY}" in shown.output
    assert (tmp_path / "pumps/roster/pump-7.pub").read_text().strip() == KEY


def test_without_the_coordinators_packages_the_command_names_the_extra(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'safetensors', 'prometheus_client', 'rich', 'torch'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )

    failed = fedtide("coordinator", "run", PYTHONPATH=str(tmp_path))

    assert failed.returncode == 1
    assert "pip install 'fedtide[coordinator]'" in failed.stderr


def test_logs_can_be_json_lines_with_a_stable_event(run, tmp_path):
    run(*AGENT_INIT)
    agent = subprocess.Popen(
        [sys.executable, "-m", "fedtide", "agent", "run", "--config", "pump/agent.toml", "--json-logs"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = json.loads(agent.stderr.readline())
    agent.terminate()

    assert agent.wait(20) == 0
    agent.stderr.close()
    assert line["event"] == "link.retry"
    assert "127.0.0.1:1883" in line["message"]


def test_a_path_with_a_fleet_is_shown_relative_to_where_the_operator_is(run):
    assert str(Path("pumps/model.plan")) in run("init", "pumps").output
