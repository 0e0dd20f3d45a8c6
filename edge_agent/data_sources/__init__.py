"""Data sources: where a device's examples come from. One module a kind, chosen by ``kind`` in agent.toml.

Adding one means a module with its class and a place in ``DataSource``; agent.toml and the tests pick it up.
"""

from typing import TypeAlias

from edge_agent.data_sources.base import DataError, Reader
from edge_agent.data_sources.custom import Custom, Examples, ExampleSource
from edge_agent.data_sources.npz import Npz
from edge_agent.data_sources.sensor import Sensor
from edge_agent.data_sources.table import Csv
from edge_agent.data_sources.window_folder import Windows

__all__ = [
    "Csv",
    "Custom",
    "DataError",
    "DataSource",
    "ExampleSource",
    "Examples",
    "Npz",
    "Reader",
    "Sensor",
    "Windows",
]

DataSource: TypeAlias = Npz | Csv | Windows | Sensor | Custom
"""Every data source: the one table of choices. Decode settings into this type."""
