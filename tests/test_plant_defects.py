"""The defects can still be planted, and what is planted is noticed: so the tests guard the promises."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import plant_defects
import pytest
from defects import DEFECTS, Defect
from plant_defects import CannotPlant, Outcome, planted, try_out

ROOT = Path(__file__).parents[1]
ADDS = "def add(one, other):\n    return one + other\n"
NOTICES = "from adding import add\n\n\ndef test_adding():\n    assert add({one}, 2) == {sum}\n"


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_each_defect_can_be_planted_and_its_tests_are_there(defect):
    assert planted(defect, (ROOT / defect.file).read_text()) != (ROOT / defect.file).read_text()
    for test in defect.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()


def test_no_two_defects_have_one_name():
    assert set(Counter(defect.name for defect in DEFECTS).values()) == {1}


def subtracts(text="one + other", replacement="one - other"):
    return Defect("subtracts", "it subtracts", "adding.py", text, replacement, ("test_adding.py",))


@pytest.mark.parametrize("text", ["one * other", "o"])
def test_a_text_that_does_not_stand_there_exactly_once_is_not_planted(text):
    with pytest.raises(CannotPlant, match="must stand there once"):
        planted(subtracts(text), ADDS)


def test_what_is_no_python_is_not_planted():
    with pytest.raises(CannotPlant, match="subtracts: invalid syntax"):
        planted(subtracts(replacement="one +"), ADDS)


@pytest.mark.parametrize(
    ("test", "outcome"),
    [
        (NOTICES.format(one=1, sum=3), Outcome.CAUGHT),
        ("def test_nothing():\n    pass\n", Outcome.SURVIVED),
        ("import nowhere\n", Outcome.UNDECIDED),
        ("", Outcome.UNDECIDED),
    ],
    ids=["noticed", "not-noticed", "not-collected", "no-test"],
)
def test_a_defect_is_caught_only_by_a_test_that_ran_and_failed(tmp_path, test, outcome):
    (tmp_path / "adding.py").write_text(ADDS)
    (tmp_path / "test_adding.py").write_text(test)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['long: long']\n")
    assert try_out(subtracts(), tmp_path).outcome is outcome
    assert (tmp_path / "adding.py").read_text() == ADDS


def test_an_unknown_name_is_told_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        plant_defects.main(["--only", "nonsense"])
    assert "head-before-chunks" in capsys.readouterr().err


@pytest.mark.long
def test_every_planted_defect_is_caught():
    ran = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "rig" / "plant_defects.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
