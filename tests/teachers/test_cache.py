"""A teacher's cache: loss and gradients equal the live teacher's, and nothing torn is read."""

import dataclasses
import json
import os
import re
import shutil
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny_run import Run, flat, make_run_config

from kd_jax import cache as cache_command
from kd_jax import train
from kd_jax.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    TeacherConfig,
    UserError,
)
from kd_jax.config.command import run_command
from kd_jax.data.chat import chat_template_of
from kd_jax.data.documents import find_documents
from kd_jax.inference import teacher_pass
from kd_jax.inference.cache_check import check_cache
from kd_jax.inference.cached import Storage, make_cache, open_cached
from kd_jax.inference.evaluation import evaluate_rows
from kd_jax.inference.teacher_pass import TeacherPass
from kd_jax.parallel.platforms import PLATFORMS
from kd_jax.setup.inputs import open_inputs, row_source
from kd_jax.teachers import storage, stored, writing
from kd_jax.teachers.cost import read_cost
from kd_jax.teachers.manifest import new_cache
from kd_jax.training.step import jit_train_step

STEPS = 20
SHAPE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of a student, a wider teacher with one layer more, and data with repeated records."""
    root = tmp_path_factory.mktemp("cached")
    student = tiny.write_plain_model(root / "student", 1, **{**SHAPE, "num_hidden_layers": 1})
    teacher = tiny.write_plain_model(root / "teacher", 2, **SHAPE)
    return student, teacher, tiny.write_data(root / "train.jsonl"), root / "rows"


@pytest.fixture(scope="module")
def make_config(places):
    return partial(make_run_config, *places, steps=STEPS)


def with_teacher(config, **fields):
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, **fields))


@pytest.fixture(scope="module")
def cache(make_config, tmp_path_factory):
    """A cache of the runs' documents. Read only."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    make_cache(make_config(), str(folder))
    return folder


def open_rows(config, run):
    """Returns the values of a run's rows from its teacher.cache."""
    _, teacher, _ = open_inputs(config, run.mesh.devices.ravel())
    template = chat_template_of(config.data, teacher.tokenizer)
    return open_cached(config, teacher, run.mesh, teacher.hashes, template, (run.rows, None))


def trace(config, steps=STEPS, devices=None):
    """Returns the trained arrays and the metrics after each step, as in kd_jax.train."""
    run = Run(config, devices)
    read_teacher = open_rows(config, run).train if config.reads_cache else None
    step = jit_train_step(run.mesh, jax.tree.map(lambda x: x.sharding, run.state))
    source = row_source(config, run.rows, run.mesh, 0, read_teacher)
    frozen, state, seen = (run.models.frozen, run.models.teacher_arrays), run.state, []
    for i in range(steps):
        state, metrics = step(run.program, state, *frozen, source(i, state))
        arrays = {name: np.array(x) for name, x in flat(state.trainable).items()}
        seen.append((arrays, jax.device_get(metrics)))
    return seen


