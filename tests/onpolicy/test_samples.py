"""Laws of sampled rows: which rows they are, what is in them, what is said of them."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from kd_jax.config import OnPolicyConfig
from kd_jax.losses import schedules
from kd_jax.losses.head_inputs import FIRST_OF_BIN
from kd_jax.onpolicy.samples import (
    Sample,
    describe,
    fill_rows,
    mix,
    num_sampled_rows,
    repetition,
    samples_in,
    spread,
)
from kd_jax.onpolicy.source import OnPolicySource
from kd_jax.setup.forward import targets

STOP = 9


def sample(prompt, answer):
    return Sample(
        np.array(prompt, np.int32), np.array(answer, np.int32), -np.arange(len(answer), dtype="f4")
    )


ROWS = [
    [sample([1, 2, 3], [4, 5, STOP]), sample([6, 7], [STOP])],
    [],
    [sample([1, 2], [5, 5, 5, 5, 5, 5])],
]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_share_of_samples_follows_the_shapes_of_the_loss_schedules(shape):
    config = OnPolicyConfig(fraction=0.75, fraction_end=0.25, schedule=shape, schedule_steps=5)
    ours = [num_sampled_rows(config, step, 99, 1000) for step in range(7)]
    theirs = [float(schedules.interpolate(0.75, 0.25, shape, i, 5)) * 1000 for i in range(7)]
    assert ours == pytest.approx(theirs, abs=0.51) and ours[0] == 750 and ours[6] == 250
    assert num_sampled_rows(OnPolicyConfig(fraction=0.5), 3, 9, 5) == 3


def test_samples_are_spread_over_the_rows_as_evenly_as_possible():
    for size in (1, 5, 8, 12):
        for count in range(size + 1):
            places = spread(count, size)
            assert len(places) == count and set(places) <= set(range(size))
            gaps = {b - a for a, b in pairwise([*places, *(places[:1] + size)])}
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_rows_hold_the_samples_that_they_are_filled_with():
    columns = fill_rows(ROWS, 12, pad=8)
    assert columns["tokens"][0].tolist() == [1, 2, 3, 4, 5, STOP, 6, 7, STOP, 8, 8, 8]
    assert columns["segment_ids"][0].tolist() == [1] * 6 + [2] * 3 + [0] * 3
    assert columns["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0, 0]
    assert (columns["segment_ids"][1] == 0).all() and not columns["loss_mask"][1].any()
    found = list(samples_in(columns))
    for ours, theirs in zip(found, [*ROWS[0], *ROWS[2]], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_a_sampled_token_is_a_target_and_its_group_tells_how_far_in_the_answer_it_is():
    columns = fill_rows([[sample(range(3), range(70))]], 80, pad=0)
    batch = {name: x[None] for name, x in columns.items()}
    labels, mask, group = map(np.asarray, targets(batch))
    assert np.flatnonzero(mask[0, 0]).tolist() == list(range(2, 72))
    assert labels[0, 0, 2:72].tolist() == list(range(70))
    want = [1 + max(i for i, x in enumerate(FIRST_OF_BIN) if x <= place) for place in range(70)]
    assert group[0, 0, 2:72].tolist() == want


def test_what_is_said_of_samples_is_counted_by_hand():
    found = describe(fill_rows(ROWS, 12, pad=8), {STOP})
    assert found["samples/count"] == 3 and found["samples/length"] == pytest.approx(10 / 3)
    assert found["samples/ended"] == pytest.approx(2 / 3)
    assert found["samples/empty"] == pytest.approx(1 / 3)
    assert found["samples/repetition"] == pytest.approx((2 / 3) / 3)
    assert found["samples/drawn_log_prob"] == pytest.approx(-(3 + 0 + 15) / 10)
    absent = {name for name, value in found.items() if value is None}
    assert absent == {
        f"samples/kl_{way}_from_{x}" for way in ("forward", "reverse") for x in FIRST_OF_BIN[2:]
    }
    none = describe(fill_rows([[]], 12, pad=8), {STOP})
    # The step's sums are 0 without samples, which would read as a student that has collapsed.
    assert none["samples/count"] == 0 and none["samples/entropy"] is None


def test_repetition_is_the_share_of_4_grams_seen_before():
    assert repetition(np.arange(9)) == repetition(np.array([1, 1, 1])) == 0
    assert repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == pytest.approx(1 / 5)


def test_a_batch_has_samples_in_some_rows_and_the_data_in_the_others():
    shape = (2, 3, 12)
    data = {
        "tokens": np.full(shape, 77, np.int32), "segment_ids": np.ones(shape, np.int32),
        "positions": np.zeros(shape, np.int32), "loss_mask": np.zeros(shape, bool),
    }  # fmt: skip
    samples = fill_rows(ROWS, 12, pad=8)
    mixed = mix(data, samples)
    assert mixed.keys() == {*data, "group"} and (data["tokens"] == 77).all()
    flat = {name: x.reshape(6, 12) for name, x in mixed.items()}
    drawn = spread(3, 6)
    others = np.setdiff1d(np.arange(6), drawn)
    assert (flat["tokens"][others] == 77).all() and (flat["group"][others] == 0).all()
    for name in mixed:
        assert np.array_equal(flat[name][drawn], samples[name])


def test_a_run_that_stops_where_it_resumed_has_no_samples_to_save():
    """It resumed between drawings, the last of which had no rows."""
    config = tiny.plain_config(on_policy=OnPolicyConfig(fraction=0.5, every_steps=3))
    source = SimpleNamespace(config=config, columns={})
    assert OnPolicySource.resume_arrays(source, 4) == {}
