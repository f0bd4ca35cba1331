"""Hugging Face folders: what fits arrives bit for bit, what does not is refused by name."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys

import huggingface_hub.constants
import jax
import numpy as np
import pytest
import tiny
from children import environment
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kd_jax.config import MeshConfig, UserError
from kd_jax.models.architecture import FAMILIES, read_architecture
from kd_jax.models.weight_table import abstract_weights, hf_names, weights
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.weights import export, safetensors
from kd_jax.weights import folder as weights_folder
from kd_jax.weights import load as weights_load

pytestmark = pytest.mark.devices(8)

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "data fsdp tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}
CONFIG = tiny.make_config()
UP_PROJ = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def load(folder, dtype="float32", mesh="data", **options):
    """Loads a whole model; `dtype` None keeps the stored ones."""
    arch = weights_folder.load_architecture(folder)
    dtype = weights_load.stored_dtypes(folder, arch) if dtype is None else dtype
    abstract = abstract_weights(weights(arch), Layout(make_mesh(MESHES[mesh], 8)), dtype)
    return weights_load.load_arrays(folder, arch, abstract, **options)


@pytest.fixture
def folder(tmp_path):
    """A whole model in one file, written without torch, for a test to spoil."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tiny.random_tensors(CONFIG), tmp_path / "model.safetensors")
    return tmp_path


def shard(folder):
    """Splits the folder's file into two with an index, whose content it returns."""
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"{'b' if name == UP_PROJ else 'a'}.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: x for name, x in tensors.items() if files[name] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": files}
    (folder / safetensors.INDEX).write_text(json.dumps(index))
    return index