def assert_equal(some, others):
    for one, other in zip(some, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture
def real_code(monkeypatch):
    """Code as outside of tests: the older emitter (conftest) orders sums by what is beside them."""
    if version("jax").startswith("0.10."):
        options = PLATFORMS["cpu"].compiler_options
        monkeypatch.setitem(options, "xla_cpu_use_fusion_emitters", True)


@pytest.mark.usefixtures("real_code")
def test_training_from_the_cache_equals_training_with_the_live_teacher_bit_for_bit(
    make_config, tmp_path
):
    config = make_config(trainable="lora", mesh={"data": 1}, optim={"accumulation_steps": 2})
    config, one = with_teacher(config, dtype="bfloat16"), jax.devices()[:1]
    make_cache(config, str(tmp_path / "cache"), devices=one)
    cached = with_teacher(config, cache=str(tmp_path / "cache"))
    assert_equal(trace(cached, devices=one), trace(config, devices=one))


def token_sums(config, change=lambda values: values):
    """Returns the sums of the metrics by document, of the student before training."""
    run = Run(config, jax.devices()[:1])
    arrays = (run.models.frozen | run.models.trainable["student"], run.models.teacher_arrays)
    read_teacher = None
    if config.reads_cache:
        reader = open_rows(config, run).train

        def read_teacher(*rows):
            return {name: change(x) for name, x in reader(*rows).items()}

    return evaluate_rows(run.program, run.mesh, *arrays, run.rows, config, read_teacher)[0]


def test_another_packing_and_batch_change_rounding_alone(make_config, cache):
    """Twin: with the hidden states of other tokens the distance to the teacher is another."""
    other = make_config(pack=False, seq_len=160, batch_size=6, mesh={"data": 1})
    live, cached = token_sums(other), with_teacher(other, cache=str(cache))
    count, found = live["target_tokens"], token_sums(cached)
    for name in ("kl_forward", "kl_reverse", "teacher_ce", "teacher_entropy"):
        assert np.abs(found[name] - live[name]).max() < 2e-5 * count.max(), name
    shifted = token_sums(cached, lambda values: np.roll(values, 1, axis=-2))
    assert np.abs(shifted["teacher_ce"] - live["teacher_ce"]).max() > 0.1


def test_a_cache_has_what_a_prompted_teacher_says(make_config, tmp_path):
    """Twin: without the prompt the teacher has other documents."""
    options, one = {"mesh": {"data": 1}, "batch_size": 2, "seq_len": 96}, jax.devices()[:1]
    live = make_config(prompt={"system": "Answer as the cat."}, **options)
    data = make_cache(live, str(tmp_path / "cache"), devices=one)
    found = token_sums(with_teacher(live, cache=str(tmp_path / "cache")))
    checked = check_cache(live, str(tmp_path / "cache"), data)
    assert abs(checked["kl"]) < 1e-6 and checked["top1_agreement"] == 1
    for name, want in token_sums(live).items():
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-4, err_msg=name)
    plain = with_teacher(make_config(**options), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="lacks 24 of 24 documents"):
        open_rows(plain, Run(plain, one))


def test_a_documents_key_depends_on_its_tokens_and_targets_alone(make_config):
    packed, plain = (find_documents(Run(make_config(pack=x)).rows) for x in (True, False))
    assert sorted(packed.keys) == sorted(plain.keys) and packed.keys != plain.keys
    counts = dict(zip(packed.keys, packed.counts.tolist(), strict=True))
    assert all(counts[k] == n for k, n in zip(plain.keys, plain.counts.tolist(), strict=True))
    every = find_documents(Run(make_config(train_on="all")).rows)
    assert not {*every.keys} & {*packed.keys} and every.counts.sum() > packed.counts.sum()


def files_of(folder):
    timed = ("lock", "cost.json")
    files = (x for x in sorted(folder.rglob("*")) if x.is_file() and x.name not in timed)
    return {str(x.relative_to(folder)): x.read_bytes() for x in files}


