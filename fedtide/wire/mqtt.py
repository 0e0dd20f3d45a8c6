"""The link over paho-mqtt: the one module that imports the MQTT library.

One paho client per connection, driven by the asyncio loop's selector: no threads (``loop_start`` stops
silently at about 340 clients in a process), no resending from memory, no late acknowledgement elsewhere.
MQTT 5 first; 3.1.1 where the broker has no 5.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Literal, cast

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fedtide.wire.buffered_socket import BufferedSocket
from fedtide.wire.link import Broker, Connection, Delivery, LinkDown, PublishRefused, Session, Traffic
from fedtide.wire.packets import packet_bytes, plain_puback, plain_publish

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 10.0
_PUBLISH_WINDOW: Final = 16  # unacknowledged publishes under way; more gains nothing on one TCP connection
MAX_PACKET_BYTES: Final = 128 * 1024
"""Announced to the broker, which drops larger ones: a chunk with all around it. MQTT 3.1.1 has no word for
it; there the broker's own limit has to do, for the library reads a packet whole before it tells of it."""
_MAX_WAITING: Final = 256
"""Received and not yet taken; beyond it nothing is read, and TCP makes the broker wait. The receive maximum
does not do: mosquitto 2.0.11 answers each PUBACK with so many messages as long as it has any."""
_MAX_WAITING_BYTES: Final = 16 << 20
_FILTERS_PER_SUBSCRIBE: Final = 8  # what AWS IoT Core takes
_UNSUPPORTED_PROTOCOL: Final = 0x84
_REFUSED: Final = 0x80
_SUCCESS: Final = ReasonCode(PacketTypes.PUBACK)
_NO_PROPERTIES: Final = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]


class _NoMqtt5(LinkDown):
    """The broker does not speak MQTT 5."""


class MqttDialler:
    """Makes connections to the brokers of one ``[broker]`` table; remembers which speak MQTT 5."""

    def __init__(self, broker: Broker, traffic: Traffic) -> None:
        self._broker = broker
        self._traffic = traffic
        self._old_hosts: set[str] = set()

    async def __call__(self, session: Session, attempt: int) -> Connection:
        """Dial host number ``attempt`` modulo the list.

        Raises:
            LinkDown: no connection; the text names the host and the cause.
        """
        host = self._broker.hosts[attempt % len(self._broker.hosts)]
        if host not in self._old_hosts:
            try:
                return await self._dial(host, session, MQTTProtocolVersion.MQTTv5)
            except _NoMqtt5:
                self._old_hosts.add(host)
                log.info("broker %s has no MQTT 5; using 3.1.1", host, extra={"event": "link.fallback"})
        return await self._dial(host, session, MQTTProtocolVersion.MQTTv311)

    async def _dial(self, host: str, session: Session, version: MQTTProtocolVersion) -> "MqttConnection":
        name, _, port = host.rpartition(":")
        connection = MqttConnection(self._broker, session, version, self._traffic)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await connection.open(name.strip("[]") or host, int(port) if name else 1883)
        except TimeoutError:
            connection.abort()
            raise LinkDown(f"broker {host} did not answer within {CONNECT_TIMEOUT_S:g} s") from None
        except (OSError, ValueError) as error:
            connection.abort()
            raise LinkDown(f"broker {host}: {error}") from error
        except BaseException:
            connection.abort()
            raise
        return connection


