"""Batches onto devices."""

import pytest

from kd_jax.parallel.placement import one_late


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_item_is_read_once_the_next_one_is_made(count):
    made = []
    items = (made.append(i) or i for i in range(count))
    found = [(item, made[-1]) for item in one_late(items)]
    assert found == [(i, min(i + 1, count - 1)) for i in range(count)]
