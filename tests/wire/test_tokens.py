"""The family of tables."""

import hashlib
from itertools import product

import numpy as np
import pytest

from fedtide.wire.codecs.entropy.tokens import (
    EXCESSES,
    GAPS,
    INDICES,
    LARGEST_SHIFT,
    SPREADS,
    Family,
    Measured,
    NumberKind,
    TableChoice,
    choice_for,
    is_dense,
    token_table,
)

both_kinds = pytest.mark.parametrize("kind", [GAPS, EXCESSES], ids=["gaps", "excesses"])


@both_kinds
def test_means_ascend_and_each_finds_its_own_index(kind: NumberKind) -> None:
    means = [kind.mean_of(index) / 2**16 for index in range(INDICES)]
    assert means == sorted(set(means))
    assert [kind.index_of(mean) for mean in means] == list(range(INDICES))


def test_means_are_those_of_the_docstring() -> None:
    assert GAPS.mean_of(0) == 2**16 / 64
    assert GAPS.mean_of(4) == 2**16 / 4
    assert GAPS.mean_of(6) == 2**16 / 2
    assert GAPS.mean_of(31) / 2**16 == pytest.approx(2 ** (-2 + 27 / 2), rel=1e-4)  # 2896
    assert EXCESSES.mean_of(0) == 2**16 / 16
    assert EXCESSES.mean_of(12) == 2**16 * 4
    assert EXCESSES.mean_of(31) == 2**16 * 2**21


@both_kinds
@pytest.mark.parametrize("mean", [0.0, 1e-9, 1e12])
def test_means_beyond_the_family_find_its_ends(kind: NumberKind, mean: float) -> None:
    assert kind.index_of(mean) == (0 if mean < 1 else INDICES - 1)


@both_kinds
@pytest.mark.parametrize("dense", [False, True])
def test_buckets_hold_all_numbers_without_a_hole_and_end_below_2_to_the_31(
    kind: NumberKind, *, dense: bool
) -> None:
    for shift in (0, 1, 7, LARGEST_SHIFT):
        buckets = kind.buckets(Measured(shift, ()), dense=dense)
        firsts = buckets.first_numbers.astype(np.int64)
        ends = firsts + (1 << buckets.widths)
        assert firsts[0] == 0
        assert np.array_equal(ends[:-1], firsts[1:])
        assert 2**30 <= ends[-1] < 2**31
        numbers = np.concatenate([firsts, ends[:-1] - 1, [2**30 - 1]]).astype(np.int32)
        found = buckets.of(numbers)
        assert (numbers >= firsts[found]).all()
        assert (numbers < ends[found]).all()


def test_a_geometric_marginal_has_the_shares_of_its_formula() -> None:
    # Mean 1: r = 1/2. P(0) = 1/2, P(1) = 1/4, P(2) = 1/8, P(3) = 1/16, P(4..7) = 1/16 - 1/256,
    # P(8..15) = 1/256 - 1/65536, above that 1/65536; out of 2^16.
    index = GAPS.index_of(1)
    shares = GAPS.weights(Family(index, 0), dense=True)
    assert shares.tolist() == [32768, 16384, 8192, 4096, 3840, 255, 1]


def test_a_wider_marginal_keeps_its_mean_and_has_more_of_the_largest() -> None:
    for spread in range(1, SPREADS):
        narrow = GAPS.weights(Family(20, spread - 1), dense=False)
        wide = GAPS.weights(Family(20, spread), dense=False)
        assert wide[0] > narrow[0]
        assert wide[8] > narrow[8]  # from 16 units on, 4 to 8 times the mean
        assert abs(int(wide.sum()) - int(narrow.sum())) < 32  # both 2^16, but for rounding


@both_kinds
def test_a_measured_marginal_has_the_shares_of_its_lengths(kind: NumberKind) -> None:
    # Lengths are quarters of a bit: 0 -> 2^16, 4 -> 2^15, 2 -> 2^15.5 = 46341, 62 -> 2^0.5 = 1.4 -> 1,
    # and 63 says that the bucket does not occur.
    assert kind.weights(Measured(0, (0, 4, 2, 62, 63)), dense=True).tolist() == [65536, 32768, 46341, 1, 0]


def test_every_table_of_the_family_can_code_every_symbol() -> None:
    for gap, excess in product(range(0, INDICES, 5), range(0, INDICES, 3)):
        for spread, dense in product(range(SPREADS), (False, True)):
            table = token_table(TableChoice(Family(gap, spread), Family(excess, spread), dense))
            assert table.frequencies.frequencies.min() >= 1
            assert table.frequencies.frequencies.sum() == 8192
            assert table.frequencies.frequencies.size == table.gaps.widths.size * table.excesses.widths.size


def test_the_family_never_changes() -> None:
    """Both sides build the tables: a change of any is a change of the format."""
    digest = hashlib.sha256()
    for gap, excess, spread in product(range(INDICES), range(0, INDICES, 7), range(SPREADS)):
        choice = TableChoice(Family(gap, spread), Family(excess, SPREADS - 1 - spread), gap % 3 == 0)
        digest.update(token_table(choice).frequencies.frequencies.astype("<i8").tobytes())
    assert digest.hexdigest() == "be885b9d6a6d7ba4d85dd3249ca5e1d9dd1fcdb14fad9159e3e9d888e14489ef"


def test_a_choice_by_means_is_the_nearest_of_the_family() -> None:
    # 3 % nonzeros: a mean gap of 32.3, next to 2^5 = 32, which is index 4 + 2 * (5 + 2) = 18. A mean
    # magnitude of 1.5: an excess of 0.5 = 2^-1, index 2 * (-1 + 4) = 6.
    choice = choice_for(0.97 / 0.03, 0.5)
    assert choice == TableChoice(Family(18, 1), Family(6, 1), dense=False)
    assert not is_dense(1)
    assert is_dense(0.4)


def test_tables_of_the_family_are_built_once() -> None:
    assert token_table(choice_for(7, 1)) is token_table(choice_for(7, 1))
