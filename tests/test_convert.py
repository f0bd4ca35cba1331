"""Conversions: transformers and peft load the exports, with the same logits as kd_jax."""

import errno
import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import deserialize
from safetensors.numpy import load_file, save_file
from tiny import logits

from convert import from_hf, to_hf
from kd_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    StudentConfig,
    TeacherConfig,
    UserError,
)
from kd_jax.config.command import run_command
from kd_jax.models.architecture import read_architecture
from kd_jax.models.decoder import Decoder
from kd_jax.models.weight_table import (
    abstract_weights,
    adapter_weights,
    hf_names,
    trained_weights,
    weights,
)
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.setup.model_files import open_model_files
from kd_jax.setup.models import load_models
from kd_jax.training.step import TrainState
from kd_jax.weights import adapters, export
from kd_jax.weights import folder as weights_folder
from kd_jax.weights import load as weights_load
from kd_jax.weights.orbax import OrbaxArrays
from kd_jax.workdir import checkpoints, resume

pytestmark = pytest.mark.devices(8)

LORA = LoraConfig(rank=4, alpha=10.0, target_modules=("q_proj", "o_proj", "down_proj"))
TOKENS = np.arange(40, dtype=np.int32).reshape(2, 20) % 37
PLACES = (np.broadcast_to(np.arange(20, dtype=np.int32), (2, 20)), np.ones((2, 20), np.int32))
CONFIG = tiny.make_config()


def make_config(folder, *, trainable="lora", dtype="float32", workdir="unused", adapter=None):
    return Config(
        workdir=str(workdir),
        teacher=TeacherConfig(path=str(folder)),
        student=StudentConfig(path=str(folder), dtype=dtype, adapter=adapter),
        data=DataConfig(path="unused", batch_size=8),
        trainable=trainable,
        lora=LORA,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        steps=1,
    )


def load(config):
    """Returns the models of a run as kd_jax.train loads them."""
    student = open_model_files(config.student.path, config.student.adapter, "student")
    return load_models(config, student, None, make_mesh(config.mesh, 8)), student.arch


def trained(models, change=0.1):
    """Returns the trainable arrays after random updates, as NumPy arrays."""
    rng = np.random.default_rng(3)
    return {
        name: np.asarray(x) + change * rng.standard_normal(x.shape, np.float32)
        for name, x in models.trainable["student"].items()
    }


class InMemory:
    """Stands in for the arrays of a checkpoint."""

    def __init__(self, arrays):
        self.shapes = {path: x.shape for path, x in arrays.items()}
        self.read = arrays.__getitem__


def our_logits(models, arrays):
    decoder = Decoder(models.student, models.frozen | arrays)
    return np.asarray(jax.jit(logits)(decoder, TOKENS, *PLACES))


def torch_logits(theirs):
    import torch

    with torch.no_grad():
        return theirs.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def assert_same_logits(ours, theirs):
    # Both round float32 sums of a few hundred terms, in different orders.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def stored_bytes(folder):
    """Returns dtype, shape and bytes of every tensor in a folder, as safetensors reads them."""
    return {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for file in folder.glob("*.safetensors")
        for name, tensor in deserialize(file.read_bytes())
    }


