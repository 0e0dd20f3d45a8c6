"""What a service tells systemd, and how it ends."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from fedtide.running import notify, run_until_signalled, work_in_an_empty_directory
from fedtide.wire.settings import SettingsError


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield lambda: listener.recv(100).decode()


def test_systemd_hears_ready_then_signs_of_life_then_stopping(systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "20000")

    async def service():
        heard.extend([await asyncio.to_thread(systemd), await asyncio.to_thread(systemd)])

    heard = []
    run_until_signalled(service())
    assert heard == ["READY=1", "WATCHDOG=1"]
    while (last := systemd()) == "WATCHDOG=1":
        pass
    assert last == "STOPPING=1"


def test_without_systemd_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_service_after_it_has_cleaned_up(number):
    async def service():
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            cleaned.append(number)

    cleaned = []
    assert run_until_signalled(service()) is None
    assert cleaned == [number]


def test_the_result_of_a_service_that_ends_by_itself_comes_back():
    async def service():
        return "metric reached 0.95"

    assert run_until_signalled(service()) == "metric reached 0.95"


def test_an_agent_works_where_no_file_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "identity.pem").write_text("secret")
    work_in_an_empty_directory(tmp_path / "state" / "empty")
    assert not Path("identity.pem").exists()
    work_in_an_empty_directory(tmp_path / "state" / "empty")  # at the next start


def test_a_directory_that_is_not_empty_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(SettingsError, match="must stay empty and holds 'secret'"):
        work_in_an_empty_directory(tmp_path)
    assert Path.cwd() == tmp_path
