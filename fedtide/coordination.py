"""Making a coordinator from a fleet's directory. Needs the ``coordinator`` extra, but not torch."""

from coordinator.fence_note import noted, remove_note
from coordinator.fencing import Fenced
from coordinator.held_out import Evaluate, EvaluationFailed
from coordinator.metrics import serve_metrics
from coordinator.plan.file import BuiltPlan, load
from coordinator.recovery import Recovered, recover
from coordinator.release_gate import check_gate
from coordinator.service import CoordinatorService
from coordinator.settings import CoordinatorSettings
from edge_agent.data_sources import Npz
from edge_agent.plan_runtime import Evaluation, Evaluator, StepFailed
from fedtide.fleet_directory import FleetDirectory
from fedtide.wire.link import Traffic
from fedtide.wire.mqtt import MqttDialler
from fedtide.wire.parameters import Vector


def open_coordinator(
    directory: FleetDirectory, settings: CoordinatorSettings, traffic: Traffic, *, take_over: bool = False
) -> tuple[CoordinatorService, Recovered]:
    """Recover the fleet's state and put a service around it. Close what was recovered after its run.

    Args:
        directory: the fleet's.
        settings: the coordinator's.
        traffic: counts messages.
        take_over: go on although the last run here gave way to another run of the coordinator.

    Raises:
        Fenced: the last run here gave way.
        FileNotFoundError, DamagedPlanFile: there is no usable plan.
        AlreadyRunning, JournalDamaged, ReplayMismatch: the state cannot be used.
        DataError: the held-out examples do not fit the plan.
        SettingsError: no version of this plan can pass the release gate.
    """
    plan = load(settings.plan)
    check_gate(settings.release, plan.plan.manifest)
    key = directory.key()
    evaluate = held_out_evaluation(settings, plan)
    recovered = recover(directory.state, settings, plan)
    rival = noted(directory.state, recovered.disk)
    if rival is not None and not take_over:
        recovered.close()
        raise Fenced(rival, recovered.journal.ledger.epoch)
    service = CoordinatorService(
        settings,
        plan=plan,
        key=key,
        directory=directory.path,
        recovered=recovered,
        dial=MqttDialler(settings.broker, traffic),
        evaluate=evaluate,
        above=rival.epoch if rival is not None else None,
    )
    if rival is not None:
        remove_note(directory.state, recovered.disk)  # a higher epoch than the other's is claimed
    return service, recovered


async def serve(
    directory: FleetDirectory, settings: CoordinatorSettings, *, take_over: bool = False
) -> str | None:
    """Run the coordinator; the stop condition that held, or None after a signal.

    Raises:
        As :func:`open_coordinator`; Fenced also when another run of the coordinator has the fleet now.
    """
    service, recovered = open_coordinator(directory, settings, Traffic(), take_over=take_over)
    stop_metrics = (
        serve_metrics(settings.metrics, lambda: service.newest_status) if settings.metrics else None
    )
    try:
        return await service.run()
    finally:
        if stop_metrics:
            stop_metrics()
        recovered.close()


def check(directory: FleetDirectory, settings: CoordinatorSettings) -> str:
    """One sentence that says that everything a run needs is there.

    Raises:
        As :func:`open_coordinator`, but for what only the journal can tell.
    """
    plan = load(settings.plan)
    check_gate(settings.release, plan.plan.manifest)
    directory.key()
    held_out_evaluation(settings, plan)
    size = plan.plan.manifest.schema.size
    return f"Fleet {settings.fleet!r}: settings, key and plan {plan.plan.id} ({size:,} parameters) are good."


def held_out_evaluation(settings: CoordinatorSettings, plan: BuiltPlan) -> Evaluate | None:
    """The evaluation the settings ask for: the device's own runtime, on held-out examples.

    Raises:
        DataError: the examples do not fit the plan.
    """
    if settings.evaluation is None:
        return None
    dataset = Npz(path=settings.evaluation.data).load(plan.plan.manifest)
    evaluator = Evaluator(plan.plan)

    def evaluate(parameters: Vector) -> Evaluation:
        try:
            return evaluator.evaluate(parameters, dataset)
        except StepFailed as error:
            raise EvaluationFailed(str(error)) from error

    return evaluate
