"""A fleet's directory: what ``fedtide init`` makes and every operator command works on.

coordinator.toml  keys/coordinator.key  roster/  pending/  broker/  model.plan  state/  status.json
"""

from dataclasses import dataclass
from pathlib import Path

from broker_config.access import mosquitto_acl
from broker_config.certificates import create_authority, issue
from broker_config.mosquitto import ProductionSettings, development, production
from coordinator.settings import DEFAULT_CODEC, CoordinatorSettings
from fedtide.wire import ids
from fedtide.wire.codecs import CODECS
from fedtide.wire.ids import FleetId
from fedtide.wire.settings import load
from fedtide.wire.signatures import PublicKey, SigningKey


class FleetExists(Exception):
    """The directory holds a fleet already; nothing is overwritten."""


@dataclass(frozen=True)
class FleetDirectory:
    """Names of the places in a fleet's directory."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """``coordinator.toml``."""
        return self.path / "coordinator.toml"

    @property
    def key_file(self) -> Path:
        """The coordinator's private key."""
        return self.path / "keys" / "coordinator.key"

    @property
    def roster(self) -> Path:
        """Public keys of the enrolled devices."""
        return self.path / "roster"

    @property
    def pending(self) -> Path:
        """Public keys that unknown devices have shown."""
        return self.path / "pending"

    @property
    def state(self) -> Path:
        """Journal, models and snapshots."""
        return self.path / "state"

    @property
    def status_file(self) -> Path:
        """Written by a running coordinator."""
        return self.path / "status.json"

    @property
    def tls(self) -> Path:
        """The fleet's own certificate authority, where there is one."""
        return self.path / "tls"

    def settings(self) -> CoordinatorSettings:
        """Read ``coordinator.toml``.

        Raises:
            SettingsError: it is missing or wrong.
        """
        return load(self.settings_file, CoordinatorSettings)

    def key(self) -> SigningKey:
        """Read the coordinator's key.

        Raises:
            FileNotFoundError, ValueError: it is missing or not a key.
        """
        return SigningKey.load(self.key_file)


@dataclass(frozen=True)
class NewFleet:
    """What a new fleet is to be.

    Attributes:
        fleet: its id.
        broker: ``host:port`` of the broker, as the coordinator reaches it.
        goal: updates per model version.
        held_out: an ``.npz`` file of held-out examples, if there is one.
        tls_hosts: names and addresses devices reach the broker by; with any, TLS is set up.
    """

    fleet: str
    broker: str
    goal: int = 10
    held_out: Path | None = None
    tls_hosts: tuple[str, ...] = ()


def create(path: Path, new: NewFleet) -> tuple[FleetDirectory, PublicKey]:
    """Make a new fleet: settings with every default shown, a key, and the broker's files.

    Args:
        path: the directory; made if it is not there.
        new: what it is to be.

    Raises:
        FleetExists: there is one already.
        MalformedId: the fleet's name cannot be one.
        ValueError: a host that cannot stand in a certificate, or a broker that is not ``host:port``.
    """
    name = ids.fleet_id(new.fleet)
    port = _port(new.broker)
    directory = FleetDirectory(path)
    if directory.settings_file.exists():
        raise FleetExists(f"{path} holds a fleet already; choose another directory")
    for place in (directory.key_file.parent, directory.roster, path / "broker"):
        place.mkdir(parents=True, exist_ok=True)
    directory.key_file.parent.chmod(0o700)
    key = SigningKey.generate()
    key.save(directory.key_file)
    directory.settings_file.write_text(_settings(name, new))
    (path / "broker" / "fleet.acl").write_text(mosquitto_acl(name))
    if new.tls_hosts:
        create_authority(directory.tls)
        issue(directory.tls, new.tls_hosts[0], "broker", new.tls_hosts)
        (path / "broker" / "mosquitto.conf").write_text(production(ProductionSettings(local_port=port)))
    else:
        (path / "broker" / "mosquitto.conf").write_text(development(port))
    return directory, key.public