@pytest.mark.fast
def test_a_killed_writer_goes_on_to_the_same_bytes(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_BYTES", 2**14)
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 2**11)
    make_cache(make_config(), str(tmp_path / "whole"))
    write, written = writing.PartWriter._write, []

    def killed(self, number, values):
        if len(written) in (1, 4):  # the second start gets further than the first
            written.append(-1)
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, values)

    monkeypatch.setattr(writing.PartWriter, "_write", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            make_cache(make_config(), str(tmp_path / "torn"))
        assert not (tmp_path / "torn" / "manifest.json").exists()
    first = tmp_path / "torn" / "part0000" / "hidden" / "c" / "0" / "0"
    first.write_bytes(first.read_bytes()[:-5])  # a torn shard counts as missing
    make_cache(make_config(), str(tmp_path / "torn"))
    numbers = [number for number in written if number >= 0]
    assert len(numbers) < 2 * len(set(numbers)) + 4 and len(set(numbers)) > 5  # few again
    assert files_of(tmp_path / "torn") == files_of(tmp_path / "whole")
    whole, torn = (read_cost(str(tmp_path / name)) for name in ("whole", "torn"))
    assert whole.tokens == pytest.approx(torn.tokens, rel=0.5) and whole.seconds_per_token > 0


def test_what_a_pass_cost_is_kept_where_its_last_write_fails(make_config, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(teacher_pass, "commit", full)
        with pytest.raises(UserError, match="the same command then goes on"):
            make_cache(make_config(), str(tmp_path))
    cost = read_cost(str(tmp_path))
    make_cache(make_config(), str(tmp_path))
    assert read_cost(str(tmp_path)) == cost and cost.tokens > 0


@pytest.mark.fast
def test_processes_that_go_on_read_each_their_own_shards(tmp_path, monkeypatch):
    """The least of what they count is what one process counts alone."""
    monkeypatch.setattr(storage, "SHARD_BYTES", 2**14)
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 2**11)
    cache = new_cache(str(tmp_path), "hidden", {"hidden": storage.Field((8,), "float32")}, {})
    part = [bytes(16)], np.array([4000])
    writer = writing.PartWriter(cache, *part)
    writer.append({"hidden": np.ones((4000, 8), np.float32)})
    writer.flush()
    shard = tmp_path / "part0000" / "hidden" / "c" / "5" / "0"
    shard.write_bytes(bytes(reversed(shard.read_bytes())))
    is_whole, read = writing.PartWriter._is_whole, []

    def watched(self, name, number):
        read.append(number)
        return is_whole(self, name, number)

    monkeypatch.setattr(writing.PartWriter, "_is_whole", watched)

    def count(process, num_processes):
        monkeypatch.setattr(writing.jax, "process_index", lambda: process)
        monkeypatch.setattr(writing.jax, "process_count", lambda: num_processes)
        read.clear()
        return writing.PartWriter(cache, *part).count_whole(), list(read)

    assert count(0, 1) == (5, [0, 1, 2, 3, 4, 5])
    assert [count(i, 3) for i in range(3)] == [(8, [0, 3, 6]), (8, [1, 4, 7]), (5, [2, 5])]


def test_damage_of_an_unfinished_part_is_repaired_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SHARD_BYTES", 2**14)
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 2**11)
    values = np.arange(8_000, dtype=np.float32).reshape(1000, 8)

    def fill():
        cache = new_cache(str(tmp_path), "hidden", {"hidden": storage.Field((8,), "float32")}, {})
        writer = writing.PartWriter(cache, [bytes(16)], np.array([1000]))
        writer.go_on(writer.count_whole())
        if writer.done < 1000:
            writer.append({"hidden": values[writer.done :]})
        writer.flush()
        return files_of(tmp_path)

    whole = fill()
    assert len(whole) == 5  # the plan, the index, and an array of two shards
    for name, content in whole.items():
        for size in (0, len(content) // 2, len(content) - 2):
            (tmp_path / name).write_bytes(content[:size])
            assert fill() == whole


@pytest.mark.fast
def test_documents_that_wait_for_their_shard_are_counted_once(tmp_path):
    """A shard of few entries a token takes a hundred thousand documents."""
    read = []

    class Values(dict):
        def values(self):
            read.append(self)
            return super().values()

        def __getitem__(self, name):
            read.append(self)
            return super().__getitem__(name)

    cache = new_cache(str(tmp_path), "hidden", {"hidden": storage.Field((8,), "float32")}, {})
    writer = writing.PartWriter(cache, [bytes(16)] * 50, np.ones(50, int))
    for _ in range(50):
        writer.append(Values(hidden=np.ones((1, 8), np.float32)))
    writer.flush()
    assert len(read) <= 2 * 50


def test_documents_are_added_to_a_cache_and_computed_for_a_run(
    make_config, places, tmp_path, capsys
):
    more = tmp_path / "more.jsonl"
    records = [json.loads(line) for line in places[2].read_text().splitlines()]
    new = [{**x, "instruction": f"Again. {x['instruction']}"} for x in records[:8]]
    more.write_text("".join(json.dumps(x) + "\n" for x in [*records[:8], *new]))
    config = make_config()
    both = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(more)))
    folder = str(tmp_path / "cache")
    make_cache(config, folder)
    lacking = with_teacher(both, cache=folder)
    with pytest.raises(UserError, match=r"lacks 8 of 16 documents of data\.path"):
        open_rows(lacking, Run(both))
    before = files_of(tmp_path / "cache")
    open_rows(with_teacher(lacking, cache_missing="compute"), Run(both))
    assert "8 documents added" in capsys.readouterr().out
    after = files_of(tmp_path / "cache")
    assert {x: y for x, y in before.items() if x != "manifest.json"}.items() <= after.items()
    open_rows(lacking, Run(both))
    open_rows(with_teacher(config, cache=folder), Run(config))  # the first run's are still there


