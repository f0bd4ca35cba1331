"""DistillKit's compressed data sets, written here by the description of their form."""

import numpy as np
import pytest
import yaml

from kd_jax.teachers.distillkit import CONFIG, Packed, read_compression, read_log_probs, unpack

K = 8
FORM = {"d": 320, "k": K, "exact_k": 3, "residual_bins": [], "delta_encoding": False}
BIN = {"scale_dtype": "float32", "element_bits": 13, "num_elements": 5}
FORMS = {
    "whole": FORM | {"exact_k": K, "exact_dtype": "float16"},
    "curve": FORM | {"polynomial_terms": [0, 1, "sqrt"]},
    "unit": FORM | {"polynomial_terms": [0, 2, "exp"], "normalize_t": True},
    "bins": FORM | {"residual_bins": [BIN | {"num_elements": 2}, BIN | {"num_elements": 3}]},
    "differences": FORM | {"polynomial_terms": [0], "residual_bins": [BIN], "delta_encoding": True},
}


def packed(numbers, bits):
    """Returns the bytes of numbers, each from its highest bit on."""
    text = "".join(f"{number:0{bits}b}" for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def compress(log_probs, form):
    """Returns a token's bytes, and the float64 log-probabilities that they mean."""
    x = np.array(log_probs, np.float64)
    x = np.diff(x, prepend=0) if form["delta_encoding"] else x
    dtype = np.dtype(form.get("exact_dtype", "float32")).newbyteorder("<")
    head = x[: form["exact_k"]].astype(dtype)
    left, data, terms = x[form["exact_k"] :], [*head.tobytes()], form.get("polynomial_terms", [])
    means = np.zeros(len(left))
    if terms:
        t = np.arange(len(left)) / (len(left) - 1 if form.get("normalize_t") else 1)
        basis = [
            {"sqrt": t**0.5, "exp": np.exp(t)}[n] if isinstance(n, str) else t**n for n in terms
        ]
        weights = np.linalg.lstsq(np.transpose(basis), left, rcond=None)[0].astype("<f4")
        data, means = [*data, *weights.tobytes()], weights.astype(float) @ basis
    first = 0
    for one in form["residual_bins"]:
        some = slice(first, first + one["num_elements"])
        half = 2 ** (one["element_bits"] - 1)
        apart = left[some] - means[some]
        scale = np.float32(np.abs(apart).max() / half or 1)
        levels = np.clip(np.round(apart / scale), -half, half - 1).astype(int)
        data += [*scale.tobytes(), *packed(levels + half, one["element_bits"])]
        means[some] += levels * float(scale)
        first = some.stop
    meant = np.concatenate([head.astype(np.float64), means])
    return data, np.cumsum(meant) if form["delta_encoding"] else meant


@pytest.mark.parametrize("name", FORMS)
def test_bytes_mean_the_log_probabilities_that_were_stored(tmp_path, name):
    """Twin: as differences where they are none, or the reverse, they mean others."""
    (tmp_path / CONFIG).write_text(yaml.safe_dump(FORMS[name]))
    rng, form = np.random.default_rng(0), read_compression(tmp_path)
    logs = -np.sort(rng.exponential(3, (20, K)), axis=1)
    data, want = map(np.array, zip(*(compress(x, FORMS[name]) for x in logs), strict=True))
    got = read_log_probs(data.astype(np.uint8), form)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=3e-6)  # of sums in float32
    other = read_compression_with(tmp_path, FORMS[name], not form.delta_encoding)
    assert np.abs(read_log_probs(data.astype(np.uint8), other) - want).max() > 0.1


@pytest.mark.parametrize("name", FORMS)
def test_positions_that_are_read_together_have_the_entries_of_each_alone(tmp_path, name):
    (tmp_path / CONFIG).write_text(yaml.safe_dump(FORMS[name]))
    rng, form = np.random.default_rng(0), read_compression(tmp_path)
    logs = -np.sort(rng.exponential(3, (9, K)), axis=1)
    if name == "whole":
        logs[2, 5:] = logs[6, 1:] = -np.inf  # ranks that were left out
    values = np.array([compress(x, FORMS[name])[0] for x in logs], np.uint8)
    ids = np.array([packed(x, 9) for x in rng.integers(0, 320, (9, K)).tolist()], np.uint8)
    entries = Packed(values, ids, form)
    alone = [next(x for x in entries.read(np.array([i])) if len(x.rows)) for i in entries.positions]
    seen = []
    for rows, some, log_probs in entries.read(entries.positions):
        for row, *found in zip(rows.tolist(), some, log_probs, strict=True):
            seen.append((row, len(found[0])))
            np.testing.assert_array_equal(found, [alone[row].ids[0], alone[row].log_probs[0]])
    short = {2: 5, 6: 1} if name == "whole" else {}
    assert sorted(seen) == [(row, short.get(row, K)) for row in range(9)]


def read_compression_with(folder, form, delta):
    (folder / CONFIG).write_text(yaml.safe_dump(form | {"delta_encoding": delta}))
    return read_compression(folder)


@pytest.mark.parametrize("bits", [1, 9, 17, 33])
def test_packed_numbers_are_read_from_their_highest_bit(bits):
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (3, 7))
    data = np.array([packed(x, bits) for x in numbers.tolist()], np.uint8)
    assert np.array_equal(unpack(data, bits, 7), numbers)