def _port(broker: str) -> int:
    host, _, port = broker.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"broker {broker!r}: give HOST:PORT, for example 127.0.0.1:1883")
    return int(port)


def _settings(name: FleetId, new: NewFleet) -> str:
    held_out = f'"{new.held_out.resolve()}"' if new.held_out else '"held-out.npz"'
    return _SETTINGS.format(
        fleet=name,
        broker=new.broker,
        goal=new.goal,
        held_out=held_out,
        no_evaluation="" if new.held_out else "# ",
        codec=f'"{DEFAULT_CODEC}"',
        codecs=", ".join(CODECS),
        adjustable=" and ".join(name for name, codec in CODECS.items() if codec.adjustable),
        no_password="" if new.tls_hosts else "# ",
    )


_SETTINGS = """\
# The coordinator's settings. Lines that are commented out show the defaults.
fleet = "{fleet}"
plan = "model.plan"              # made by: fedtide plan build TASK.py
# flush_after_s = 60.0           # aggregate a partly full buffer after this long
# open_enrolment = false         # accept the first key any device shows; for trials only

[broker]
hosts = ["{broker}"]
{no_password}username = "coordinator"
{no_password}password = "choose one"        # the one given to mosquitto_passwd
# [broker.tls]
# authority = "tls/authority.pem"
# certificate = "tls/coordinator.pem"
# key = "tls/coordinator.key"

[aggregator]                     # fedbuff (goal), fedasync (mixing) or fedavg (cohort)
kind = "fedbuff"
goal = {goal:<24}  # updates per model version

[staleness]                      # constant, polynomial, hinge, exponential, cutoff
kind = "polynomial"
exponent = 0.5

[server_optimizer]               # sgd, momentum, adam, yogi
kind = "sgd"
learning_rate = 1.0

[publish]
min_interval_s = 1.0
# every_versions = 1
# keep_versions = 100            # an update may start from any of so many published versions
# format = "grid"                # or "float32": the model to the bit, in many more bytes
# step = 8.0                     # of the grid's rounding; 4 is fine, 16 coarse
# deltas = true                  # from any of the last 128 published versions

[update]
codec = {codec:<24} # {codecs}
# codec_parameters = {{ step = 8.0 }}  # of {adjustable}; or bits_per_parameter, or bytes_per_update
# weight_by_examples = false
# [[update.later]]               # coarse early, fine late
# from_version = 200
# codec_parameters = {{ step = 4.0 }}

{no_evaluation}[evaluation]                     # held-out examples on the coordinator's side
{no_evaluation}data = {held_out}
{no_evaluation}every_versions = 1

# [release]                      # what a version must pass before devices use it; without this table: nothing
# on = "held-out"                # or "federated": on the examples that devices hold out
# metric_at_least = 0.95         # or metric_at_most, loss_at_most
# min_devices = 3                # of a federated gate

# [rollback]                     # which held-out results lead back to the last good version
# loss_factor = 2.0              # of the lowest loss so far; or metric_drop, metric_rise
# patience = 2                   # so many in a row; a loss that is not finite leads back at once

# [journal]
# keep_bytes = 4294967296        # of disk; the oldest history goes first
# snapshot_every_updates = 1000  # a restart reads one snapshot and what came after it

# [pacing]                       # of a fleet that comes back at one moment
# share = 0.5                    # of the updates a second that are sustained, as measured
# longest_s = 600.0              # no device is told to wait longer

# [share]                        # of one device, in messages; what is over is dropped unread
# messages_per_s = 50.0
# burst_messages = 1000

# [federated]                    # the mean of what devices find on the examples they hold out
# max_age_versions = 20

# [stop]                         # the first that holds
# versions = 1000
# updates = 10000
# metric = 0.95
# seconds = 3600.0

# [metrics]                      # Prometheus
# port = 9464
"""