def test_a_torn_or_foreign_cache_is_never_read(make_config, cache, tmp_path):
    torn = tmp_path / "torn"
    run = Run(make_config())

    def fails(words, **fields):
        config = with_teacher(make_config(), cache=str(torn), **fields)
        with pytest.raises(UserError, match=words):
            open_rows(config, run).train(np.arange(8), np.ones(8, bool))

    fails("got none")
    files = files_of(cache)
    for name, content in files.items():
        for size in (0, len(content) // 2, len(content) - 2):  # the last byte is a new line
            shutil.copytree(cache, torn)
            (torn / name).write_bytes(content[:size])
            fails(r"expected [\d,]+ bytes|of this version|got none")
            shutil.rmtree(torn)
        shutil.copytree(cache, torn)
        (torn / name).unlink()
        fails("missing|got none")
        shutil.rmtree(torn)
    shutil.copytree(cache, torn)
    shard = next(torn.glob("part0000/hidden/c/0/*"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    fails("cannot be read")
    fails("teacher.dtype: expected float32", dtype="bfloat16")
    (torn / "part0000" / "hidden" / "zarr.json").write_bytes(
        files["part0000/hidden/zarr.json"].replace(b'"shape"', b'"shope"')
    )
    fails("cannot be read")
    shutil.rmtree(torn)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree | {"kind": "other"}, "of this version"),
        (lambda tree: tree | {"kind": "topk"}, "of this version"),
        (lambda tree: tree | {"fields": {}}, "of this version"),
        (lambda tree: tree | {"fields": {"hidden": [[48], "bfloat16"]}}, "cannot be read"),
        (lambda tree: tree | {"parts": [tree["parts"][0] | {"tokens": 5}]}, "got another"),
    ],
)
def test_a_manifest_of_other_arrays_is_refused(make_config, cache, tmp_path, change, words):
    torn = shutil.copytree(cache, tmp_path / "torn")
    tree = json.loads((torn / "manifest.json").read_text())
    (torn / "manifest.json").write_text(json.dumps(change(tree)))
    with pytest.raises(UserError, match=words):
        open_rows(with_teacher(make_config(), cache=str(torn)), Run(make_config()))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kindd", "topk"), "--kindd: no such flag. Did you mean --kind?"),
        (("--k", "8"), "--k: expected --kind topk, --kind sampled or --source as well, got 8"),
        (("--kind", "topk", "--dtype", "int8"), "--dtype: expected auto"),
        (("--source", "x.jsonl", "--check"), "--source: expected no --check beside it"),
        (("--source", "x.jsonl", "--kind", "sampled"), "--kind: expected topk with --source"),
    ],
)
def test_flags_without_effect_are_refused(capsys, flags, words):
    argv = ["--config", "no_file.py", "--out", "no_folder", *flags]
    assert run_command(cache_command.main, argv) == 2
    assert words in capsys.readouterr().err


