"""Two processes of one on-policy run: the same samples as one process draws."""

import json

import numpy as np
import pytest
from test_processes import file, finish, start, start_two  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

FLAGS = (
    "--on-policy.fraction", "0.5", "--on-policy.max-new-tokens", "8", "--on-policy.every-steps",
    "2", "--on-policy.log-samples", "1", "--steps", "5", "--checkpoint.every-steps", "3",
)  # fmt: skip


def read(workdir, name):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_two_processes_draw_and_train_on_the_samples_of_one(file, tmp_path):  # noqa: F811
    (status,), output = finish([start(file, tmp_path / "alone", *FLAGS, num_devices=8)])
    assert status == 0, output
    statuses, outputs = finish(start_two(file, tmp_path / "pair", *FLAGS))
    assert statuses == [0, 0], "".join(outputs)
    ours, theirs = (read(tmp_path / x, "samples.jsonl") for x in ("pair", "alone"))
    assert [x["answer"] for x in ours] == [x["answer"] for x in theirs] and len(ours) > 3
    gaps = [abs(x["log_prob"] - y["log_prob"]) for x, y in zip(ours, theirs, strict=True)]
    assert max(gaps) < 1e-4
    ours, theirs = (read(tmp_path / x, "metrics.jsonl") for x in ("pair", "alone"))
    np.testing.assert_allclose(*([x["loss"] for x in y] for y in (ours, theirs)), rtol=1e-4)
