"""The configuration of the NATS server, the embedded broker where mosquitto is not installed.

It speaks MQTT 3.1.1 over JetStream, its own message store.
"""

import json
from pathlib import Path

_TEMPLATE = """\
# NATS as an MQTT 3.1.1 broker for one machine. Written by broker_config.nats.
# The MQTT side of NATS refuses to start without a name and a store.
server_name: fedtide
# NATS's own protocol is not used: loopback only, any free port.
host: "127.0.0.1"
port: -1
# A chunk is at most 122880 B of payload; 1 MiB leaves room and still stops a stray whole model.
max_payload: 1048576
jetstream {{
  store_dir: {store}
}}
mqtt {{
  host: {host}
  port: {port}
  # A message that was not acknowledged comes again after this time, also after a reconnect.
  ack_wait: "{ack_wait}s"
  # Unacknowledged messages per subscription: the coordinator's receive maximum is far below.
  max_ack_pending: 1024
}}
"""


def embedded(port: int, store: Path, host: str = "127.0.0.1", ack_wait: int = 30) -> str:
    """Render nats-server.conf for one anonymous broker on one machine.

    Args:
        port: the TCP port of the MQTT listener.
        store: the folder of the message store; NATS creates it.
        host: the address the MQTT listener binds to.
        ack_wait: seconds until an unacknowledged message is sent again.

    Raises:
        ValueError: the port is not 1 to 65535, or ack_wait is below one second.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not a TCP port: take one from 1 to 65535")
    if ack_wait < 1:
        raise ValueError(f"ack_wait is {ack_wait} s: at least 1 s, or nothing could be acknowledged in time")
    # JSON strings are valid NATS strings, and they quote spaces and backslashes in paths.
    return _TEMPLATE.format(store=json.dumps(str(store)), host=json.dumps(host), port=port, ack_wait=ack_wait)
