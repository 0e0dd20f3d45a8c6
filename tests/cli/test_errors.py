"""What ends a command: one sentence where a person can act on it, a traceback otherwise."""

import errno

import pytest

from edge_agent.troubles import of_the_disk
from fedtide.cli.errors import explained


def raising(error: Exception) -> None:
    def command() -> None:
        raise error

    explained(command)()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system", "/state/outbox"),
        ExceptionGroup("tasks", [OSError(errno.EROFS, "Read-only file system", "/state/outbox")]),
        ExceptionGroup(
            "tasks", [of_the_disk(OSError(errno.EROFS, "Read-only file system", "/state/outbox"))]
        ),
    ],
    ids=["at the start", "in a task", "in the agent's work"],
)
def test_a_failed_disk_is_one_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raising(error)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: [Errno 30] Read-only file system: '/state/outbox'")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("a mistake of our own"),
        ExceptionGroup("tasks", [OSError(errno.EIO, "Input/output error"), ZeroDivisionError("ours")]),
    ],
    ids=["alone", "beside another"],
)
def test_a_mistake_of_our_own_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        raising(error)