def auto_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize(
    "family, tied",
    [
        ("llama", False),
        ("qwen2", True),
        ("granite", True),
        ("olmo2", True),
        ("phi3", True),
        ("gemma3_text", True),
    ],
)
def test_a_merged_export_is_what_transformers_computes_with(family, tied, tmp_path):
    source = tiny.write_model(tmp_path / "source", 1, family=family, tie_word_embeddings=tied)
    config, out = make_config(source), tmp_path / "out"
    models, _ = load(config)
    arrays = trained(models)
    export.export_merged(source, config, InMemory(arrays), out, max_shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    theirs, base = torch_logits(auto_model(tmp_path / "out")), torch_logits(auto_model(source))
    assert_same_logits(our_logits(models, arrays), theirs)
    assert np.abs(theirs - base).max() > 0.1 * np.abs(base).max()


@pytest.mark.parametrize("family, tied", [("llama", False), ("phi3", True), ("gemma3_text", True)])
def test_an_export_of_full_training_is_what_transformers_computes_with(family, tied, tmp_path):
    source = tiny.write_model(tmp_path / "source", 1, family=family, tie_word_embeddings=tied)
    config = make_config(source, trainable="full")
    models, arch = load(config)
    assert models.trainable["student"].keys() == weights(arch).keys()
    arrays = trained(models, 0.05)
    export.export_merged(source, config, InMemory(arrays), tmp_path / "out")
    assert_same_logits(our_logits(models, arrays), torch_logits(auto_model(tmp_path / "out")))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_full_training_is_exported_in_the_sources_dtype_rounded_as_torch_rounds(dtype, tmp_path):
    import torch

    source = tiny.write_model(tmp_path / "source", 1, dtype)
    config = make_config(source, trainable="full")
    models, arch = load(config)
    arrays = trained(models, 0.05)
    export.export_merged(source, config, InMemory(arrays), tmp_path / "out")
    state = auto_model(tmp_path / "out").state_dict()
    for path, value in arrays.items():
        for layer, name in enumerate(hf_names(path, arch)):
            want = weights(arch)[path].split(value)[layer]
            want = torch.tensor(want).to(getattr(torch, dtype))
            assert torch.equal(state[name], want), name


@pytest.mark.parametrize(
    "family, dtype, form",
    [
        ("llama", "float32", "hugging face"),
        ("llama", "float16", "orbax"),
        ("qwen2", "bfloat16", "hugging face"),
        ("phi3", "bfloat16", "orbax"),
        ("gemma3_text", "bfloat16", "hugging face"),
    ],
)
def test_an_untouched_adapter_gives_back_the_sources_bytes(family, dtype, form, tmp_path):
    import torch

    source = tiny.write_model(tmp_path / "source", 1, dtype, family=family)
    theirs = auto_model(source)
    integer = torch.int32 if dtype == "float32" else torch.int16
    for weight in theirs.parameters():
        raw = weight.data.view(-1)
        raw[:4] = torch.tensor([-0.0, 0.0, float("inf"), -float("inf")])
        raw[4:32] = torch.arange(1, 29).to(integer).view(weight.dtype)  # denormals
    theirs.save_pretrained(source)
    config = make_config(source, dtype="bfloat16")
    models, _ = load(config)
    place = source
    if form == "orbax":
        place = tmp_path / "orbax"
        export.save_orbax(source, place)
    arrays = {name: np.asarray(x) for name, x in models.trainable["student"].items()}
    assert any(x.any() for x in arrays.values())
    export.export_merged(place, config, InMemory(arrays), tmp_path / "out")
    assert stored_bytes(tmp_path / "out") == stored_bytes(source)


def make_peft(adapted):
    import peft

    options = {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(
        adapted, peft.LoraConfig(**options, target_modules=list(LORA.target_modules))
    )


def test_a_merged_export_equals_pefts_merge(tiny_student, tmp_path):
    import torch

    config = make_config(tiny_student)
    models, arch = load(config)
    arrays = trained(models)
    export.export_merged(tiny_student, config, InMemory(arrays), tmp_path / "out")
    theirs = make_peft(auto_model(tiny_student))
    state = theirs.state_dict()
    with torch.no_grad():
        for path, value in arrays.items():
            for layer, name in enumerate(hf_names(path, arch)):
                place = f"base_model.model.{name}.default.weight"
                state[place].copy_(torch.tensor(value[layer]))
    merged = theirs.merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_allclose(value, merged[name].numpy(), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("family", ["llama", "olmo2", "phi3"])
def test_peft_computes_with_an_exported_adapter_what_our_model_does(family, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.setenv("HOME", str(tmp_path))
    source = tiny.write_model(tmp_path / "source", 1, family=family)
    config, out = make_config("~/source"), tmp_path / "out"
    models, arch = load(config)
    arrays = trained(models)
    export.export_adapter(source, config, InMemory(arrays), out)
    base = auto_model(source)
    before = torch_logits(base)
    theirs = torch_logits(AutoPeftModelForCausalLM.from_pretrained(out))  # with its base
    assert_same_logits(our_logits(models, arrays), theirs)
    assert np.abs(theirs - before).max() > 0.1 * np.abs(before).max()

    again = adapters.load_adapter(out, arch)
    assert replace(again.config, target_modules=LORA.target_modules) == LORA
    assert adapter_weights(again.config, arch) == adapter_weights(LORA, arch)
    for name, value in adapters.stack_adapter(again, arch).items():
        np.testing.assert_array_equal(value, arrays[name])


def test_the_orbax_form_gives_back_every_bit_in_every_layout(tiny_teacher, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_teacher, mixed)
    tensors = load_file(mixed / "model.safetensors")
    for name in tensors:  # norms stay float32, as some models store them
        if "proj" in name:
            tensors[name] = tensors[name].astype(jnp.bfloat16)
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    assert run_command(from_hf.main, ["--source", str(mixed), "--out", str(tmp_path / "out")]) == 0
    arch = weights_folder.load_architecture(tmp_path / "out")
    for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        layout = Layout(make_mesh(mesh, 8))
        dtypes = weights_load.stored_dtypes(mixed, arch)
        assert weights_load.stored_dtypes(tmp_path / "out", arch) == dtypes
        abstract = abstract_weights(weights(arch), layout, dtypes)
        want = weights_load.load_arrays(mixed, arch, abstract)
        got = weights_load.load_arrays(tmp_path / "out", arch, abstract)
        assert {x.dtype.name for x in got.values()} == {"float32", "bfloat16"}
        for name, value in want.items():
            assert got[name].sharding == value.sharding and got[name].dtype == value.dtype
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        some = {path: weights(arch)[path] for path in ("norm.weight", "layers.mlp.up_proj.weight")}
        half = abstract_weights(some, layout, "bfloat16")
        rounded = weights_load.load_arrays(tmp_path / "out", arch, half)
        assert rounded.keys() == some.keys()
        for name, value in weights_load.load_arrays(mixed, arch, half).items():
            np.testing.assert_array_equal(rounded[name], value, err_msg=name)
    assert weights_load.load_arrays(tmp_path / "out", arch, {}) == {}
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {"orbax", *(p.name for p in mixed.iterdir())} - {"model.safetensors"}


def test_an_orbax_folder_that_does_not_fit_is_refused(tiny_student, tmp_path):
    export.save_orbax(tiny_student, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    other = {**config, "intermediate_size": 98, "tie_word_embeddings": False}
    arch = read_architecture(other, "config")
    for use in (
        weights_load.check_tensors,
        lambda *args: weights_load.load_arrays(*args, {}),
    ):
        with pytest.raises(UserError) as error:
            use(tmp_path / "out", arch)
        assert "missing: lm_head.weight [320, 64]" in str(error.value)
        assert "layers.mlp.up_proj.weight: expected [3, 98, 64], got [3, 96, 64]" in str(
            error.value
        )
    shutil.rmtree(tmp_path / "out" / "orbax" / "state")
    with pytest.raises(UserError, match=r"orbax: expected what convert.from_hf wrote"):
        weights_load.check_tensors(tmp_path / "out", read_architecture(config, "config"))


def run(*argv):
    """Runs a command in a process of its own: threads of Orbax outlive what it raises."""
    return subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=100
    )


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_damaged_orbax_folder_is_refused(tiny_student, tmp_path):
    export.save_orbax(tiny_student, tmp_path / "damaged")
    for path in (tmp_path / "damaged" / "orbax").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            os.truncate(path, 100)
    out = tmp_path / "out"
    done = run("-m", "convert.from_hf", "--source", tmp_path / "damaged", "--out", out)
    assert done.returncode == 2
    (error,) = errors(done)
    assert f"{tmp_path / 'damaged' / 'orbax'}: cannot be read" in error
    assert not out.exists()


@pytest.fixture
def run_of(tmp_path):
    """Returns a function that writes a run's workdir, as the trainer does, with steps 3 and 5."""

    def write(source, **options):
        workdir = tmp_path / "run"
        config = make_config(source, workdir=workdir, **options)
        models, arch = load(config)
        hashes = {"student.path": weights_folder.fingerprint(source)}
        resume.write_record(config, workdir, hashes, num_steps=1)
        arrays = {}
        with checkpoints.open_checkpointer(workdir, 2) as checkpointer:
            for step in (3, 5):
                arrays[step] = trained(models, 0.02 * step)
                student = {n: jnp.asarray(x) for n, x in arrays[step].items()}
                state = TrainState({"student": student}, (), jnp.int32(step))
                checkpoints.save(checkpointer, state, step, None)
        return workdir, models, arch, arrays

    return write


@pytest.mark.parametrize("step", [None, 3])
@pytest.mark.parametrize(
    "trainable, kind", [("lora", "merged"), ("lora", "adapter"), ("full", "merged")]
)
def test_a_runs_student_is_exported_by_the_command(
    trainable, kind, step, tiny_student, run_of, tmp_path, capsys
):
    workdir, models, _, arrays = run_of(tiny_student, trainable=trainable)
    argv = ["--workdir", str(workdir), "--out", str(tmp_path / "out"), "--format", kind]
    argv += [] if step is None else ["--step", str(step)]
    assert run_command(to_hf.main, argv) == 0
    assert f"step {step or 5} of" in capsys.readouterr().out
    if kind == "adapter":
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(auto_model(tiny_student), tmp_path / "out")
    else:
        theirs = auto_model(tmp_path / "out")
        copied = {path.name for path in (tmp_path / "out").iterdir()}
        assert copied == {path.name for path in tiny_student.iterdir()}
    assert_same_logits(our_logits(models, arrays[step or 5]), torch_logits(theirs))


def owner(array):
    """Returns the array whose memory a view shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize(
    "trainable, form, limit",
    # Arrays in memory while another is read: none, factor A, the source's.
    [("full", "hugging face", 0), ("lora", "hugging face", 1), ("lora", "orbax", 2)],
)
def test_an_export_reads_one_array_at_a_time_and_drops_it(
    trainable, form, limit, tiny_student, run_of, tmp_path, monkeypatch
):
    place = tiny_student
    if form == "orbax":
        place = tmp_path / "orbax"
        export.save_orbax(tiny_student, place)
    workdir, _, arch, arrays = run_of(place, trainable=trainable)
    plain, read, alive, counts = OrbaxArrays.load, [], [], []

    def load(self, abstract):
        (path,) = abstract
        counts.append(sum(reference() is not None for reference in alive))
        found = plain(self, abstract)
        read.append(path)
        alive.append(weakref.ref(owner(found[path])))
        return found

    monkeypatch.setattr(OrbaxArrays, "load", load)
    argv = ["--workdir", str(workdir), "--out", str(tmp_path / "out")]
    assert run_command(to_hf.main, argv) == 0
    own = weights(arch).keys() if form == "orbax" else set()
    assert sorted(read) == sorted([*arrays[5], *own])
    assert max(counts) == limit


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_trained_arrays_are_read_straight_into_shards(trainable, tiny_student, run_of):
    workdir, models, _, arrays = run_of(tiny_student, trainable=trainable)
    found = checkpoints.open_trained(workdir, 3)
    assert found.step == 3 and found.shapes == {n: x.shape for n, x in arrays[3].items()}
    some = list(found.shapes)[1::2]
    abstract = {
        name: jax.ShapeDtypeStruct(
            found.shapes[name], "bfloat16", sharding=models.trainable["student"][name].sharding
        )
        for name in some
    }
    loaded = found.load(abstract)
    assert loaded.keys() == set(some) and found.load({}) == {}
    for name, array in loaded.items():
        assert array.sharding == abstract[name].sharding
        np.testing.assert_array_equal(array, arrays[3][name].astype(jnp.bfloat16))
        np.testing.assert_array_equal(found.read(name), arrays[3][name])
    latest = checkpoints.open_trained(workdir)
    assert latest.step == 5 and latest.shapes.keys() == arrays[5].keys()


@pytest.fixture
def source(tmp_path):
    """A model written without torch."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = tiny.random_tensors(CONFIG)
    save_file(tensors, folder / "model.safetensors")
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    return folder


def test_an_export_keeps_the_configuration_and_the_tokenizer(source, tmp_path):
    (source / "README.md").write_text("not the model's")
    config = make_config(source)
    table = adapter_weights(LORA, weights_folder.load_architecture(source))
    arrays = {path: np.zeros(weight.shape, np.float32) for path, weight in table.items()}
    export.export_merged(source, config, InMemory(arrays), tmp_path / "out")
    names = {path.name for path in source.iterdir()} - {"README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert stored_bytes(tmp_path / "out") == stored_bytes(source)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("layers.self_attn.q_proj.lora_A", (2, 4, 64)),
        ("layers.self_attn.q_proj.lora_B", (3, 32, 4)),
        ("layers.self_attn.qkv.lora_A", (3, 4, 64)),
        ("layers.mlp.up_proj.weight", (3, 64, 96)),
        ("lm_head.weight", (320, 64)),
    ],
)
def test_trained_arrays_of_another_model_are_refused_by_name(name, shape, source, tmp_path):
    arch = weights_folder.load_architecture(source)
    shapes = {path: weight.shape for path, weight in adapter_weights(LORA, arch).items()}
    arrays = {path: np.ones(shape, np.float32) for path, shape in {**shapes, name: shape}.items()}
    for write in (export.export_merged, export.export_adapter):
        with pytest.raises(UserError, match=f"config.json:\n  (misshapen|unexpected): {name}"):
            write(source, make_config(source), InMemory(arrays), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_checkpoint_without_a_trained_array_is_refused_by_name(trainable, source, tmp_path):
    config = make_config(source, trainable=trainable)
    table = trained_weights(config, weights_folder.load_architecture(source))
    arrays = {path: np.zeros(weight.shape, np.float32) for path, weight in table.items()}
    path, _ = arrays.popitem()
    with pytest.raises(UserError, match=f"config.json:\n  missing: {path}"):
        export.export_merged(source, config, InMemory(arrays), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with export.new_folder(out) as folder:
        (folder / "file").write_text("text")
        assert not out.exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    with pytest.raises(UserError, match="--out: expected a folder that is not there yet"):
        export.new_folder(out).__enter__()
    assert (out / "file").read_text() == "text"

    for error in (RuntimeError("ours"), KeyboardInterrupt(), UserError("theirs")):
        with pytest.raises(type(error)), export.new_folder(tmp_path / "new" / "out") as folder:
            (folder / "file").write_text("text")
            raise error
    full = OSError(errno.ENOSPC, "No space left on device")
    message = r"--out: .*new cannot be written.*No space left"
    with pytest.raises(UserError, match=message), export.new_folder(tmp_path / "new"):
        raise full
    with (
        pytest.raises(UserError, match=r"cannot be written"),
        export.new_folder(out / "file" / "new"),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("command", ["convert.from_hf", "convert.to_hf"])
def test_a_disk_that_fills_up_gives_one_message_and_no_folder(
    command, source, tmp_path, tiny_student, run_of
):
    out = tmp_path / "exports" / "out"
    argv = ["--source", str(source)]
    if command == "convert.to_hf":
        argv = ["--workdir", str(run_of(tiny_student)[0])]
    # Files are limited to 50 kB: the write fails midway, as on a full disk.
    done = run("-c", LIMITED, 50_000, command, *argv, "--out", out)
    assert done.returncode == 2, done.stderr
    (error,) = errors(done)
    assert f"{out} cannot be written" in error and "File too large" in error
    assert "Traceback" not in done.stderr
    assert not out.parent.exists()


@pytest.mark.parametrize(
    "main, argv, message",
    [
        (from_hf.main, ["--source", "./absent", "--out", "new"], "--source: expected a folder"),
        (from_hf.main, ["--source", "{source}", "--out", "{source}"], "not there yet, got"),
        (from_hf.main, ["--source", "{source}", "--outt", "new"], "--outt"),
        (to_hf.main, ["--workdir", "{source}", "--out", "new"], "source/config.json: not written"),
        (
            to_hf.main,
            ["--workdir", "./absent", "--out", "new"],
            "expected a workdir of kd_jax.train",
        ),
    ],
)
def test_a_mistake_is_one_message_and_status_2(main, argv, message, source, capsys):
    assert run_command(main, [word.format(source=source) for word in argv]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out and "Traceback" not in printed.err
    assert printed.err.startswith("error: ")


def test_a_run_that_trained_whole_weights_has_no_adapter(tiny_student, run_of, tmp_path, capsys):
    workdir, *_ = run_of(tiny_student, trainable="full")
    argv = ["--workdir", str(workdir), "--out", str(tmp_path / "out"), "--format", "adapter"]
    assert run_command(to_hf.main, argv) == 2
    assert "--format: expected merged" in capsys.readouterr().err
    argv = ["--workdir", str(workdir), "--out", str(tmp_path / "out"), "--step", "4"]
    assert run_command(to_hf.main, argv) == 2
    assert "--step: expected one of 3, 5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
