"""Teachers that are only a file: what other systems write, and what is wrong with it."""

import gzip
import json
import os

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from test_cache import make_config, open_rows, places, with_teacher  # noqa: F401
from test_distillkit import FORM, FORMS, K, compress, packed
from tiny_run import Run

from kd_jax.config import UserError
from kd_jax.inference.cache_import import import_cache, write_documents
from kd_jax.inference.cached import Storage, make_cache
from kd_jax.teachers.distillkit import CONFIG
from kd_jax.teachers.topk import topk_fields


@pytest.fixture(scope="module")
def run(make_config):  # noqa: F811
    return Run(make_config(mesh={"data": 1}), jax.devices()[:1])


@pytest.fixture(scope="module")
def read(run):
    """Returns the values of all rows from a cache, by field."""

    def read(folder):
        cached = open_rows(with_teacher(run.config, cache=str(folder)), run)
        everything = np.arange(len(run.rows))
        return cached.train(everything, np.ones(len(everything), bool))

    return read


@pytest.fixture(scope="module")
def records(run, read, tmp_path_factory):
    """(tokens, {position: {id: log-probability}}) of each document, from a cache. Read only."""
    folder = tmp_path_factory.mktemp("records") / "cache"
    make_cache(run.config, str(folder), Storage("topk", k=K), devices=jax.devices()[:1])
    values, found = read(folder), []
    for row, segments in enumerate(run.rows.segment_ids):
        for number in range(1, segments.max() + 1):
            own = np.flatnonzero(segments == number)
            targets = [i for i in range(1, len(own)) if run.rows.loss_mask[row][own[i]]]
            ids, logs = (values[f"teacher_{n}"][row][own] for n in ("ids", "log_probs"))
            entries = {
                i: dict(zip(ids[i - 1].tolist(), map(float, logs[i - 1]), strict=True))
                for i in targets
            }
            found.append((run.rows.tokens[row][own].tolist(), entries))
    return folder, found


def vllm(tokens, entries):
    some = [entries.get(i) for i in range(len(tokens))]
    logs = [x and {str(i): {"logprob": p, "rank": 1} for i, p in x.items()} for x in some]
    return {"prompt_token_ids": tokens, "prompt_logprobs": logs}


def sglang(tokens, entries):
    top = [
        [[p, i, None] for i, p in entries.get(n, {}).items()] or None for n in range(len(tokens))
    ]
    own = [[None, token, None] for token in tokens]
    return {"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}


def write(file, records):
    if file.suffix == ".parquet":
        rows = [
            {"tokens": t, "positions": [*e], "ids": [[*x] for x in e.values()],
             "log_probs": [[*x.values()] for x in e.values()]} for t, e in records
        ]  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        forms = [(vllm, sglang)[i % 2](*record) for i, record in enumerate(records)]
        file.write_text("".join(json.dumps(form) + "\n" for form in forms))
    return str(file)


def pack(file, compression):
    """Compresses a file, and deletes it."""
    codec = {"gz": "gzip", "zst": "zstd"}[compression]
    packed = pyarrow.compress(file.read_bytes(), codec, asbytes=True)
    file.with_name(f"{file.name}.{compression}").write_bytes(packed)
    file.unlink()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".jsonl.zst", ".parquet.gz"])
def test_a_file_gives_the_values_of_the_teacher_that_wrote_it(
    run, read, records, tmp_path, suffix, capsys
):
    folder, found = records
    other = ([*found[0][0], 3], found[0][1])  # of no document
    plain, _, compression = suffix[1:].partition(".")
    for number in range(2):
        write(file := tmp_path / f"teacher{number}.{plain}", [*found[number::2], other])
        if compression:
            pack(file, compression)
    source = str(tmp_path / "teacher*") if compression else str(tmp_path)
    import_cache(run.config, str(tmp_path / "cache"), source, K, jax.devices()[:1])
    again = 1 + len(found) - len({tuple(tokens) for tokens, _ in found})
    said = "".join(capsys.readouterr())
    assert f"--source: {again} records have the tokens of an earlier one" in said
    assert f"{source}: 1 record is of no document of this run and not used" in said
    want, got = read(folder), read(tmp_path / "cache")
    for name in topk_fields(K):
        close = {"rtol": 0.02, "atol": 0.02} if name == "rest" else {"rtol": 0}  # of float16
        np.testing.assert_allclose(got[f"teacher_{name}"], want[f"teacher_{name}"], **close)


