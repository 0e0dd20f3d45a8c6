"""Asynchronous federated learning over MQTT for fleets of small devices."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedtide")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0"
