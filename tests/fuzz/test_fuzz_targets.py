"""The fuzzer's targets run without the fuzzer too: on their first corpus, so that they cannot rot."""

import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

ROOT = Path(__file__).parent.parent.parent
SUBJECTS = fuzz.load_subjects()


@pytest.mark.parametrize("target", SUBJECTS.NAMES)
def test_a_target_takes_its_first_corpus(target: str, tmp_path: Path) -> None:
    subject = SUBJECTS.subject_of(target)
    assert subject.name == target
    fuzz.write_corpus(subject, tmp_path / "corpus")
    files = list((tmp_path / "corpus").iterdir())
    accepted = sum(subject.take(file.read_bytes()) for file in files)
    assert len(files) > fuzz.FIRST_MUTATIONS / 2
    assert accepted >= len(set(subject.seeds))
    assert accepted < len(files)


def test_there_is_a_target_for_every_reader_of_a_strangers_bytes() -> None:
    codecs = {f"{codec}-{kind}" for codec in SUBJECTS.CODECS for kind in ("small", "golden")}
    assert set(SUBJECTS.NAMES) >= codecs | {"envelope", "chunk", "head", "sealed-head", "delta-index"}


def test_an_unknown_target_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(ValueError, match="no target 'zip'; there are: float32-small"):
        SUBJECTS.subject_of("zip")


def test_without_the_fuzzer_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['atheris'] = None; import fuzz; sys.argv = ['fuzz', 'head']; fuzz.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(fuzz.__file__).parent,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "pip install 'fedtide[fuzz]'" in done.stderr
