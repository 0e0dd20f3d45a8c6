"""One MQTT connection under a test's control: every step waits for the broker's answer."""

import contextlib
import queue
import socket
import ssl
from dataclasses import dataclass

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

DEADLINE_S = 10.0
SOON_S = 1.0
SESSION_S = 3600


@dataclass(frozen=True)
class Login:
    """How a peer shows who it is: a certificate's context, or a user name and password."""

    tls: ssl.SSLContext | None = None
    user: str | None = None
    password: str | None = None


@dataclass(frozen=True)
class Will:
    topic: str
    payload: bytes


class Refused(Exception):
    """The broker hung up, or answered the CONNECT with a reason."""


class Peer:
    """A connected paho client. Entering it connects; leaving it disconnects politely."""

    def __init__(
        self, address, name, *, version=4, login=None, persistent=False, acknowledges=True, will=None
    ):
        self.name = name
        self.session_present = False
        self._address = address
        self._version = version
        self._persistent = persistent
        self._events = queue.Queue()
        self._arrived = queue.Queue()
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            protocol=mqtt.MQTTProtocolVersion(version),
            clean_session=None if version == 5 else not persistent,
            reconnect_on_failure=False,
            manual_ack=not acknowledges,
        )
        login = Login() if login is None else login
        if login.tls is not None:
            self._client.tls_set_context(login.tls)
        if login.user is not None:
            self._client.username_pw_set(login.user, login.password)
        if will is not None:
            self._client.will_set(will.topic, will.payload, qos=1, retain=True)
        self._client.on_connect = lambda _c, _u, flags, reason, _p: self._on_connect(flags, reason)
        self._client.on_disconnect = lambda *_: self._events.put(("disconnected", None))
        self._client.on_subscribe = lambda _c, _u, mid, *_: self._events.put(("subscribed", mid))
        self._client.on_unsubscribe = lambda _c, _u, mid, *_: self._events.put(("unsubscribed", mid))
        self._client.on_publish = lambda _c, _u, mid, reason, _p: self._events.put(
            ("published", (mid, reason.value))
        )
        self._client.on_message = lambda _c, _u, message: self._arrived.put(message)

    def __enter__(self):
        try:
            if self._version == 5:
                session = Properties(PacketTypes.CONNECT)
                session.SessionExpiryInterval = SESSION_S if self._persistent else 0
                self._client.connect(*self._address, clean_start=not self._persistent, properties=session)
            else:
                self._client.connect(*self._address)
            self._client.loop_start()
            answer = self._events.get(timeout=DEADLINE_S)
        except BaseException:
            self.__exit__()
            raise
        if answer != ("connected", 0):
            self.__exit__()
            raise Refused(f"{self.name}: {answer}")
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._client.disconnect()
        self._client.loop_stop()

    def subscribe(self, *topics, qos=1):
        for topic in topics:
            _, mid = self._client.subscribe(topic, qos)
            self._await("subscribed", mid)

    def unsubscribe(self, topic):
        _, mid = self._client.unsubscribe(topic)
        self._await("unsubscribed", mid)

    def publish(self, topic, payload, *, retain=False):
        """Publish at least once; returns the PUBACK's reason code, or None if the broker hung up instead."""
        mid = self._client.publish(topic, payload, qos=1, retain=retain).mid
        while True:
            kind, answer = self._events.get(timeout=DEADLINE_S)
            if kind == "disconnected":
                return None
            if kind == "published" and answer[0] == mid:
                return answer[1]

    def receive(self):
        """The next message, in the order of arrival."""
        return self._arrived.get(timeout=DEADLINE_S)

    def receive_soon(self):
        """The next message, or None if none comes in a time in which a broker on loopback sends thousands."""
        with contextlib.suppress(queue.Empty):
            return self._arrived.get(timeout=SOON_S)
        return None

    def vanish(self):
        """Close the socket without a word, as a device that loses power does."""
        self._client.socket().shutdown(socket.SHUT_RDWR)
        self._await("disconnected", None)

    def _on_connect(self, flags, reason):
        self.session_present = flags.session_present
        self._events.put(("connected", reason.value))

    def _await(self, kind, value):
        event = self._events.get(timeout=DEADLINE_S)
        assert event == (kind, value), f"{self.name} waited for {(kind, value)} and got {event}"
