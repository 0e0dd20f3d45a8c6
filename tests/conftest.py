"""Brokers for every test that needs one, the hypothesis profile, and the way to the rig."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import hypothesis
import pytest

from broker_config.local import BrokerKind, LocalBroker, available_brokers, start_local_broker

# The rig that breaks things serves tests of every package.
sys.path.append(str(Path(__file__).parent / "rig"))

_INSTALL = {"mosquitto": "apt-get install mosquitto", "nats": "pip install 'fedtide[broker]'"}

# How long an example takes says something about the machine, not about the property.
hypothesis.settings.register_profile("fedtide", deadline=None)
hypothesis.settings.load_profile("fedtide")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs mosquitto where it is not installed, and say how to install it."""
    if "mosquitto" in available_brokers():
        return
    for item in items:
        if item.get_closest_marker("mosquitto"):
            item.add_marker(pytest.mark.skip(reason=f"mosquitto is not installed: {_INSTALL['mosquitto']}"))


def _started(kind: BrokerKind, directory: Path) -> Iterator[LocalBroker]:
    if kind not in available_brokers():
        pytest.skip(f"{kind} is not installed: {_INSTALL[kind]}")
    with start_local_broker(directory, kind) as broker:
        yield broker


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    """The preferred broker of those installed here: mosquitto, else NATS."""
    yield from _started(next(iter(available_brokers()), "nats"), tmp_path_factory.mktemp("broker"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=[pytest.mark.mosquitto] if kind == "mosquitto" else [])
        for kind in get_args(BrokerKind)
    ],
)
def brokers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalBroker]:
    """Each broker that can be installed, one after the other."""
    yield from _started(request.param, tmp_path_factory.mktemp(request.param))
