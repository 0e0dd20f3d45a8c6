"""Admission: each reason once, and the values just inside and just outside each limit."""

import msgspec
import pytest
from small_fleet import FLEET, PLAN, make_header, make_settings

from coordinator.admission import Admitted, Rejection, Terms, admit
from coordinator.aggregation import FedAvg
from coordinator.settings import Update
from coordinator.staleness import Constant, Cutoff, Polynomial
from fedtide.wire.envelope import MaskScheme, UpdateId
from fedtide.wire.messages import Reason

BASE = bytes(range(32))
OTHER = bytes(32)


def terms(version=5, **changes):
    """Versions 3, 4 and 5 are published; 5 is the newest."""
    values = {
        "fleet": FLEET,
        "plan": PLAN.plan.id,
        "version": version,
        "published": {3: BASE, 4: BASE, 5: BASE},
        "stopped": False,
    }
    return Terms(**{**values, **changes})


def header(base_version=5, **changes):
    return make_header(base_version=base_version, base_sha256=changes.pop("base_sha256", BASE), **changes)


def test_a_fresh_update_is_admitted_with_weight_one():
    assert admit(header(), terms(), make_settings()) == Admitted(0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("changed", "reason", "detail"),
    [
        (header(fleet="valves"), Reason.WRONG_FLEET, "'valves'; this is 'pumps'"),
        (header(plan="0" * 32), Reason.UNKNOWN_PLAN, f"plan in force is {PLAN.plan.id!r}"),
        (header(mask=MaskScheme(id="pairs", sealed_seed=b"")), Reason.UNSUPPORTED_FIELD, "masked"),
        (header(inner=(UpdateId(device="pump-9", counter=1),)), Reason.UNSUPPORTED_FIELD, "summed"),
        (header(codec="zip"), Reason.UNKNOWN_CODEC, "'zip'; this coordinator has float32, float16, q8"),
        (header(num_examples=0), Reason.MALFORMED, "0 examples; at least 1"),
        (header(base_version=6), Reason.FUTURE_VERSION, "version 6; the newest is 5"),
        (header(base_version=2**63 - 1), Reason.FUTURE_VERSION, "the newest is 5"),
        (header(base_version=2), Reason.UNKNOWN_BASE, "version 2, which was not published"),
        (header(base_sha256=OTHER), Reason.UNKNOWN_BASE, "other parameters than the published version 5"),
        (header(base_sha256=b""), Reason.UNKNOWN_BASE, "other parameters"),
    ],
    ids=lambda value: value.value if isinstance(value, Reason) else None,
)
def test_an_update_that_does_not_fit_is_rejected_with_its_reason(changed, reason, detail):
    rejection = admit(changed, terms(), make_settings())
    assert isinstance(rejection, Rejection)
    assert rejection.reason is reason
    assert detail in rejection.detail


def test_nothing_is_admitted_once_the_run_has_stopped():
    rejection = admit(header(), terms(stopped=True), make_settings())
    assert rejection.reason is Reason.STOPPED


def test_an_update_of_another_fleet_hears_that_even_after_the_stop():
    rejection = admit(header(fleet="valves"), terms(stopped=True), make_settings())
    assert rejection.reason is Reason.WRONG_FLEET


def test_the_last_staleness_within_the_cutoff_is_admitted_and_the_next_is_not():
    settings = make_settings(staleness=Cutoff(at=1))
    assert admit(header(base_version=4), terms(), settings) == Admitted(1, 1.0, 1.0)
    rejection = admit(header(base_version=3), terms(), settings)
    assert rejection.reason is Reason.TOO_STALE
    assert "2 versions old" in rejection.detail


def test_the_last_staleness_within_the_policys_maximum_is_admitted_and_the_next_is_not():
    settings = make_settings(staleness=Constant(max_staleness=1))
    assert admit(header(base_version=4), terms(), settings) == Admitted(1, 1.0, 1.0)
    assert admit(header(base_version=3), terms(), settings).reason is Reason.TOO_STALE


def test_fedavg_admits_only_fresh_updates_whatever_the_policy_says():
    settings = make_settings(aggregator=FedAvg(cohort=2), staleness=Constant())
    assert admit(header(base_version=5), terms(), settings) == Admitted(0, 1.0, 1.0)
    assert admit(header(base_version=4), terms(), settings).reason is Reason.TOO_STALE


def test_a_stale_update_counts_as_its_policy_says():
    settings = make_settings(staleness=Polynomial(exponent=1.0))
    # staleness 5 - 3 = 2, so 1 / (1 + 2)
    assert admit(header(base_version=3), terms(), settings) == Admitted(2, 1 / 3, 1.0)


@pytest.mark.parametrize(
    ("num_examples", "importance"), [(1, 1.0), (99, 99.0), (100, 100.0), (101, 100.0), (2**63 - 1, 100.0)]
)
def test_examples_count_up_to_the_most_that_is_believed(num_examples, importance):
    settings = make_settings(update=Update(weight_by_examples=True, max_examples=100))
    admitted = admit(header(num_examples=num_examples), terms(), settings)
    assert admitted.importance == importance


def test_without_weighting_by_examples_every_update_has_importance_one():
    assert admit(header(num_examples=1000), terms(), make_settings()).importance == 1.0


@pytest.mark.parametrize("field", ["fleet", "plan", "codec"])
def test_details_quote_only_the_beginning_of_what_a_stranger_wrote(field):
    rejection = admit(header(**{field: "x" * 5000}), terms(), make_settings())
    assert len(msgspec.json.encode(rejection.detail)) < 300
