"""A damaged or odd input file is read right, or refused in one message: 1,000 seeded mutants."""

import resource

import pytest
from mutants import KINDS, campaign

COUNTS = {
    "safetensors": 200, "index": 120, "config": 260, "tokenizer": 120, "adapter": 160,
    "records": 140,
}  # fmt: skip
SLACK_BYTES = 100 * 2**20  # of the libraries, loaded lazily


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_thousand_mutants_are_of_every_kind():
    assert COUNTS.keys() == KINDS.keys() and sum(COUNTS.values()) == 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutant_is_right_or_one_message(kind, tmp_path, tokenizer):
    before = peak_bytes()
    bad, refused = campaign(tmp_path / "base", kind, seed=0, count=COUNTS[kind])
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert not bad, "\n".join(bad)
    assert 0.2 * COUNTS[kind] < refused < COUNTS[kind]
    assert peak_bytes() - before < 3 * size + SLACK_BYTES
