"""Teachers that are only a file: what other systems write, and what is wrong with it."""

import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_cache import make_config, open_rows, places, with_teacher  # noqa: F401
from tiny_run import Run

from kd_jax.config import UserError
from kd_jax.inference.cache_import import import_cache, write_documents
from kd_jax.inference.cached import Storage, make_cache
from kd_jax.teachers.topk import topk_fields

K = 8


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


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_gives_the_values_of_the_teacher_that_wrote_it(run, read, records, tmp_path, suffix):
    folder, found = records
    source = write(tmp_path / f"teacher{suffix}", found)
    import_cache(run.config, str(tmp_path / "cache"), source, K, jax.devices()[:1])
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
    with pytest.raises(UserError, match=r"teacher\.parquet: expected what vLLM"):
        import_cache(run.config, str(tmp_path / "cache"), source, K, jax.devices()[:1])


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