def test_outputs_that_are_not_finite_are_never_stored(make_config, places, tmp_path):
    teacher = shutil.copytree(places[1], tmp_path / "teacher")
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.nan
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    config = with_teacher(make_config(), path=str(teacher))
    with pytest.raises(UserError, match=r"teacher\.path: expected finite outputs, got NaN"):
        make_cache(config, str(tmp_path / "cache"), Storage(dtype="int8"))
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_mistakes_are_one_message_and_leave_nothing(
    make_config, cache, tmp_path, capsys, monkeypatch
):
    config = make_config()
    hidden = dataclasses.replace(
        config.hidden, weight=1.0, student_layers=(0,), teacher_layers=(0,)
    )
    with pytest.raises(UserError, match=r"hidden\.weight: expected 0 with teacher\.cache"):
        dataclasses.replace(with_teacher(config, cache="c"), hidden=hidden)
    with pytest.raises(UserError, match=r"teacher\.cache-missing: expected error"):
        dataclasses.replace(config, teacher=TeacherConfig(path="t", cache_missing="compute"))
    (tmp_path / "letter").write_text("Dear Sir")
    with pytest.raises(UserError, match=r"got .* with letter"):
        make_cache(config, str(tmp_path))
    with pytest.raises(UserError, match="expected a teacher"):
        make_cache(dataclasses.replace(config, teacher=None), str(tmp_path / "new"))
    with pytest.raises(UserError, match="--dtype: expected"):
        make_cache(config, str(cache), Storage(dtype="bfloat16"))
    reverse = dataclasses.replace(config, loss=LossConfig(divergence="reverse_kl"))
    with pytest.raises(UserError, match=r"loss\.divergence: expected forward_kl with the sampled"):
        make_cache(reverse, str(tmp_path / "new"), Storage("sampled"), check=True)
    capsys.readouterr()
    run, forward = [], TeacherPass.forward
    monkeypatch.setattr(TeacherPass, "forward", lambda *x: run.append(1) or forward(*x))
    monkeypatch.setattr("kd_jax.inference.cached._TIMED_BATCHES", 2)
    make_cache(make_config(batch_size=2), str(tmp_path / "new"), dry_run=True)
    assert len(run) == 3  # the third is on the device when the second's values are read
    out = capsys.readouterr().out
    assert re.search(r"24 to compute: 768 tokens with a loss, .* GB\n", out)
    assert re.search(r"\n[\d,]+ tokens/s: .* min\. Nothing was written\n", out)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["letter"]


@pytest.mark.parametrize("dtype", ["float8", "int8"])
def test_a_scaled_dtype_errs_by_its_rounding_alone(dtype):
    """Twin: without the scales the values are others."""
    fields = stored.hidden_fields(48, dtype)
    assert storage.token_bytes(fields) == 48 + 4
    states = np.random.default_rng(0).normal(size=(2, 3, 48)) * [[[1.0], [30.0], [0.0]]]
    out = stored.encode(jnp.asarray(states, jnp.float32), fields["hidden"].dtype)
    values, scales = (np.asarray(out[name]).astype(np.float64) for name in ("hidden", "scales"))
    back = values * scales[..., None]
    step = scales[..., None] * {"int8": 1.0, "float8": 2.0**-9}[dtype]
    relative = {"int8": 0.0, "float8": 2.0**-4}[dtype]  # half a unit of 3 bits of mantissa
    assert (np.abs(back - states) <= step / 2 * 1.001 + relative * np.abs(states)).all()
    assert np.abs(values - states).max() > 1


