"""mosquitto.conf for development and for production, rendered from one list of limits.

The ready files beside this module are these functions' output: ``python -m broker_config.ready_files`` writes
them again.
"""

from dataclasses import dataclass
from pathlib import Path

# What a fleet needs whatever the listener. Development has the same limits, so that what works there works in
# production. mosquitto takes no comment at the end of a line: each reason stands above its setting.
_LIMITS = """\
# One set of access rules for every listener.
per_listener_settings false
# Messages kept per session while its owner is slow or away. Beyond it mosquitto drops what it has already
# acknowledged to the sender, with one line in its log: so keep it above the number of devices. Never 0: then
# the machine's memory is the limit.
max_queued_messages 20000
max_queued_bytes 536870912
# The coordinator's receive maximum is 32.
max_inflight_messages 32
# A chunk is at most 122880 B. Announced to MQTT 5 devices in CONNACK; message_size_limit is not used, because
# it drops a message and reports success to MQTT 3.1.1 devices.
max_packet_size 1048576
# Seconds. A device that went away without a word is known to be gone after 1.5 times this.
max_keepalive 300
# Persistent sessions of coordinators that never came back are forgotten.
persistent_client_expiration 14d
# Receipts and heads are small: send them at once.
set_tcp_nodelay true
"""

_LOG = """\
log_type error
log_type warning
log_type notice
log_type information
"""


@dataclass(frozen=True)
class ProductionSettings:
    """Where a production mosquitto finds its files, and where it listens.

    Attributes:
        certificates: folder with ``authority.crt``, ``broker.crt`` and ``broker.key``.
        access_file: the rules of :func:`broker_config.access.mosquitto_acl`.
        password_file: passwords of users on the local listener, made with ``mosquitto_passwd``.
        state: folder of mosquitto's saved sessions and retained messages.
        port: TCP port of the devices' TLS listener, on every address.
        local_port: TCP port of the coordinator's listener, on loopback only.
        revocations: a certificate revocation list in PEM, or None to check none.
    """

    certificates: Path = Path("/etc/mosquitto/certs")
    access_file: Path = Path("/etc/mosquitto/fleet.acl")
    password_file: Path = Path("/etc/mosquitto/passwords")
    state: Path = Path("/var/lib/mosquitto")
    port: int = 8883
    local_port: int = 1883
    revocations: Path | None = None

    def __post_init__(self) -> None:
        _check_port(self.port)
        _check_port(self.local_port)
        if self.port == self.local_port:
            raise ValueError(f"port and local_port are both {self.port}: the two listeners need two ports")
        for path in (self.certificates, self.access_file, self.password_file, self.state, self.revocations):
            if path is not None:
                _check_path(path)


def development(
    port: int, host: str = "127.0.0.1", *, state: Path | None = None, run_as: str | None = None
) -> str:
    """Render mosquitto.conf for one anonymous broker on one machine: no TLS, no access rules.

    Args:
        port: the TCP port to listen on.
        host: the address to bind to; keep it a loopback address, since anybody may connect.
        state: folder for saved sessions and retained messages, or None to keep them in memory only.
        run_as: the user to become when started as root, or None for mosquitto's own, ``mosquitto``.

    Raises:
        ValueError: the port is not 1 to 65535, or a value would break the file's lines.
    """
    _check_port(port)
    _check_line("host", host)
    lines = ["# mosquitto for development: anonymous, no TLS. Written by broker_config.mosquitto.\n"]
    if run_as is not None:
        _check_line("run_as", run_as)
        lines.append(f"user {run_as}\n")
    lines.append(_LIMITS)
    if state is None:
        lines.append("# A development broker forgets: restarting it is the cheapest test of recovery.\n")
        lines.append("persistence false\n")
    else:
        lines.append(_persistence(state))
    lines.append(f"listener {port} {host}\n")
    lines.append("allow_anonymous true\n")
    lines.append(_LOG)
    return "".join(lines)


def production(settings: ProductionSettings) -> str:
    """Render mosquitto.conf for a fleet: mutual TLS for devices, a local listener for the coordinator."""
    certificates = settings.certificates
    revocations = ""
    if settings.revocations is not None:
        revocations = f"""\
# Withdrawn certificates. mosquitto reads them at start and on SIGHUP; a live session stays until it ends.
crlfile {settings.revocations}
"""
    return f"""\
# mosquitto for a fleet. Written by broker_config.mosquitto.
{_LIMITS}{_persistence(settings.state)}\
# What each user may read and write. Generated from the topic table by broker_config.access.
acl_file {settings.access_file}
allow_anonymous false
# Users with a password: the coordinator. The TLS listener ignores it: there a certificate is the only way in.
password_file {settings.password_file}

# Devices: TLS with a certificate of our own authority on both sides.
listener {settings.port}
# The only certificates accepted are those of this authority; no public one is trusted.
cafile {certificates / "authority.crt"}
certfile {certificates / "broker.crt"}
keyfile {certificates / "broker.key"}
{revocations}\
# The oldest version allowed; 1.3 is used where both sides have it.
tls_version tlsv1.2
# Without it, use_identity_as_username refuses everybody.
require_certificate true
# The certificate's common name, the device id, is what %u means in the access rules.
use_identity_as_username true

# The coordinator on the same machine: loopback and a password.
listener {settings.local_port} 127.0.0.1

{_LOG}"""


def _persistence(state: Path) -> str:
    _check_path(state)
    # mosquitto joins the folder and the file name without a separator.
    return f"""\
# A snapshot, not a journal: a crash loses what came since, whatever was acknowledged. The coordinator's
# journal and the devices' outboxes hold what must not be lost. autosave_on_changes is not used: it costs 9 to
# 19 ms a message.
persistence true
persistence_location {state}/
autosave_interval 60
"""


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not a TCP port: take one from 1 to 65535")


def _check_path(path: Path) -> None:
    if not path.is_absolute():
        raise ValueError(f"{path} is relative: mosquitto would look for it in the folder it was started in")
    _check_line("path", str(path))


def _check_line(name: str, value: str) -> None:
    if not value.isprintable() or not value.strip():
        raise ValueError(f"{name} {value!r} must be one line of printable characters")