def test_documents_are_written_for_another_system(run, records, tmp_path):
    file = tmp_path / "documents.jsonl"
    file.write_text("a letter")
    with pytest.raises(UserError, match="which is another file"):
        write_documents(run.config, str(file), jax.devices()[:1])
    file.unlink()
    beside = tmp_path / f".documents.jsonl.{os.getpid()}.tmp"
    beside.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot be written \(.*No space left.*then goes on$"):
        write_documents(run.config, str(file), jax.devices()[:1])
    assert not file.exists() and not os.path.lexists(beside)
    write_documents(run.config, str(file), jax.devices()[:1])
    lines = [json.loads(line)["prompt_token_ids"] for line in file.read_text().splitlines()]
    assert lines == list({tuple(tokens): tokens for tokens, _ in records[1]}.values())


def shifted(tokens, entries):
    return tokens[1:], {i - 1: x for i, x in entries.items()}


def with_first(change):
    def broken(tokens, entries):
        first = next(iter(entries))
        return tokens, {**entries, first: change(dict(entries[first]))}

    return broken


def late(count):
    """Returns a function that moves a record's entries, which have their tokens as vLLM's do."""

    def broken(tokens, entries):
        whole = {i: entries.get(i, {}) | {token: -9.0} for i, token in enumerate(tokens) if i}
        return tokens, {i: x for i in whole if (x := whole.get(i - count))}

    return broken


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (shifted, r"has 0 tokens in common; then the document has \d+ and the record \d+"),
        (lambda t, e: ([*t[:-1], 7], e), r"tokens in common; then the document has \d+ and .* 7\."),
        (lambda t, e: (t, {}), r"token \d+: expected log-probabilities, got none"),
        (with_first(lambda x: x | {320: -9.0}), r"expected ids from 0 to 319, got \d+ to 320"),
        (with_first(lambda x: x | {next(iter(x)): 0.5}), "expected log-probabilities up to 0"),
        (with_first(lambda x: dict.fromkeys(x, -0.1)), "expected probabilities that sum to at"),
        (with_first(lambda x: dict.fromkeys(x, -np.inf)), "expected a probability above 0, got n"),
        (with_first(lambda x: dict.fromkeys(x, "high")), r"teacher.jsonl:1: expected what vLLM"),
        (with_first(lambda x: x | {2**70: -9.0}), r"teacher.jsonl:1: expected what vLLM"),
        (lambda t, e: ([*t[:-1], t[-1] + 0.5], e), r"teacher.jsonl:\d+: expected what vLLM"),
        (late(1), r"those of the token before: of \d+ positions"),
        (late(-1), r"those of the token after: of \d+ positions"),
    ],
)
def test_a_wrong_file_is_named_and_leaves_nothing(run, records, tmp_path, broken, words):
    _, found = records
    alike = [i for i, (tokens, _) in enumerate(found) if tokens == found[0][0]]
    alike = range(len(found)) if broken is shifted else alike  # else others have the same tokens
    wrong = [broken(*x) if i in alike else x for i, x in enumerate(found)]
    source = write(tmp_path / "teacher.jsonl", wrong)
    with pytest.raises(UserError, match=words):
        import_cache(run.config, str(tmp_path / "cache"), source, K, jax.devices()[:1])
    assert not (tmp_path / "cache").exists()