def edit(folder, change):
    """Rewrites the folder's file with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def bits(x):
    x = np.ascontiguousarray(x)
    return x.view(f"u{x.itemsize}")


@pytest.mark.parametrize(
    "family, dtype, tied, max_shard_size, mesh",
    [
        ("llama", "float32", True, "50GB", "data fsdp tensor"),
        ("mistral", "float16", True, "50KB", "data"),
        ("qwen2", "float32", False, "50KB", "data fsdp tensor"),
        ("qwen3", "bfloat16", False, "50KB", "fsdp"),
    ],
)
def test_every_bit_that_transformers_wrote_arrives(
    family, dtype, tied, max_shard_size, mesh, tmp_path, monkeypatch
):
    import torch

    theirs = tiny.make_torch_model(family, tie_word_embeddings=tied).to(getattr(torch, dtype))
    integer = torch.int32 if dtype == "float32" else torch.int16
    limits = torch.iinfo(integer)
    for weight in theirs.parameters():  # any bits: infinities, denormals, NaNs, negative zeros
        raw = torch.randint(limits.min, limits.max, weight.shape, dtype=integer)
        weight.data = raw.view(weight.dtype)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / safetensors.INDEX).is_file() == (max_shard_size == "50KB")

    monkeypatch.setattr(weights_load, "BLOCK_BYTES", 1000)  # several blocks in each tensor
    arrays = load(tmp_path, dtype, mesh)
    arch = weights_folder.load_architecture(tmp_path)
    state = theirs.state_dict()
    assert arrays.keys() == weights(arch).keys()
    for path, array in arrays.items():
        stored = [state[name].view(integer).numpy() for name in hf_names(path, arch)]
        weight = weights(arch)[path]
        want = np.stack(stored) if weight.is_stacked else stored[0]
        assert array.dtype == dtype and array.shape == want.shape
        assert array.sharding == Layout(make_mesh(MESHES[mesh], 8)).sharding(
            weight.dims, want.shape
        )
        for part in array.addressable_shards:
            np.testing.assert_array_equal(
                bits(part.data), bits(want[part.index]), err_msg=f"{path} {part.index}"
            )


def test_a_program_writes_in_place_of_donated_arrays_alone(folder):
    arch, one = (
        weights_folder.load_architecture(folder),
        Layout(make_mesh(MeshConfig(), 1, jax.devices()[:1])),
    )
    abstract = abstract_weights(weights(arch), one, "float32")
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    for donated in (True, False):  # an array that is not shares its memory with NumPy's
        arrays = weights_load.load_arrays(folder, arch, abstract, donated=donated)
        before = {name: x.unsafe_buffer_pointer() for name, x in arrays.items()}
        after = {name: step(x).unsafe_buffer_pointer() for name, x in arrays.items()}
        assert all((after[name] == place) == donated for name, place in before.items())


def count_reads(monkeypatch):
    """Returns a list that gathers file, offset and length of every read of a tensor."""
    reads, plain = [], safetensors.Tensor.read_rows

    def counted(self, out, start):
        reads.append((self.file.name, self.offset + start * self.row_bytes, out.nbytes))
        plain(self, out, start)

    monkeypatch.setattr(safetensors.Tensor, "read_rows", counted)
    return reads


@pytest.mark.parametrize("mesh", MESHES)
def test_every_byte_is_read_once_however_many_devices_want_it(mesh, folder, monkeypatch):
    reads = count_reads(monkeypatch)
    monkeypatch.setattr(weights_load, "BLOCK_BYTES", 1000)
    load(folder, mesh=mesh)
    file = folder / "model.safetensors"
    end = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    for _, offset, length in sorted(reads):
        assert offset == end
        end = offset + length
    assert end == file.stat().st_size


def test_only_the_arrays_asked_for_are_read(folder, monkeypatch):
    whole = load(folder, mesh="fsdp")
    reads = count_reads(monkeypatch)
    arch = weights_folder.load_architecture(folder)
    layout = Layout(make_mesh(MESHES["fsdp"], 8))
    names = ("layers.mlp.up_proj.weight", "norm.weight")
    table = {path: weights(arch)[path] for path in names}
    dtypes = dict(zip(names, ("bfloat16", "float32"), strict=True))
    abstract = abstract_weights(table, layout, dtypes)
    arrays = weights_load.load_arrays(folder, arch, abstract)
    assert {path: x.dtype.name for path, x in arrays.items()} == dtypes
    for path, array in arrays.items():
        assert array.sharding == abstract[path].sharding
        np.testing.assert_array_equal(array, whole[path].astype(dtypes[path]))
    assert sum(length for *_, length in reads) == sum(whole[path].nbytes for path in names)
    assert weights_load.load_arrays(folder, arch, {}) == {}


PROCESS = """
import sys, jax, numpy as np
from pathlib import Path
from safetensors.numpy import load_file
from kd_jax.config import MeshConfig
from kd_jax.models.weight_table import abstract_weights, hf_names, weights
from kd_jax.parallel.mesh import Layout, make_mesh
from kd_jax.weights.folder import load_architecture
from kd_jax.weights.load import load_arrays
from kd_jax.weights.safetensors import Tensor
folder, port, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, number)
count, plain = 0, Tensor.read_rows
def counted(self, out, start):
    global count
    count += out.nbytes
    plain(self, out, start)
Tensor.read_rows = counted
arch = load_architecture(folder)
layout = Layout(make_mesh(MeshConfig(data=1, fsdp=2, tensor=4), 8))
arrays = load_arrays(folder, arch, abstract_weights(weights(arch), layout, "float32"))
stored = load_file(folder / "model.safetensors")
for path, array in arrays.items():
    want = np.stack([stored[name] for name in hf_names(path, arch)])
    want = want if weights(arch)[path].is_stacked else want[0]
    for part in array.addressable_shards:
        np.testing.assert_array_equal(part.data, want[part.index])
