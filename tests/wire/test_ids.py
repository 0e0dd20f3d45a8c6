import hashlib

import pytest

from fedtide.wire.errors import MalformedId
from fedtide.wire.ids import blob_id, device_id, fleet_id, plan_id


@pytest.mark.parametrize("text", ["a", "7", "_", "-", "pump-7", "a" * 64, "north_hall-2"])
def test_ids_of_one_to_64_safe_characters_pass_unchanged(text: str) -> None:
    assert device_id(text) == text
    assert fleet_id(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "a" * 65, "Pump", "pump 7", "pump/7", "pump+", "#", "pump.7", "..", "pömp", "pump\n", "٣", "\0"],
)
def test_ids_that_a_topic_or_a_file_name_cannot_carry_are_refused(text: str) -> None:
    with pytest.raises(MalformedId, match=r"1 to 64 of lower-case letters, digits, '_' and '-'"):
        device_id(text)


def test_the_error_names_the_kind_and_shortens_what_it_quotes() -> None:
    with pytest.raises(MalformedId) as refused:
        fleet_id("X" * 10_000)
    assert str(refused.value).startswith("fleet id 'XXX")
    assert len(str(refused.value)) < 200


def test_plans_and_blobs_are_named_by_the_first_half_of_their_hash() -> None:
    digest = hashlib.sha256(b"").digest()
    assert plan_id(digest) == "e3b0c44298fc1c149afbf4c8996fb924"
    assert blob_id(digest) == "e3b0c44298fc1c149afbf4c8996fb924"