def test_a_cut_parquet_file_is_one_message(run, records, tmp_path):
    source = write(tmp_path / "teacher.parquet", records[1])
    content = (tmp_path / "teacher.parquet").read_bytes()
    (tmp_path / "teacher.parquet").write_bytes(content[: len(content) // 2])
    packed = tmp_path / "packed.parquet.gz"
    packed.write_bytes(gzip.compress(content)[:-9])
    for file in (source, str(packed)):
        with pytest.raises(UserError, match=r"\.parquet(\.gz)?: expected what vLLM"):
            import_cache(run.config, str(tmp_path / "cache"), file, K, jax.devices()[:1])


def test_a_cache_has_one_teacher_and_one_k(run, records, tmp_path):
    one = jax.devices()[:1]
    source, folder = write(tmp_path / "teacher.jsonl", records[1]), str(tmp_path / "cache")
    import_cache(run.config, folder, source, K, one)
    with pytest.raises(UserError, match="expected those of the cache"):
        import_cache(run.config, folder, source, 2 * K, one)
    with pytest.raises(UserError, match=r"got .*cache, which was made of a file"):
        make_cache(run.config, folder, Storage("topk", k=K), devices=one)
    lacking = with_teacher(run.config, cache=folder, cache_missing="compute")
    with pytest.raises(UserError, match=r"teacher\.cache: .* which was made of a file"):
        open_rows(lacking, run)
    with pytest.raises(UserError, match="which a teacher made"):
        import_cache(run.config, str(records[0]), source, K, one)


def write_compressed(folder, found, form, *, settings=None, row=lambda x: x):
    """Writes documents as DistillKit does: with a token more, and no entries of their first."""
    folder.mkdir()
    (folder / CONFIG).write_text(yaml.safe_dump(settings or form))
    rows = []
    for tokens, entries in found:
        some = [dict(entries.get(i) or {j: -3.0 for j in range(K)}) for i in range(1, len(tokens))]
        some = [sorted(x.items(), key=lambda pair: -pair[1]) for x in [*some, some[-1]]]
        values = [compress([p for _, p in x], form)[0] for x in some]
        ids = [packed([i for i, _ in x], 9) for x in some]
        rows.append({"input_ids": [*tokens, 0], "compressed_logprobs": values})
        rows[-1] = row(rows[-1] | {"bytepacked_indices": ids})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data_0.parquet")
    return str(folder)


@pytest.mark.parametrize("join", [False, True])
def test_a_compressed_data_set_gives_the_values_of_the_teacher_that_wrote_it(
    run, read, records, tmp_path, join
):
    """Packed rows have several documents, each cut by the token that was added."""
    folder, found = records
    source = write_compressed(tmp_path / "set", found, FORMS["differences"])
    if join:
        file = tmp_path / "set" / "data_0.parquet"
        rows = pyarrow.parquet.read_table(file).to_pylist()
        lists = [x | {"input_ids": x["input_ids"][:-1]} for x in rows]
        lists = [x | {"attention_mask": [i + 1] * len(x["input_ids"])} for i, x in enumerate(lists)]
        one = {name: [value for x in lists for value in x[name]] for name in lists[0]}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([one]), file)
    import_cache(run.config, str(tmp_path / "cache"), source, K, jax.devices()[:1])
    want, got = (by_id(read(place)) for place in (folder, tmp_path / "cache"))
    assert np.array_equal(got["ids"], want["ids"])
    np.testing.assert_allclose(got["log_probs"], want["log_probs"], atol=5e-3)  # 13 bits, float16
    np.testing.assert_allclose(got["rest"], want["rest"], atol=0.02)


def by_id(values):
    """Returns the fields with a token's entries by id: rounding may reorder equal ones."""
    order = np.argsort(values["teacher_ids"], axis=-1, kind="stable")
    some = {n: np.take_along_axis(values[f"teacher_{n}"], order, -1) for n in ("ids", "log_probs")}
    return some | {"rest": values["teacher_rest"]}


LEGACY = {"vocab_size": 320, "k": K, "exact_k": 4, "polynomial_degree": 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": FORMS["whole"] | {"d": 1000}}, "expected 10 bytes a token by comp.*, got 9"),
        ({"settings": FORMS["curve"]}, "compressed_logprobs: expected 24 bytes a token .*, got 16"),
        ({"settings": LEGACY}, "expected no polynomial_degree, which is of its legacy form"),
        ({"settings": FORM | {"exact_dtype": "int4"}}, "expected other values of dtype: int4"),
        ({"settings": FORM | {"alpha": 1}}, "expected d, .*, got alpha"),
        ({"row": lambda x: x | {"input_ids": [9, *x["input_ids"][1:]]}}, "0 tokens in common"),
        (
            {"row": lambda x: x | {"compressed_logprobs": x["compressed_logprobs"][2:]}},
            "values and",
        ),
        ({"row": lambda x: x | {"top_values": []}}, "got top_values: its plain form"),
    ],
)
def test_a_data_set_that_does_not_fit_is_one_message(run, records, tmp_path, changes, words):
    source = write_compressed(tmp_path / "set", records[1], FORMS["whole"], **changes)
    with pytest.raises(UserError, match=words):
        import_cache(run.config, str(tmp_path / "cache"), source, K, jax.devices()[:1])
    assert not (tmp_path / "cache").exists()
