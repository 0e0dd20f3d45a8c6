import pytest
from small_fleet import Bench


@pytest.fixture
def open_bench(tmp_path):
    """Opens benches on one directory; closing one and opening the next is a restart of the coordinator."""
    opened = []

    def open_one(settings=None, name="state"):
        opened.append(Bench(tmp_path / name, settings))
        return opened[-1]

    yield open_one
    for bench in opened:
        bench.close()


@pytest.fixture
def bench(open_bench):
    return open_bench()
