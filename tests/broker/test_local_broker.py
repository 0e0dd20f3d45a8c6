"""The local broker starts ready, keeps its port, and never outlives those who started it."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from broker_config.local import (
    BrokerUnavailable,
    accepts_connect,
    available_brokers,
    free_port,
    start_local_broker,
)


@pytest.fixture(params=[pytest.param("mosquitto", marks=pytest.mark.mosquitto), pytest.param("nats")])
def kind(request):
    if request.param not in available_brokers():
        pytest.skip(f"{request.param} is not installed: pip install 'fedtide[broker]'")
    return request.param


def ends(pid, deadline_s=5.0):
    """Whether the process is gone, or a zombie that nobody collects, before the deadline."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        if not state.stdout.strip() or state.stdout.startswith("Z"):
            return True
    return False


def test_a_started_broker_answers_and_a_stopped_one_does_not(kind, tmp_path):
    with start_local_broker(tmp_path, kind) as broker:
        assert broker.kind == kind
        assert broker.mqtt_version == {"mosquitto": 5, "nats": 4}[kind]
        assert accepts_connect(broker.host, broker.port)
        pid = broker.pid
    assert not broker.running
    assert not accepts_connect(broker.host, broker.port)
    assert ends(pid)


def test_a_killed_broker_comes_back_on_its_port(kind, tmp_path):
    with start_local_broker(tmp_path, kind) as broker:
        port, pid = broker.port, broker.pid
        broker.kill()
        assert not broker.running
        broker.start()
        assert broker.port == port
        assert broker.pid != pid
        assert accepts_connect(broker.host, port)


def test_starting_a_running_broker_changes_nothing(kind, tmp_path):
    with start_local_broker(tmp_path, kind) as broker:
        pid = broker.pid
        broker.start()
        assert broker.pid == pid


def test_a_broker_that_died_by_itself_can_be_started_again(kind, tmp_path):
    with start_local_broker(tmp_path, kind) as broker:
        dead = broker.pid
        os.kill(dead, signal.SIGKILL)
        assert ends(dead)
        assert not broker.running
        broker.start()
        assert broker.pid != dead
        assert accepts_connect(broker.host, broker.port)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_broker_ends_with_a_process_that_is_killed(kind, tmp_path):
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from broker_config.local import start_local_broker
        print(start_local_broker(Path({str(tmp_path)!r}), {kind!r}).pid, flush=True)
        sys.stdin.read()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        pid = int(owner.stdout.readline())
        os.kill(pid, 0)
        owner.kill()
    assert ends(pid)


def test_a_stopped_broker_has_no_process_id(kind, tmp_path):
    with start_local_broker(tmp_path, kind) as broker:
        pass
    with pytest.raises(BrokerUnavailable, match="not running: call start"):
        _ = broker.pid


def test_a_taken_port_is_reported_with_the_brokers_own_words(kind, tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(
            BrokerUnavailable, match=rf"(?i)port {port} ended at once(.|\n)*address already in use"
        ):
            start_local_broker(tmp_path, kind, port=port)


def test_a_broken_configuration_is_reported_with_the_brokers_own_words(kind, tmp_path):
    with pytest.raises(BrokerUnavailable, match=r"ended at once; its log ends:\n(.|\n)*nonsense"):
        start_local_broker(tmp_path, kind, config="nonsense 1", port=free_port())


def test_a_kind_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no broker of kind 'amqp': take mosquitto or nats"):
        start_local_broker(tmp_path, "amqp")


def test_a_configuration_without_its_port_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs the port it listens on"):
        start_local_broker(tmp_path, config="listener 1883")


def test_a_free_port_is_outside_the_range_of_outgoing_connections():
    assert all(20_000 <= free_port() < 32_000 for _ in range(20))


def test_a_port_that_accepts_and_says_nothing_is_no_broker():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not accepts_connect("127.0.0.1", silent.getsockname()[1], timeout=0.05)


def test_without_any_broker_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("broker_config.local._find", lambda _kind: None)
    with pytest.raises(BrokerUnavailable, match=r"pip install 'fedtide\[broker\]' or apt install mosquitto"):
        start_local_broker(tmp_path)