print(count)
"""


def test_each_of_two_processes_reads_only_its_rows(folder):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, folder, port, str(number)],
            env=environment(4),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    counts = [int(process.communicate(timeout=60)[0]) for process in running]
    # fsdp splits the rows of every matrix, over the processes; norms are replicated.
    tensors = tiny.random_tensors(CONFIG).values()
    wanted = sum(x.nbytes // x.ndim for x in tensors)
    assert counts == [wanted, wanted]


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_values_are_rounded_to_the_nearest_even(stored, folder):
    narrow = {name: x.astype(stored) for name, x in tiny.random_tensors(CONFIG).items()}
    save_file(narrow, folder / "model.safetensors")
    got = load(folder, "bfloat16")["embed_tokens.weight"]
    raw = narrow[EMBEDDING].astype(np.float32).view(np.uint32).astype(np.uint64)
    want = (raw + 0x7FFF + (raw >> 16 & 1)) >> 16  # the definition, in integers
    np.testing.assert_array_equal(bits(got), want)
    np.testing.assert_array_equal(load(folder)["embed_tokens.weight"], narrow[EMBEDDING])


def test_layers_of_several_dtypes_are_stacked_without_loss(folder):
    def mix(tensors):
        for layer, dtype in enumerate((np.float16, np.float32, np.float16)):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            tensors[name] = tensors[name].astype(dtype)

    edit(folder, mix)
    stored, arrays = load_file(folder / "model.safetensors"), load(folder, None)
    up_proj = arrays["layers.mlp.up_proj.weight"]
    assert up_proj.dtype == np.float32
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        np.testing.assert_array_equal(up_proj[layer], stored[name].astype(np.float32))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_name_table_is_transformers_own(tied, family):
    theirs = tiny.make_torch_model(family, tie_word_embeddings=tied)
    arch = read_architecture(theirs.config.to_dict(), "config")
    shapes = {name: tuple(x.shape) for name, x in theirs.named_parameters()}
    named = [
        (name, weight.layer_shape)
        for path, weight in weights(arch).items()
        for name in hf_names(path, arch)
    ]
    assert len(named) == len(shapes) and dict(named) == shapes


def test_all_tensors_that_do_not_fit_are_listed(folder):
    def spoil(tensors):
        del tensors[UP_PROJ], tensors["model.norm.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
        tensors[EMBEDDING] = tensors[EMBEDDING].T.copy()

    edit(folder, spoil)
    with pytest.raises(UserError) as error:
        weights_load.check_tensors(folder, weights_folder.load_architecture(folder))
    assert str(error.value).splitlines() == [
        f"{folder}: the tensors do not fit config.json:",
        f"  missing: {UP_PROJ} [96, 64]",
        "  missing: model.norm.weight [64]",
        "  unexpected: model.layers.1.self_attn.q_proj.bias [3]",
        "  unexpected: model.layers.3.mlp.up_proj.weight [2, 2]",
        f"  misshapen: {EMBEDDING}: expected [320, 64], got [64, 320]",
    ]


def test_a_bias_that_the_model_lacks_and_one_that_it_needs_are_named(folder):
    bias = "model.layers.1.self_attn.q_proj.bias"
    edit(folder, lambda tensors: tensors.update({bias: np.zeros(64, np.float32)}))
    (folder / "config.json").write_text(json.dumps(tiny.make_config("qwen2")))
    with pytest.raises(UserError) as error:
        load(folder)
    lines = str(error.value).splitlines()[1:]
    shapes = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    assert lines == [
        f"  missing: model.layers.{i}.self_attn.{name}.bias [{shapes[name]}]"
        for i in range(3)
        for name in ("k_proj", "q_proj", "v_proj")
        if (i, name) != (1, "q_proj")
    ]


def write_raw(text):
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(data)) + data
    )


def truncate(length):
    def spoil(folder):
        size = (folder / "model.safetensors").stat().st_size
        os.truncate(folder / "model.safetensors", length % size)

    return spoil


def set_dtype(dtype):
    return lambda folder: edit(folder, lambda t: t.update({UP_PROJ: t[UP_PROJ].astype(dtype)}))


def float8(folder):
    entry = {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}
    write_raw({UP_PROJ: entry})(folder)
    append(b"xx")(folder)


def lose_shard(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()


def edit_index(change):
    def spoil(folder):
        index = shard(folder)
        change(index)
        (folder / safetensors.INDEX).write_text(json.dumps(index))

    return spoil


def only(*names):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"bytes")

    return spoil


def append(data):
    def spoil(folder):
        with open(folder / WEIGHTS, "ab") as stream:
            stream.write(data)

    return spoil


def edit_header(change):
    def spoil(folder):
        raw = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return spoil


def overlap(header):
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo"]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def floats(header):
    header[UP_PROJ]["shape"] = [float(n) for n in header[UP_PROJ]["shape"]]


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def pipe(*names):
    def spoil(folder):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / names[-1])

    return spoil


def link_to_nothing(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../../blobs/0123")


WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2471645608\n"
BROKEN = {
    "truncated": (truncate(-10), WEIGHTS, "whole safetensors file"),
    "trailing bytes": (append(bytes(4096)), WEIGHTS, "whole safetensors file"),
    "overlap": (edit_header(overlap), WEIGHTS, "whole safetensors file"),
    "shape of floats": (edit_header(floats), WEIGHTS, "whole safetensors file"),
    "cut header": (truncate(100), WEIGHTS, "header"),
    "no header": (truncate(4), WEIGHTS, "whole safetensors file"),
    "empty": (truncate(0), WEIGHTS, "whole safetensors file"),
    "garbage header": (write_raw(b"\xff{garbage"), WEIGHTS, "whole safetensors file"),
    "header of another shape": (write_raw([1, 2]), WEIGHTS, "whole safetensors file"),
    "entry of another shape": (write_raw({"a": 3}), WEIGHTS, "whole safetensors file"),
    "deep header": (write_raw(b"[" * 10**5), WEIGHTS, "whole safetensors file"),
    "negative offsets": (
        write_raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}),
        WEIGHTS,
        "whole safetensors file",
    ),
    "float8": (float8, WEIGHTS, f"expected dtypes F32, F16, BF16, got {UP_PROJ} (F8_E4M3)"),
    "int8": (set_dtype(np.int8), WEIGHTS, f"expected dtypes F32, F16, BF16, got {UP_PROJ} (I8)"),
    "absent shard": (lose_shard, safetensors.INDEX, "files that are not there: b.safetensors"),
    "tensor in no file": (
        edit_index(lambda index: index["weight_map"].update(extra="a.safetensors")),
        safetensors.INDEX,
        "names tensors that their files do not have: extra (a.safetensors)",
    ),
    "tensor in another file": (
        edit_index(lambda index: index["weight_map"].update({UP_PROJ: "a.safetensors"})),
        safetensors.INDEX,
        f"names tensors that their files do not have: {UP_PROJ} (a.safetensors)",
    ),
    "index without a map": (
        edit_index(lambda index: index.pop("weight_map")),
        safetensors.INDEX,
        "expected weight_map to give each tensor's file",
    ),
    "index to outside": (
        edit_index(lambda index: index["weight_map"].update(extra="../../etc/passwd")),
        safetensors.INDEX,
        "expected files of this folder, got ../../etc/passwd",
    ),
    "index with a long name": (
        edit_index(lambda index: index["weight_map"].update(extra="x" * 300)),
        safetensors.INDEX,
        "names files that are not there: xxx",
    ),
    "pointer": (write(WEIGHTS, POINTER), WEIGHTS, "got a Git LFS pointer"),
    "pointer of a shard": (
        lambda folder: (shard(folder), (folder / "b.safetensors").write_text(POINTER)),
        "b.safetensors",
        "got a Git LFS pointer",
    ),
    "pointer as config": (write("config.json", POINTER), "config.json", "got a Git LFS pointer"),
    "pipe": (pipe(WEIGHTS), WEIGHTS, "got a pipe (FIFO)"),
    "pipe as config": (pipe("config.json"), "config.json", "got a pipe (FIFO)"),
    "pipe as index": (pipe(WEIGHTS, safetensors.INDEX), safetensors.INDEX, "got a pipe (FIFO)"),
    "link to nothing": (link_to_nothing, WEIGHTS, "which is not there. Download the folder again"),
    "gguf": (only("model-q4.gguf"), "", "got GGUF files"),
    "adapter": (only("adapter_config.json"), "", "got a PEFT adapter"),
    "pickle": (only("pytorch_model.bin"), "", "got pickled weights (pytorch_model.bin)"),
    "no weights": (only(), "", "expected model.safetensors or model.safetensors.index.json"),
    "shards without an index": (
        only("model-00001-of-00002.safetensors"),
        "",
        "got config.json, model-00001-of-00002.safetensors",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "config.json",
        "expected a model's config.json, got model.safetensors",
    ),
    "config a folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        "config.json",
        "expected a JSON file, got a folder",
    ),
    "config of a run": (
        write("config.json", json.dumps({"config": {}, "inputs": {}, "versions": {}})),
        "config.json",
        "got the workdir of a run. Export its student with python -m convert.to_hf",
    ),
    "config not JSON": (
        lambda folder: (folder / "config.json").write_text("{'a': 1}"),
        "config.json",
        "expected JSON",
    ),
    "config not UTF-8": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        "config.json",
        "expected JSON",
    ),
    "config a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json",
        "expected a JSON object, got list",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_with_path_and_expectation(case, folder):
    spoil, place, message = BROKEN[case]
    load(folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(error.value).startswith(f"{folder / place}: ")
    assert message in str(error.value)


def test_a_file_that_shrinks_after_the_check_is_refused(folder):
    tensors = safetensors.open_folder(folder)
    os.truncate(folder / "model.safetensors", 10_000)
    with pytest.raises(UserError, match="ended early"):
        tensors[UP_PROJ].read()


@pytest.mark.parametrize("case", ["equal", "other dtype", "differs", "misshapen", "not a number"])
def test_a_tied_head_may_be_stored_when_it_repeats_the_embedding(case, folder):
    def add_head(tensors):
        head = tensors[EMBEDDING].astype(np.float16).astype(np.float32)
        if case == "not a number":
            head[0, 0] = np.nan
        tensors[EMBEDDING] = head.copy()
        if case == "other dtype":
            head = head.astype(np.float16)
        if case == "differs":
            head[-1, -1] += 1
        tensors["lm_head.weight"] = head[1:] if case == "misshapen" else head
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    edit(folder, add_head)
    if case in ("differs", "misshapen"):
        with pytest.raises(UserError, match=r"lm_head.weight differs .* tie_word_embeddings"):
            load(folder)
    else:
        assert "lm_head.weight" not in load(folder)


def test_a_tied_model_may_store_the_head_alone(folder, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    want = load(folder)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(EMBEDDING)}))
    got = load(folder)
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path])
    theirs = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    np.testing.assert_array_equal(got["embed_tokens.weight"], theirs.detach().numpy())


def test_an_untied_model_without_a_head_is_told_how_to_tie_it(folder):
    (folder / "config.json").write_text(json.dumps(tiny.make_config(tie_word_embeddings=False)))
    with pytest.raises(UserError, match=r"missing: lm_head.weight, .* tie_word_embeddings to true"):
        load(folder)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"language_model.{name}",
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.", "model.language_model.", 1),
        lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp.", 1),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_names_that_wrappers_write_are_read_and_said(rename, tied, folder, capsys):
    config = tiny.make_config(tie_word_embeddings=tied)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = tiny.random_tensors(config)
    save_file(tensors, folder / WEIGHTS)
    want = load(folder)
    save_file({rename(name): x for name, x in tensors.items()}, folder / WEIGHTS)
    got = load(folder)
    assert capsys.readouterr().err == ""
    weights_load.check_tensors(folder, weights_folder.load_architecture(folder))
    assert len(capsys.readouterr().err.splitlines()) == 1
    for path in want:
        np.testing.assert_array_equal(got[path], want[path])


def test_a_wrapped_name_beside_the_plain_one_is_unexpected(folder):
    edit(folder, lambda tensors: tensors.update({f"_orig_mod.{UP_PROJ}": tensors[UP_PROJ] * 2}))
    with pytest.raises(UserError, match=f"unexpected: _orig_mod.{UP_PROJ}"):
        load(folder)


def test_one_file_comes_before_an_index_as_in_transformers(folder):
    tensors = tiny.random_tensors(CONFIG)
    shard(folder)
    save_file(tensors | {EMBEDDING: tensors[EMBEDDING] + 1}, folder / "model.safetensors")
    np.testing.assert_array_equal(load(folder)["embed_tokens.weight"], tensors[EMBEDDING] + 1)


def test_the_index_says_which_file_a_tensor_is_read_from(folder):
    tensors = load_file(folder / "model.safetensors")
    shard(folder)
    stale = load_file(folder / "b.safetensors") | {EMBEDDING: 0 * tensors[EMBEDDING]}
    save_file(stale, folder / "b.safetensors")
    np.testing.assert_array_equal(load(folder)["embed_tokens.weight"], tensors[EMBEDDING])


def test_the_fingerprint_is_that_of_the_content(folder, tmp_path_factory):
    before = weights_folder.fingerprint(folder)
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "model")
    (copy / "README.md").write_text("other words")
    assert weights_folder.fingerprint(copy) == before
    edit(folder, lambda tensors: tensors[EMBEDDING].__imul__(2))
    (copy / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-6}))
    assert len({before, weights_folder.fingerprint(folder), weights_folder.fingerprint(copy)}) == 3


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_local_cache(hub_cache, folder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = hub_cache / "models--some-org--some-name"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, snapshot / name)
    assert weights_folder.resolve("some-org/some-name", "student.path").samefile(snapshot)
    load(weights_folder.resolve("some-org/some-name", "student.path"))


def test_weights_are_fetched_once(folder, monkeypatch):
    """Some repositories have them in the maker's own form too."""
    wanted = ["config.json", "model.safetensors", "params.json", "tokenizer.json"]
    others = ["consolidated.safetensors", "original/params.json", "pytorch_model.bin"]
    fetched = []

    def fetch(path, **patterns):
        fetched.extend(huggingface_hub.utils.filter_repo_objects(wanted + others, **patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert weights_folder.resolve("some-org/some-name", "student.path") == folder
    assert fetched == wanted


@pytest.mark.parametrize(
    "path, message",
    [
        ("some-org/absent", "no local folder, and fetching it from the hub failed"),
        ("./absent/name", "expected a folder or a hub id"),
        ("~/absent", "expected a folder or a hub id"),
        ("/absent", "expected a folder or a hub id"),
        ("absent", "expected a folder or a hub id"),
        ("a/b/c", "expected a folder or a hub id"),
        (__file__, "which is a file. Give its folder"),
        ("x" * 5000, "expected a folder or a hub id"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path, message, hub_cache):
    with pytest.raises(UserError) as error:
        weights_folder.resolve(path, "student.path")
    assert str(error.value).startswith("student.path: ")
    assert path in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_what_is_saved_opens_in_safetensors_with_its_bits(max_shard_bytes, tmp_path):
    tensors = tiny.random_tensors(CONFIG)
    sizes = {name: x.nbytes for name, x in tensors.items()}
    export.save_model(tmp_path, sizes, tensors.__getitem__, max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (
        (len(files) > 1) == (max_shard_bytes == 60_000) == (tmp_path / safetensors.INDEX).is_file()
    )
    found = {}
    for path in files:
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: (path.name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == tensors.keys()
    for name, (_, value) in found.items():
        np.testing.assert_array_equal(bits(value), bits(tensors[name]))
    if len(files) > 1:
        index = json.loads((tmp_path / safetensors.INDEX).read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
        for path in files:
            held = [x.nbytes for file, x in found.values() if file == path.name]
            assert sum(held) <= max_shard_bytes or len(held) == 1
