"""Prometheus metrics, read from the same ``Status`` that operators see. Names follow the glossary."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.settings import Metrics
from coordinator.status import Status


class StatusCollector(Collector):
    """Turns a status into metrics whenever it is scraped."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """All metrics of this moment."""
        status = self._status()
        updates = CounterMetricFamily("fedtide_updates", "Updates judged, by verdict and reason.",
                                      labels=("verdict", "reason"))  # fmt: skip
        updates.add_metric(("applied", ""), status.updates.applied)
        updates.add_metric(("duplicate", ""), status.updates.duplicate)
        for reason, count in sorted(status.updates.rejected.items()):
            updates.add_metric(("rejected", reason), count)
        yield updates
        yield CounterMetricFamily(
            "fedtide_updates_received", "Updates that arrived.", status.updates.received
        )
        yield CounterMetricFamily(
            "fedtide_messages_ignored", "Presence and events that could not be read.", status.ignored_messages
        )
        troubles = CounterMetricFamily("fedtide_trouble_reports", "Trouble that devices reported, by event.",
                                       labels=("event",))  # fmt: skip
        for event, count in sorted(status.troubles.items()):
            troubles.add_metric((event,), count)
        yield troubles
        yield CounterMetricFamily(
            "fedtide_rollbacks", "Versions that have an earlier one's parameters again.", status.rollbacks
        )
        federated = status.federated
        gauges = {
            "updates_waiting": (
                "Updates that arrived and are not judged durably yet.",
                status.updates.waiting,
            ),
            "model_version": ("The newest model version.", status.version),
            "published_version": ("The newest version that devices were offered.", status.published_version),
            "buffered_updates": ("Updates in the buffer.", status.buffered),
            "devices_enrolled": ("Devices in the roster.", len(status.devices)),
            "devices_online": ("Devices that are there.", sum(device.online for device in status.devices)),
            "devices_in_trouble": (
                "Devices that say why they do not train.",
                sum(device.trouble is not None for device in status.devices),
            ),
            "keyframe_bytes": ("The published version, whole.", status.keyframe_bytes),
            "delta_bytes": ("What changed since the version before it.", status.delta_bytes),
            "connected": ("Whether there is a broker.", int(status.connected)),
            "released_version": ("The newest version released for inference.", status.released_version),
            "federated_loss": ("Loss on what the devices hold out.", federated.loss if federated else None),
            "federated_metric": (
                "Metric on what the devices hold out.",
                federated.metric if federated else None,
            ),
            "federated_devices": ("Devices in the federated metric.", federated.devices if federated else 0),
            "federated_examples": (
                "Examples in the federated metric.",
                federated.examples if federated else 0,
            ),
        }
        for name, (text, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(f"fedtide_{name}", text, value)
        if status.evaluations:
            newest = status.evaluations[-1]
            if newest.loss is not None:
                yield GaugeMetricFamily("fedtide_evaluation_loss", "Held-out loss.", newest.loss)
            if newest.metric is not None:
                yield GaugeMetricFamily("fedtide_evaluation_metric", "Held-out metric.", newest.metric)


def serve_metrics(settings: Metrics, status: Callable[[], Status]) -> Callable[[], None]:
    """Serve ``/metrics`` from a thread; the result stops it.

    Raises:
        OSError: the port is taken.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(status))
    server, thread = start_http_server(settings.port, settings.host, registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