def test_the_check_measures_what_a_form_costs(make_config, tmp_path):
    """Merging entries to one can only lower a divergence."""
    config, one = make_config(mesh={"data": 1}), jax.devices()[:1]
    forms = {"auto": Storage(), "int8": Storage(dtype="int8"), "topk": Storage("topk", k=16)}
    found = {}
    for name, how in forms.items():
        data = make_cache(config, str(tmp_path / name), how, devices=one)
        found[name] = check_cache(config, str(tmp_path / name), data)
    exact, rounded, truncated = found.values()
    assert exact["tokens"] == 768 and exact["cached"] == pytest.approx(exact["live"], rel=1e-6)
    assert exact["top1_agreement"] == 1 and abs(exact["kl"]) < 1e-6
    assert 1e-6 < rounded["kl"] < 1e-2 and rounded["cached"] != rounded["live"]
    assert -0.5 * exact["live"] < truncated["difference"] < -1e-3
    loss = dataclasses.replace(config.loss, divergence="alpha_beta", temperature=2.0)
    other = with_teacher(dataclasses.replace(config, loss=loss), cache=str(tmp_path / "topk"))
    run = Run(config, one)
    with pytest.raises(UserError) as raised:
        open_rows(other, run)
    assert "loss.divergence: expected forward_kl|" in str(raised.value)
    assert "loss.temperature: expected 1" in str(raised.value)
    truncated = open_rows(with_teacher(config, cache=str(tmp_path / "topk")), run)
    truncated.check_vocab(data.vocab_size)
    with pytest.raises(UserError, match=r"share 320 vocabulary entries, .*, got 319"):
        truncated.check_vocab(319)
    with pytest.raises(UserError, match=r"--k: expected an even number up to 320"):
        make_cache(config, str(tmp_path / "new"), Storage("topk", k=322), devices=one)


@pytest.mark.fast
def test_the_commands_train_and_resume_from_the_cache(places, tmp_path, capsys):
    student, teacher, data, rows = map(str, places)
    file = tiny.write_config(
        tmp_path, teacher=teacher, student=student, data=data, dtype="float32",
        trainable="full", rows={"cache_dir": rows}, log=LogConfig(tensorboard=False),
        eval=EvalConfig(fraction=0.2, every_steps=2), checkpoint=CheckpointConfig(every_steps=2),
    )  # fmt: skip
    cache = ["--teacher.cache", str(tmp_path / "cache")]

    def run(main, *flags):
        return run_command(main, ["--config", str(file), *flags])

    assert run(cache_command.main, "--out", cache[1]) == 0
    assert run(train.main, "--workdir", str(tmp_path / "cached"), *cache) == 0
    whole = tiny.trace(tmp_path / "cached")
    assert [x["step"] for x in whole] == [1, 2, 2, 3, 4, 4] and "eval/kl_forward" in whole[-1]
    shutil.rmtree(tmp_path / "cached" / "checkpoints" / "4")
    assert run(train.main, "--workdir", str(tmp_path / "cached")) == 2  # the live teacher
    assert "teacher.cache: expected the content that the run began with" in capsys.readouterr().err
    assert run(train.main, "--workdir", str(tmp_path / "cached"), *cache) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert tiny.trace(tmp_path / "cached") == whole


def test_an_address_of_s3_goes_to_the_endpoint_of_the_environment(monkeypatch):
    for name in storage._TIMEOUTS:
        monkeypatch.setenv(name, "7")  # the user's
    monkeypatch.delenv("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES")
    storage._context.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    place = storage.open_folder("s3://bucket/some/cache").spec().to_json()
    assert place["endpoint"] == "http://127.0.0.1:9" and place["aws_region"] == "eu-west-1"
    assert (place["bucket"], place["path"]) == ("bucket", "some/cache/")
    seconds = os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"]
    assert (seconds, os.environ["TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES"]) == ("7", "1")
    for address in ("memory://cache", "http://host/cache", "foo://cache", "s3://", "gs://"):
        with pytest.raises(UserError, match=rf"^{address}: expected a folder, or an address that"):
            new_cache(address, "hidden", {}, {})


def test_a_folder_is_found_from_another_one_and_by_a_link(tmp_path, monkeypatch):
    here, folder = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(here)
    for number, path in enumerate(("../cache", "../here/../cache/", "../link", "../link/../cache")):
        storage.write_json(storage.open_folder(path), f"{number}.json", {})
        assert (folder / f"{number}.json").is_file()


def test_a_place_that_cannot_be_written_is_a_short_message(tmp_path):
    (tmp_path / "ids").touch()
    store, field = storage.open_folder(str(tmp_path)), storage.Field((4,), "int8")
    wanted = pytest.raises(UserError, match=r"Not a directory.*then goes on$")
    with wanted as caught, storage.storing(str(tmp_path)):
        storage.open_array(store, "ids/", field, 8, (8, 8))
    assert "{" not in str(caught.value)
