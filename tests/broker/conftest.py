import pytest

from broker_config.local import free_port


@pytest.fixture
def free_tcp_port():
    return free_port()
