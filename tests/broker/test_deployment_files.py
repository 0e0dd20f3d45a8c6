"""The systemd units are valid, hardened, and say what the documentation says they say."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from broker_config.mosquitto import ProductionSettings, production

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = ROOT / "deploy" / "systemd"
SERVICES = ("fedtide-agent", "fedtide-coordinator")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt install systemd"
)


def unit(path):
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str
    parser.read_string(path.read_text(encoding="utf-8"))
    return parser


def service(name):
    return unit(SYSTEMD / f"{name}.service")["Service"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fedtide-agent", "/opt/fedtide/bin/fedtide agent run --config /etc/fedtide/agent.toml"),
        ("fedtide-coordinator", "/opt/fedtide/bin/fedtide coordinator run --dir /var/lib/fedtide"),
    ],
)
def test_a_service_runs_the_documented_command(name, command):
    assert service(name)["ExecStart"] == command


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_never_gives_up(name):
    assert service(name)["Restart"] == "always"
    assert service(name)["Type"] == "notify"
    assert service(name)["WatchdogSec"]
    assert unit(SYSTEMD / f"{name}.service")["Unit"]["StartLimitIntervalSec"] == "0"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_a_user_of_its_own_who_writes_only_its_state(name):
    settings = service(name)
    user = settings["User"]
    assert user != "root"
    assert settings["StateDirectory"] == user
    assert settings["StateDirectoryMode"] == "0700"
    assert settings["ProtectSystem"] == "strict"
    assert settings["NoNewPrivileges"] == "yes"
    assert settings["CapabilityBoundingSet"] == ""
    assert "ReadWritePaths" not in settings
    declared = (SYSTEMD / "fedtide.sysusers.conf").read_text(encoding="utf-8")
    assert re.search(rf"^u {user} +- .*/var/lib/{user}$", declared, re.MULTILINE)


def test_the_two_services_share_no_user():
    assert service("fedtide-agent")["User"] != service("fedtide-coordinator")["User"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_bounded_in_memory(name):
    assert re.fullmatch(r"\d+[MG]", service(name)["MemoryMax"])


def test_the_broker_takes_more_than_a_thousand_devices():
    drop_in = unit(SYSTEMD / "mosquitto.service.d" / "fedtide.conf")
    assert int(drop_in["Service"]["LimitNOFILE"]) >= 20_000


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_systemd_has_nothing_to_say_against_a_unit(name, tmp_path):
    # The program is not installed where this runs; everything else is checked as it stands.
    text = (SYSTEMD / f"{name}.service").read_text(encoding="utf-8")
    copy = tmp_path / f"{name}.service"
    copy.write_text(text.replace("/opt/fedtide/bin/fedtide", "/bin/true"), encoding="utf-8")
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    # Unknown settings are only warned of, with exit status 0. Other units' faults are not ours.
    assert [line for line in said.stderr.splitlines() if name in line] == []
    assert said.returncode == 0


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_systemd_rates_a_service_as_little_exposed(name):
    # 0.0 is a service that can do nothing, 9.6 one without any fence; 2.0 leaves room for the network.
    path = SYSTEMD / f"{name}.service"
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", path],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized option" in rated.stderr:
        pytest.skip("this systemd cannot rate a unit that is not installed")
    assert rated.returncode == 0, rated.stdout[-200:]


def test_the_documentation_explains_every_setting_of_the_production_file():
    text = production(ProductionSettings(revocations=Path("/etc/mosquitto/certs/authority.crl")))
    used = {line.split()[0] for line in text.splitlines() if line and not line.startswith("#")}
    rows = re.findall(
        r"^\| (`[a-z_`, ]+) \|", (ROOT / "docs" / "brokers.md").read_text("utf-8"), re.MULTILINE
    )
    explained = set(re.findall(r"`([a-z_]+)`", " ".join(rows)))
    assert explained == used


@pytest.mark.parametrize("page", ["brokers.md", "install-raspberry-pi.md"])
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / "docs" / page).read_text("utf-8")):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("block", range(2))
def test_the_python_examples_of_the_brokers_page_run(block, tmp_path, monkeypatch):
    examples = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "brokers.md").read_text("utf-8"), re.DOTALL
    )
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    exec(compile(examples[block], "docs/brokers.md", "exec"), {})
    made = {path.name for path in tmp_path.rglob("*.*")}
    assert made >= [{"fleet.acl", "mosquitto.conf"}, {"authority.crt", "broker.crt", "pump-7.key"}][block]