class MqttConnection:
    """One MQTT connection over paho. Made by ``MqttDialler``; used as ``fedtide.wire.link.Connection``."""

    def __init__(
        self, broker: Broker, session: Session, version: MQTTProtocolVersion, traffic: Traffic
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._session = session
        self._version = version
        self._traffic = traffic
        self._keepalive_s = broker.keepalive_s
        self._connack: asyncio.Future[None] = self._loop.create_future()
        self._acks: dict[int, asyncio.Future[None]] = {}
        self._inbox: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._inbox_bytes = 0
        self._holding = False  # whether we read nothing until some of the inbox is taken
        self._written = asyncio.Event()
        self._written.set()
        self._window = asyncio.Semaphore(_PUBLISH_WINDOW)
        self._lost: LinkDown | None = None
        self._socket: BufferedSocket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unsent_bytes = self._arrived_bytes = 0  # at the last look
        self._watching = False  # whether the selector tells when the socket can be written
        self._session_present = False
        self._max_packet_bytes: int | None = None
        self._client = self._make_client(broker)

    @property
    def mqtt_version(self) -> str:
        """``5`` or ``3.1.1``."""
        return "5" if self._version is MQTTProtocolVersion.MQTTv5 else "3.1.1"

    @property
    def session_present(self) -> bool:
        """Whether the broker remembered this client identifier's session."""
        return self._session_present

    @property
    def max_packet_bytes(self) -> int | None:
        """The largest packet the broker announced it accepts, if it did."""
        return self._max_packet_bytes

    async def open(self, host: str, port: int) -> None:
        """Connect and wait for the CONNACK.

        Raises:
            OSError: no TCP or TLS connection.
            LinkDown: the broker refused.
        """
        # paho blocks for the TCP and TLS handshakes; no callback is set yet, so it stays in that thread.
        connecting = asyncio.to_thread(self._connect_blocking, host, port)
        await asyncio.shield(asyncio.ensure_future(connecting))
        if self._lost:
            raise self._lost
        client = self._client
        self._socket = cast("BufferedSocket | None", client.socket())
        if self._socket is None:
            raise LinkDown(f"broker {host}:{port} closed the connection")
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_wants_write
        self._loop.add_reader(self._socket, self._read)
        self._write()
        self._timer = self._loop.call_later(self._keepalive_s / 4, self._keep_alive)
        await self._connack
        self._traffic.connections += 1

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """See ``Connection.publish``."""
        size_bytes = packet_bytes(topic, payload)
        if self._max_packet_bytes is not None and size_bytes > self._max_packet_bytes:
            # paho would send it, the broker would cut the connection, and the resend would never end.
            raise PublishRefused(
                f"{size_bytes:,} bytes on {topic}; the broker takes at most {self._max_packet_bytes:,}"
            )
        if qos == 0:
            self._send(topic, payload, qos, retain=retain)
            await self._written.wait()
            return
        async with self._window:
            await self._acknowledged(self._send(topic, payload, qos, retain=retain))

    def _send(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> int:
        """Hand a message to the library; its packet identifier."""
        self._check()
        sent = self._client.publish(topic, payload, qos=qos, retain=retain)
        self._traffic.sent_bytes += packet_bytes(topic, payload)
        self._traffic.sent_messages += 1
        return sent.mid

    async def subscribe(self, filters: Sequence[str], *, qos: int = 1) -> None:
        """See ``Connection.subscribe``."""
        for start in range(0, len(filters), _FILTERS_PER_SUBSCRIBE):
            self._check()
            part = filters[start : start + _FILTERS_PER_SUBSCRIBE]
            _, mid = self._client.subscribe([(name, self._subscription(qos)) for name in part])
            await self._acknowledged(mid)

    async def unsubscribe(self, filters: Sequence[str]) -> None:
        """See ``Connection.unsubscribe``."""
        for start in range(0, len(filters), _FILTERS_PER_SUBSCRIBE):
            self._check()
            _, mid = self._client.unsubscribe(list(filters[start : start + _FILTERS_PER_SUBSCRIBE]))
            await self._acknowledged(mid)

    async def deliveries(self) -> AsyncIterator[Delivery]:
        """See ``Connection.deliveries``."""
        while True:
            delivery = await self._inbox.get()
            if delivery is None:
                self._inbox.put_nowait(None)  # everyone who waits shall hear it
                self._check()
                return
            self._inbox_bytes -= len(delivery.payload)
            if self._holding and not self._is_full(half=True):
                self._holding = False
                self._watch_reading()
            yield delivery

    def acknowledge(self, delivery: Delivery) -> None:
        """See ``Connection.acknowledge``."""
        if delivery.qos and self._lost is None:
            self._client.ack(delivery.packet_id, delivery.qos)

    async def close(self) -> None:
        """See ``Connection.close``."""
        if self._lost is None:
            self._client.disconnect()
            self._write()  # the DISCONNECT must leave before the socket closes
        self._down(LinkDown("closed"))

    def abort(self) -> None:
        """See ``Connection.abort``."""
        self._down(LinkDown("aborted"))

    def _connect_blocking(self, host: str, port: int) -> None:
        if self._version is MQTTProtocolVersion.MQTTv5:
            self._client.connect(
                host,
                port,
                self._keepalive_s,
                clean_start=self._session.clean_start,
                properties=self._connect_properties(),
            )
        else:
            self._client.connect(host, port, self._keepalive_s)

    def _make_client(self, broker: Broker) -> "_Client":
        old = self._version is MQTTProtocolVersion.MQTTv311
        client = _Client(
            self._on_delivery,
            self._on_acknowledged,
            CallbackAPIVersion.VERSION2,
            client_id=self._session.client_id,
            clean_session=self._session.clean_start if old else None,
            protocol=self._version,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(0)  # our own window, so that nothing waits inside paho
        if broker.username is not None:
            client.username_pw_set(broker.username, broker.password)
        if broker.tls:
            client.tls_set(
                ca_certs=str(broker.tls.authority),
                certfile=str(broker.tls.certificate) if broker.tls.certificate else None,
                keyfile=str(broker.tls.key) if broker.tls.key else None,
            )
        if self._session.will:
            client.will_set(self._session.will.topic, self._session.will.payload, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        return client

    def _connect_properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._session.expiry_s
        properties.ReceiveMaximum = self._session.receive_maximum
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        return properties

    def _subscription(self, qos: int) -> Any:
        return SubscribeOptions(qos=qos) if self._version is MQTTProtocolVersion.MQTTv5 else qos

    def _check(self) -> None:
        if self._lost:
            raise self._lost

    async def _acknowledged(self, mid: int | None) -> None:
        self._check()
        if mid is None:
            raise LinkDown("the MQTT library refused to send")
        future = self._acks[mid] = self._loop.create_future()
        try:
            await future
        finally:
            self._acks.pop(mid, None)

    def _down(self, cause: LinkDown) -> None:
        """End this connection once: wake everyone who waits on it."""
        if self._lost:
            return
        self._lost = cause
        self._client.is_given_up = True
        if self._timer:
            self._timer.cancel()
        for future in (self._connack, *self._acks.values()):
            if not future.done():
                future.set_exception(cause)
                future.exception()  # nobody may be waiting for it
        self._inbox.put_nowait(None)
        self._written.set()
        self._release_socket()
        if not self._loop.is_closed():
            self._loop.call_soon(self._cut)  # paho's callbacks hold its lock: not from inside one

    def _cut(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._client._sock_close()  # noqa: SLF001 - paho has no public way to cut a connection

    def _release_socket(self) -> None:
        if self._socket is not None and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._socket = None

    def _watch_reading(self) -> None:
        if self._socket is None:
            return
        if self._holding:
            self._loop.remove_reader(self._socket)
        else:
            self._loop.add_reader(self._socket, self._read)
            self._loop.call_soon(self._read)  # what was read ahead, the selector cannot see

    def _is_full(self, *, half: bool = False) -> bool:
        """Whether the inbox holds as much as it may, or half of it."""
        part = 2 if half else 1
        return self._inbox.qsize() * part >= _MAX_WAITING or self._inbox_bytes * part >= _MAX_WAITING_BYTES

    def _read(self) -> None:
        code = MQTTErrorCode.MQTT_ERR_SUCCESS
        while code == MQTTErrorCode.MQTT_ERR_SUCCESS and self._socket is not None and not self._holding:
            code = self._client.loop_read()
            if self._socket is None or not self._socket.pending():
                break
        self._expect(code)

    def _write(self) -> None:
        if self._socket is None:
            return
        self._expect(self._client.loop_write())
        if self._socket is None:
            return
        if self._client.want_write() == self._watching:
            return
        self._watching = not self._watching
        if self._watching:
            self._written.clear()
            self._loop.add_writer(self._socket, self._write)
        else:
            self._written.set()
            self._loop.remove_writer(self._socket)

    def _keep_alive(self) -> None:
        if self._is_leaving():
            # On a slow link a PINGREQ waits behind what is on its way for longer than the keepalive. paho
            # would hang up, the next connection would begin anew, and a large message would never arrive.
            self._client._ping_t = 0  # noqa: SLF001 - it has no public way to be patient
        self._expect(self._client.loop_misc())
        if self._lost is None:
            self._timer = self._loop.call_later(self._keepalive_s / 4, self._keep_alive)

    def _is_leaving(self) -> bool:
        """Whether something was on its way at the last look, and some of it has reached the peer since.

        Not whether less or more is on its way than then: on a dead link each PINGREQ would be more.
        """
        was_under_way, had_arrived = self._unsent_bytes > 0, self._arrived_bytes
        if self._socket is None:
            return False
        self._unsent_bytes = self._socket.unsent_bytes()
        self._arrived_bytes = self._socket.sent_bytes - self._unsent_bytes
        return was_under_way and self._arrived_bytes > had_arrived

    def _expect(self, code: MQTTErrorCode) -> None:
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._down(LinkDown(f"connection lost: {paho.error_string(code)}"))

    def _on_wants_write(self, *_: object) -> None:
        self._loop.call_soon(self._write)  # packets queued in this tick leave together

    def _on_socket_close(self, *_: object) -> None:
        self._release_socket()

    def _on_connect(
        self, _client: object, _data: object, flags: paho.ConnectFlags, code: ReasonCode, properties: Any
    ) -> None:
        if code.value == _UNSUPPORTED_PROTOCOL:
            self._down(_NoMqtt5(f"broker refused: {code}"))
        elif code.is_failure:
            self._down(LinkDown(f"broker refused the connection: {code}"))
        else:
            self._session_present = flags.session_present
            self._max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
            self._window = asyncio.Semaphore(
                min(_PUBLISH_WINDOW, getattr(properties, "ReceiveMaximum", _PUBLISH_WINDOW))
            )
            if not self._connack.done():
                self._connack.set_result(None)

    def _on_disconnect(
        self, _client: object, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        self._down(LinkDown(f"connection lost: {code}"))

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        payload = bytes(message.payload)
        self._on_delivery(Delivery(message.topic, payload, message.mid, message.qos, message.retain))

    def _on_delivery(self, delivery: Delivery) -> None:
        self._traffic.received_bytes += packet_bytes(delivery.topic, delivery.payload)
        self._traffic.received_messages += 1
        self._inbox_bytes += len(delivery.payload)
        self._inbox.put_nowait(delivery)
        if not self._holding and self._is_full():
            self._holding = True
            self._watch_reading()

    def _on_acknowledged(self, mid: int, code: ReasonCode) -> None:
        self._settle(mid, PublishRefused(f"the broker refused: {code}") if code.value >= _REFUSED else None)

    def _on_subscribe(
        self, _client: object, _data: object, mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        refused = [str(code) for code in codes if code.value >= _REFUSED]
        self._settle(mid, LinkDown(f"the broker refused a subscription: {refused[0]}") if refused else None)

    def _on_unsubscribe(
        self, _client: object, _data: object, mid: int, _codes: object, _properties: object
    ) -> None:
        self._settle(mid, None)

    def _settle(self, mid: int, error: Exception | None) -> None:
        future = self._acks.get(mid)
        if future is None or future.done():
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(None)


class _Client(paho.Client):
    """paho's client, with shorter ways for the packets that come by the thousand.

    The methods are private ones of paho: a version of it that has others would go its own, longer way with
    what is received, and the tests would see that nothing is acknowledged.

    Args:
        deliver: called with each message received.
        acknowledged: called with each message's packet identifier and reason code once the broker has it.
        arguments: paho's own.
        options: likewise.

    Attributes:
        is_given_up: nobody waits for this connection any more.
    """

    def __init__(
        self,
        deliver: Callable[[Delivery], None],
        acknowledged: Callable[[int, ReasonCode], None],
        *arguments: Any,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._deliver = deliver
        self._tell_acknowledged = acknowledged
        self.is_given_up = False

    def _create_socket(self) -> Any:
        made = cast("socket.socket", super()._create_socket())
        if self.is_given_up:  # a CONNECT now would end a later connection of the same client identifier
            made.close()
            raise ConnectionAbortedError("made too late")
        return BufferedSocket(made)

    def _handle_publish(self) -> MQTTErrorCode:
        packet, with_properties = self._in_packet, self._protocol == MQTTProtocolVersion.MQTTv5
        delivery = plain_publish(packet["command"], packet["packet"], with_properties=with_properties)
        if delivery is None:
            return super()._handle_publish()
        self._deliver(delivery)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _handle_pubackcomp(self, cmd: Literal["PUBACK", "PUBCOMP"]) -> MQTTErrorCode:
        mid = plain_puback(self._in_packet["packet"]) if cmd == "PUBACK" else None
        if mid is None or mid not in self._out_messages:
            return super()._handle_pubackcomp(cmd)
        return self._do_on_publish(mid, _SUCCESS, _NO_PROPERTIES)

    def _do_on_publish(self, mid: int, reason_code: ReasonCode, properties: Properties) -> MQTTErrorCode:
        done = super()._do_on_publish(mid, reason_code, properties)
        self._tell_acknowledged(mid, reason_code)
        return done
