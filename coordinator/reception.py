"""Reception: keeps a connection to the broker and turns what arrives into work. It judges nothing."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from coordinator.admission import Rejection
from coordinator.committer import Committer
from coordinator.federated import FederatedEvaluations
from coordinator.fencing import Fenced
from coordinator.fleet_claim import FleetClaim
from coordinator.fleet_view import FleetView, shown_key
from coordinator.intake import Intake, Refused
from coordinator.line import Waiting
from coordinator.publisher import Publisher
from coordinator.roster import KeyConflict, Roster, RosterFull
from coordinator.settings import CoordinatorSettings
from coordinator.shares import Shares
from fedtide.wire import ids, topics
from fedtide.wire.clock import Clock
from fedtide.wire.errors import MalformedId
from fedtide.wire.ids import Counter, DeviceId
from fedtide.wire.link import Connection, Delivery, Dial, LinkDown, PublishRefused, Reconnector, Session, Will
from fedtide.wire.messages import MissingChunks, Presence, Reason, Resync
from fedtide.wire.steps import Step, reached

log = logging.getLogger(__name__)

_RECEIVE_MAXIMUM: Final = 32
_SESSION_EXPIRY_S: Final = 7 * 86_400
_MAX_PENDING_KEYS: Final = 1000
_MOST_ASKED: Final = 5
_GAPS_FIRST: Final = 3
_TELL_FLOODING_EVERY_S: Final = 60.0


class Reception:
    """The coordinator's side of the broker.

    Attributes:
        connection: the live one, or None.
        view: what the devices say of themselves.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        intake: Intake,
        roster: Roster,
        committer: Committer,
        publisher: Publisher,
        pending: Path,
        dial: Dial,
        clock: Clock,
        rng: np.random.Generator,
        on_connected: Callable[[], None],
        claim: FleetClaim,
    ) -> None:
        self._settings = settings
        self._intake = intake
        self._roster = roster
        self._committer = committer
        self._publisher = publisher
        self._pending = pending
        self._clock = clock
        self._on_connected = on_connected
        self._claim = claim
        self._shares = Shares(settings.share, _TELL_FLOODING_EVERY_S)
        self._other_shares = Shares(settings.share, _TELL_FLOODING_EVERY_S)  # of presence and events
        self._reconnector = Reconnector(dial, settings.broker, rng, _log_failure)
        self.view = FleetView(FederatedEvaluations(settings.update.max_examples))
        self.connection: Connection | None = None

    async def run(self) -> None:
        """Connect, serve, connect again, for ever.

        Raises:
            Fenced: another run of this coordinator has the fleet.
        """
        first, fenced = True, list[Fenced]()
        await self._claim.look(self._reconnector)
        self._look_at_the_pace()
        while True:
            connection = await self._reconnector.connect(self._session())
            try:
                await self._serve(connection, resync=first or not connection.session_present)
            except* (LinkDown, PublishRefused) as lost:
                log.warning("Broker: %s", lost.exceptions[0], extra={"event": "link.down"})
            except* Fenced as lost:
                fenced.extend(error for error in lost.exceptions if isinstance(error, Fenced))
                await connection.close()  # with a goodbye: our will would say that the coordinator is away
            finally:
                self.connection = None
                connection.abort()
            if fenced:
                raise fenced[0]
            first = False
            await self._reconnector.pause()

    async def ask_for_missing(self, silent_s: float) -> None:
        """Ask devices for chunks that did not arrive with the others, ever more rarely; give up in the end.

        On a slow link the next chunk may take a minute, so what may still be on its way is asked for last. A
        device that comes back later sends its update from the beginning.
        """
        connection = self.connection
        if connection is None:
            return
        now = self._clock.now()
        for sender, partial in self._intake.assembler.silent_since(now - silent_s).items():
            if now - partial.touched < silent_s * 2.0**partial.asked:
                continue
            if partial.asked == _MOST_ASKED:
                self._intake.assembler.drop(sender)
                continue
            indexes = partial.gaps() if partial.asked < _GAPS_FIRST else partial.missing()
            partial.touched, partial.asked = now, partial.asked + 1
            if not indexes:
                continue
            device = DeviceId(sender)
            missing = MissingChunks(
                device=device,
                counter=partial.first.counter,
                digest=partial.first.digest,
                indexes=indexes,
            )
            await self._committer.send_down(connection, device, missing)

    async def steer(self) -> None:
        """Look at how many devices there are, and tell all of them when they shall spread out otherwise."""
        self._shares.forget_idle(self._clock.now())
        self._other_shares.forget_idle(self._clock.now())
        if self._look_at_the_pace() and self.connection is not None:
            with contextlib.suppress(LinkDown, PublishRefused):
                await self._publisher.announce(self.connection, online=True)

    def _look_at_the_pace(self) -> bool:
        online = sum(presence.online for presence in self.view.presence.values())
        heard = len(self._shares)  # where the broker dropped a presence, the device is there nevertheless
        news = self._committer.pacer.look(enrolled=len(self._roster), online=max(online, heard))
        self._publisher.spread_s = self._committer.pacer.spread_s
        return news

    def _session(self) -> Session:
        will_topic = topics.COORDINATOR.name(self._settings.fleet)
        return Session(
            client_id=f"{self._settings.fleet}-coordinator-0",
            clean_start=False,
            expiry_s=_SESSION_EXPIRY_S,
            receive_maximum=_RECEIVE_MAXIMUM,
            will=Will(will_topic, self._publisher.state_message(online=False)),
        )

    async def _serve(self, connection: Connection, *, resync: bool) -> None:
        """Announce and receive. ``resync``: the broker forgot our session, so perhaps updates too."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announce(connection, resync=resync), name="coordinator.announce")
            # What ends only with the connection is the group's body, not its child: when a child fails after
            # the body has ended, the task counts as cancelled for ever (CPython 3.11 and 3.12).
            await self._receive(connection)

    async def _announce(self, connection: Connection, *, resync: bool) -> None:
        fleet = self._settings.fleet
        await self._claim.listen(connection)
        await connection.subscribe([topics.UPDATE.filter(fleet, shard=0), topics.PRESENCE.filter(fleet)])
        await connection.subscribe([topics.EVENT.filter(fleet)], qos=topics.EVENT.qos)
        await self._claim.announce(connection)
        # A broker that crashed may know our session of yesterday and none of today's chunks.
        await self._publisher.renew(connection, everything=True)
        self.connection = connection
        log.info("Connected with MQTT %s", connection.mqtt_version, extra={"event": "link.up"})
        self._on_connected()
        if resync:
            await self._resync(connection)

    async def _resync(self, connection: Connection) -> None:
        for device, presence in list(self.view.presence.items()):
            if presence.online:
                await self._committer.send_down(connection, device, Resync(device=device))

    async def _receive(self, connection: Connection) -> None:
        async for delivery in self._claim.deliveries(connection):
            if fields := topics.UPDATE.parse(delivery.topic):
                self._take_update(connection, delivery, fields["device"])
                await self._committer.room()
                continue
            connection.acknowledge(delivery)
            presence, event = topics.PRESENCE.parse(delivery.topic), topics.EVENT.parse(delivery.topic)
            fields = presence or event
            if fields is None:
                continue
            device, take = DeviceId(fields["device"]), self._take_presence if presence else self._take_event
            if not self._other_shares.take(self._enrolled(device), self._clock.now()):
                self.view.malformed += 1
                continue
            try:
                take(device, delivery.payload)
            except Exception:  # one message for people must not end the coordinator
                self.view.malformed += 1
                log.exception("Ignored %s", delivery.topic, extra={"event": "message.ignored"})

    def _enrolled(self, sender: str) -> DeviceId | None:
        device = DeviceId(sender)
        return device if self._roster.key(device) is not None else None

    def _take_update(self, connection: Connection, delivery: Delivery, sender: str) -> None:
        now, device = self._clock.now(), self._enrolled(sender)
        if not self._shares.take(device, now):
            self._turn_away(connection, delivery, device, now)
            return
        if device is not None and self._committer.turn_away_behind(device, delivery, connection):
            return
        reached(Step.UPDATE_RECEIVED)
        arrival = self._intake.receive(sender, delivery.payload, now)
        if arrival is None:
            connection.acknowledge(delivery)  # a chunk of an update; a lost one is asked for again
        else:
            reached(Step.UPDATE_VERIFIED)
            self._committer.put(Waiting(arrival, delivery, connection))

    def _turn_away(
        self, connection: Connection, delivery: Delivery, device: DeviceId | None, now: float
    ) -> None:
        """Leave a message unread. Its sender is told now and then, in a receipt that is of no update."""
        if device is not None and self._shares.answers(device, now):
            detail = f"more than {self._settings.share.messages_per_s:g} messages a second are not read"
            refused = Refused(device, Counter(0), bytes(32), Rejection(Reason.TOO_MANY, detail))
            self._committer.put(Waiting(refused, delivery, connection))
        else:
            self._committer.turn_away(delivery, connection)

    def _take_event(self, device: DeviceId, payload: bytes) -> None:
        published = self._publisher.version
        if self._roster.key(device) is not None and published is not None:
            self.view.note_event(device, payload, published.number)

    def _take_presence(self, device: DeviceId, payload: bytes) -> None:
        if self._roster.key(device) is not None:
            self.view.note_presence(device, payload)
        elif self.view.size < self._settings.max_devices + _MAX_PENDING_KEYS:
            presence = self.view.note_presence(device, payload)  # it may be enrolled in a minute
            if presence is not None:
                self._offer_enrolment(device, presence)

    def _offer_enrolment(self, device: DeviceId, presence: Presence) -> None:
        """Keep a stranger's key for the operator, or enrol it at once where the settings say so."""
        key = shown_key(presence)
        if key is None:
            return
        try:
            name = ids.device_id(device)
            if self._settings.open_enrolment:
                self._roster.enrol(name, key)
                log.warning("Enrolled %s: open enrolment is on", name, extra={"event": "device.enrolled"})
            elif self._room_for(name):
                (self._pending / f"{name}.pub").write_text(f"{key}\n")
        except (KeyConflict, RosterFull, MalformedId) as error:
            log.warning("Not enrolled: %s", error, extra={"event": "device.refused"})

    def _room_for(self, device: DeviceId) -> bool:
        self._pending.mkdir(exist_ok=True)
        known = (self._pending / f"{device}.pub").exists()
        return known or sum(1 for _ in self._pending.iterdir()) < _MAX_PENDING_KEYS


def _log_failure(error: LinkDown, wait_s: float) -> None:
    log.warning("%s; next attempt in %.1f s", error, wait_s, extra={"event": "link.retry"})
