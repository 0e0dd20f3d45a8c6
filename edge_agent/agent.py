"""The edge agent: deliver, wait for a model, fetch it, train, sign, and so on.

Working does not depend on being connected: training goes on while the network is away, and what it gave waits
in the outbox. Listening is the mailbox's part.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np

from edge_agent.coordinator_view import SealedHead
from edge_agent.data_sources import DataError
from edge_agent.data_sources.base import Read, read_at_once
from edge_agent.dataset import Dataset
from edge_agent.evaluation import Evaluate, InAThread
from edge_agent.fetch import Fetcher, FetchFailed, Superseded
from edge_agent.hold_out import HoldOut, Split
from edge_agent.kept_state import KeptFile, with_own_statistics
from edge_agent.local_update import TrainingDiverged, requested
from edge_agent.mailbox import Mailbox
from edge_agent.model_slots import InstalledModel, ModelSlots, WrongModel
from edge_agent.models import Models
from edge_agent.new_examples import FIRST_LOOK_S, LONGEST_LOOK_S, Shortage, TrainedTo, shortage
from edge_agent.outbox import Pending
from edge_agent.plan_runtime import LocalResult, Trainer
from edge_agent.plan_trial import PlanTrial
from edge_agent.reports import Reports
from edge_agent.sender import Sender, Tally
from edge_agent.settings import KEPT_FILE, MODELS_DIRECTORY, TRIAL_FILE, AgentSettings
from edge_agent.submission import Submission
from edge_agent.troubles import LASTING, DiskFailed, event_of, of_the_disk, trouble
from fedtide.wire.clock import SYSTEM_CLOCK, Clock
from fedtide.wire.disk import OS_DISK, Disk
from fedtide.wire.errors import WireError
from fedtide.wire.link import Dial, LinkDown
from fedtide.wire.messages import EvaluationEvent, Head, TrainingEvent
from fedtide.wire.plan import Plan, PlanManifest
from fedtide.wire.signatures import PublicKey, SigningKey
from fedtide.wire.steps import Step, reached
from fedtide.wire.training import Training

log = logging.getLogger(__name__)

_AFTER_FETCH_TROUBLE_S: Final = 1.0
_AFTER_LASTING_TROUBLE_S: Final = 30.0


@dataclass(frozen=True)
class Workbench:
    """What an agent needs from its surroundings; a simulated device brings its own.

    Attributes:
        dial: makes MQTT connections.
        examples: reads the examples for a plan. Raises ``DataError``.
        trainer: makes, or finds, the trainer of a plan. Raises ``PlanRefused``.
        compute: runs the training, in a thread or at a simulated pace.
        rng: draws the order of examples and the waits.
        evaluate: evaluates on the examples held out.
        read: runs ``examples``, in a thread or at once.
        disk: keeps the agent's files.
        clock: tells the time.
        beside: what runs as long as the agent, such as listening to sensors.
    """

    dial: Dial
    examples: Callable[[PlanManifest], Dataset]
    trainer: Callable[[Plan], Trainer]
    compute: Callable[[Callable[[], LocalResult]], Awaitable[LocalResult]]
    rng: np.random.Generator
    evaluate: Evaluate = field(default_factory=InAThread)
    read: Read = read_at_once
    disk: Disk = OS_DISK
    clock: Clock = SYSTEM_CLOCK
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None


class Agent:
    """One device's agent.

    Args:
        settings: from ``agent.toml``.
        key: the device's.
        bench: the surroundings.

    Attributes:
        tally: what it has done.
    """

    def __init__(self, settings: AgentSettings, key: SigningKey, bench: Workbench) -> None:
        coordinator = PublicKey.parse(settings.coordinator_key)
        self._settings = settings
        self._bench = bench
        self._clock = bench.clock
        self._submission = Submission(settings, key, bench.clock.wall, bench.disk)
        self._outbox = self._submission.outbox
        slots = ModelSlots(settings.state / MODELS_DIRECTORY, coordinator, bench.disk)
        fetcher = Fetcher(settings.fleet, settings.max_model_bytes)
        self._mailbox = Mailbox(
            settings,
            coordinator=coordinator,
            public=key.public,
            fetcher=fetcher,
            dial=bench.dial,
            rng=bench.rng,
            clock=bench.clock,
        )
        self._models = Models(settings.inference, slots, self._mailbox, fetcher, bench.clock.now)
        self._reports = Reports(settings.fleet, settings.device, self._mailbox, bench.clock.now)
        self._reports.tell_of_damage(self._outbox.damaged)
        self._hold_out = HoldOut()
        self._kept = KeptFile(settings.state / KEPT_FILE, bench.disk)
        self._trial = PlanTrial(settings.state / TRIAL_FILE, bench.disk)
        self._evaluated_version: int | None = None
        self._trained_version: int | None = None
        self._trained_to = TrainedTo(settings.state / "trained-to", bench.disk)
        self._short = False  # of examples, when last looked at
        self._look_after = self._look_wait_s = 0.0
        self._rest_until = 0.0
        self._asked_at = 0.0
        self.tally = Tally()
        self._sender = Sender(settings, self._submission, self._mailbox, bench.rng, self.tally)

    async def run(self) -> None:
        """Work until cancelled; then say goodbye. What is unfinished goes on after the next start."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._mailbox.run(), name=f"{self._settings.device}.mailbox")
                group.create_task(self._reports.run(), name=f"{self._settings.device}.reports")
                group.create_task(self._reports.tell_of_protocol(), name=f"{self._settings.device}.protocol")
                group.create_task(self._work(), name=f"{self._settings.device}.work")
                if self._bench.beside is not None:
                    group.create_task(self._bench.beside(), name=f"{self._settings.device}.beside")
        finally:
            await self._mailbox.say_goodbye()

    def cut(self) -> None:
        """Lose the connection without a goodbye, as a power cut would."""
        self._mailbox.cut()

    async def _work(self) -> None:
        while True:
            try:
                self._submission.finish()
                if (pending := self._outbox.oldest()) is not None:
                    await self._deliver(pending)
                await self._take_in(await self._mailbox.head(self._is_wanted, self._look_again_in_s))
            except (LinkDown, Superseded):
                await asyncio.sleep(0)  # for the mailbox to see that, and dial; or it has a newer head
            except LASTING as error:
                await self._rest_after(event_of(error), error, _AFTER_LASTING_TROUBLE_S)
            except (FetchFailed, WrongModel, WireError) as error:
                await self._rest_after("fetch.failed", error, _AFTER_FETCH_TROUBLE_S)
            except OSError as error:
                failure = of_the_disk(error)
                await self._rest_after(event_of(failure), failure, _AFTER_LASTING_TROUBLE_S)
                if isinstance(failure, DiskFailed):
                    raise failure from error

    async def _rest_after(self, event: str, error: Exception, longest_s: float) -> None:
        log.error("%s: %s", self._settings.device, error, extra={"event": event})
        newest = self._models.newest
        self._reports.tell_trouble(trouble(event, error, newest.head.version if newest else None))
        await asyncio.sleep(float(self._bench.rng.uniform(0.5, 1.0)) * longest_s)

    async def _deliver(self, pending: Pending) -> None:
        """Send an update until its receipt comes, or until a newer one shall take its place.

        The coordinator may have ended for good and never answer: its last release is kept meanwhile.
        """
        keeping = asyncio.create_task(self._models.keep_releases_left_behind())
        try:
            rest_s = await self._sender.deliver(pending)
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
        if rest_s is None:
            self._trained_version = None
        else:
            self._rest_until = self._clock.now() + rest_s
        if not keeping.cancelled():
            keeping.result()  # a failure of our own, or of the disk

    def _look_again_in_s(self) -> float | None:
        """Seconds until time alone may change whether a head is wanted; None: it will not."""
        moments = (self._rest_until, self._look_after, *self._models.turning_points)
        # After the question began, not after now: one that has passed since would be missed for ever.
        due = min((moment for moment in moments if moment > self._asked_at), default=None)
        return None if due is None else max(0.0, due - self._clock.now())

    def _is_wanted(self, head: Head) -> bool:
        self._asked_at = self._clock.now()
        return self._is_to_train_on(head) or self._is_to_evaluate(head) or self._models.wants_release(head)

    async def _take_in(self, newest: SealedHead) -> None:
        """Install what a head names, evaluate it, train on it: as far as each is due.

        Raises:
            LinkDown, FetchFailed, WrongModel, WireError: the model could not be had now.
        """
        short = self._is_to_train_on(newest.head) and await self._is_short_of_examples()
        newest = await self._mailbox.head(lambda _: True)  # one may have come while examples were read
        head = newest.head
        to_train = not short and self._is_to_train_on(head)
        model = None
        if to_train or self._is_to_evaluate(head):
            model = await self._models.install(newest, idle=not to_train)
        if self._models.wants_release(head):
            await self._models.keep_release(newest)
        if model is not None:
            self._trial.check(model.plan.id)
            await self._evaluate(model)
            if to_train:
                await self._train_on(model)

    async def _is_short_of_examples(self) -> bool:
        """Whether there are too few examples to train; then it says when to look again."""
        model = self._models.newest
        if model is None or not (self._short or self._settings.data.min_new_examples):
            return False
        manifest = model.plan.manifest
        try:
            missing = self._shortage(await self._examples(manifest), manifest)
        except DataError:
            return False  # of this plan, perhaps not of the next; the training will tell
        self._short = missing is not None
        if missing is None:
            self._look_wait_s = 0.0
            return False
        if not self._look_wait_s:
            log.info("Waiting: there are %s", missing, extra={"event": "examples.awaited"})
        self._look_wait_s = min(2 * self._look_wait_s, LONGEST_LOOK_S) or FIRST_LOOK_S
        self._look_after = self._clock.now() + self._look_wait_s
        return True

    def _shortage(self, dataset: Dataset, manifest: PlanManifest) -> Shortage | None:
        data = self._settings.data
        return shortage(
            dataset,
            needed=max(data.min_examples, manifest.min_batch),
            # An update that waits unsent gives way to a newer one, for which old examples will do.
            needed_new=data.min_new_examples if self._outbox.oldest() is None else 0,
            trained_to=self._trained_to.mark,
        )

    def _is_to_train_on(self, head: Head) -> bool:
        again = self._settings.training.same_version_again
        return (
            head.training
            and (again or head.version != self._trained_version)
            and self._clock.now() >= max(self._rest_until, self._look_after)
        )

    def _is_to_evaluate(self, head: Head) -> bool:
        newest = self._models.newest
        if newest is None or newest.head.plan != head.plan or head.version == self._evaluated_version:
            return False
        share = self._training(newest.plan.manifest).evaluation_share
        return share > 0 and (self._models.holds(head) or self._models.may_fetch_idly())

    def _training(self, manifest: PlanManifest) -> Training:
        return self._settings.training.applied_to(manifest.training)

    async def _examples(self, manifest: PlanManifest) -> Dataset:
        return await self._bench.read(partial(self._bench.examples, manifest))

    async def _split(self, dataset: Dataset, manifest: PlanManifest) -> Split:
        share = self._training(manifest).evaluation_share
        return await self._bench.read(partial(self._hold_out.split, dataset, share))

    async def _evaluate(self, model: InstalledModel) -> None:
        """Evaluate a version on the examples held out, once, and report it."""
        manifest, version = model.plan.manifest, model.head.version
        if version == self._evaluated_version or not self._training(manifest).evaluation_share:
            return
        held_out = (await self._split(await self._examples(manifest), manifest)).held_out
        self._evaluated_version = version  # whatever comes of it: training must not wait for ever
        if held_out is None:
            return
        own = with_own_statistics(manifest, model.parameters, self._kept.of(model.plan))
        with self._trial.evaluation(model.plan.id):
            found = await self._bench.evaluate(model.plan, own, held_out)
        if not math.isfinite(found.loss) or not math.isfinite(found.metric or 0.0):
            log.warning("Version %d evaluates to loss %g", version, found.loss,
                        extra={"event": "evaluation.not_finite"})  # fmt: skip
            return
        self._reports.tell(
            EvaluationEvent(
                version=version, num_examples=found.num_examples, loss=found.loss, metric=found.metric
            )
        )

    async def _train_on(self, model: InstalledModel) -> None:
        requested(model.head)  # what cannot be met is found out before anything is trained
        manifest = model.plan.manifest
        dataset = await self._examples(manifest)
        self._short = self._shortage(dataset, manifest) is not None
        if self._short:
            return
        examples = (await self._split(dataset, manifest)).training
        if not len(examples):
            raise DataError(
                f"all {len(dataset)} examples are held out; more of them, or a smaller evaluation_share, "
                "would leave some to train on"
            )
        training = self._training(manifest)
        version, kept = model.head.version, self._kept.of(model.plan)
        began = self._clock.now()
        with self._trial.update(model.plan.id):
            trainer = self._bench.trainer(model.plan)
            result = await self._bench.compute(
                lambda: trainer.run_epochs(
                    model.parameters, examples, training, self._bench.rng, version=version, kept=kept
                )
            )
        reached(Step.TRAINED)
        try:
            self._submission.make(model, result)
        except TrainingDiverged:
            self._kept.keep(model.plan, replace(kept, optimizer=()))  # it may be the cause
            raise
        self._trained_version = version  # even if the disk takes the update only later
        self._submission.finish()
        self._kept.keep(model.plan, result.kept)
        if self._settings.data.min_new_examples:
            self._trained_to.note(dataset.newest)
        self.tally.trained += 1
        log.info(
            "Trained on version %d: %d examples, loss %.4f", model.head.version, result.num_examples,
            result.loss, extra={"event": "training.done"},
        )  # fmt: skip
        self._report(model.head, result, self._clock.now() - began)

    def _report(self, head: Head, result: LocalResult, seconds: float) -> None:
        if math.isfinite(result.loss):
            self._reports.tell(
                TrainingEvent(
                    version=head.version,
                    num_examples=result.num_examples,
                    steps=result.steps,
                    seconds=seconds,
                    loss=result.loss,
                    metric=result.metric,
                )
            )
