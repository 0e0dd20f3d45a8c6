"""``python -m fedtide`` is the ``fedtide`` command."""

from fedtide.cli import main

main()
