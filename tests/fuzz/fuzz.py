"""Coverage-guided fuzzing of everything that reads a stranger's bytes, with atheris (libFuzzer).

    make fuzz TARGET=lowrank-small SECONDS=300
    python tests/fuzz/fuzz.py --list

The targets are the subjects of ``tests/wire/hostile_subjects.py``. A target's corpus begins with its valid
bytes and some mutations of them, and is kept below ``--corpus`` from run to run. What a target does not
expect ends the run; the input is then in a file ``TARGET-crash-…`` beside the corpus.
"""

import argparse
import hashlib
import importlib
import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

WIRE_TESTS: Final = Path(__file__).parent.parent / "wire"
"""Where the subjects are; tests are not packages."""

NOT_HERE: Final = """\
atheris is not installed: pip install 'fedtide[fuzz]'
It has wheels for Linux on x86-64 only; elsewhere it has to be built, with clang: https://github.com/google/atheris
The mutation tests of `make test-long` run everywhere."""
FIRST_MUTATIONS: Final = 200
"""In the first corpus, beside the valid bytes: forged ones that no flipping of bits would find soon."""
LIBFUZZERS_SHARE: Final = 0.7
SLOWEST_S: Final = 5
MOST_MEMORY_MB: Final = 2048


def load_subjects() -> ModuleType:
    """The module of the subjects; what it imports is instrumented if the importer says so."""
    if str(WIRE_TESTS) not in sys.path:
        sys.path.insert(0, str(WIRE_TESTS))
    return importlib.import_module("hostile_subjects")


def first_corpus(subject: Any) -> list[bytes]:
    """The valid bytes of a subject, and mutations of them."""
    draw = random.Random(1)
    return [*subject.seeds, *(subject.hostile(draw) for _ in range(FIRST_MUTATIONS))]


def write_corpus(subject: Any, directory: Path) -> None:
    """Write the first corpus, one file each."""
    directory.mkdir(parents=True, exist_ok=True)
    for content in first_corpus(subject):
        (directory / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)


def fuzz(target: str, corpus: Path, seconds: int) -> None:
    """Run libFuzzer on a target; it ends the process."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["fedtide"]):
        subjects = load_subjects()
    subject = subjects.subject_of(target)
    found = corpus / target
    write_corpus(subject, found)

    def one_input(content: bytes) -> None:
        subject.take(content)

    def mutate(content: bytes, most_bytes: int, seed: int) -> bytes:
        """LibFuzzer's own mutations, or ours: its know nothing of fields behind a hash."""
        draw = random.Random(seed)
        if draw.random() < LIBFUZZERS_SHARE:
            mutated: bytes = atheris.Mutate(content, most_bytes)
            return mutated
        return subject.hostile(draw, content)[:most_bytes]

    arguments = [
        sys.argv[0],
        str(found),
        f"-max_total_time={seconds}",
        f"-artifact_prefix={corpus}/{target}-",
        f"-timeout={SLOWEST_S}",
        f"-rss_limit_mb={MOST_MEMORY_MB}",
        "-print_final_stats=1",
    ]
    atheris.Setup(arguments, one_input, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", help="which reader of bytes; without it, they are listed")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="directory")
    options = parser.parse_args()
    if options.list or not options.target:
        print("\n".join(load_subjects().NAMES))
    elif importlib.util.find_spec("atheris") is None:
        sys.exit(NOT_HERE)
    else:
        fuzz(options.target, options.corpus, options.seconds)


if __name__ == "__main__":
    main()
