"""The cost of a step estimated from shapes, against jax and XLA."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from paths import CONFIGS
from tiny import logits

from kd_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OnPolicyConfig,
    StudentConfig,
    TeacherConfig,
)
from kd_jax.config.command import load_config
from kd_jax.models.architecture import read_architecture
from kd_jax.models.decoder import Decoder
from kd_jax.models.known import KNOWN_MODELS
from kd_jax.models.weight_table import adapter_weights
from kd_jax.parallel.mesh import make_mesh
from kd_jax.parallel.platforms import PLATFORMS
from kd_jax.planning import cost, memory, network
from kd_jax.planning.chips import CHIPS, GIB, find_topology
from kd_jax.planning.mesh_choice import choose_sizes
from kd_jax.training.abstract import abstract_run

pytestmark = pytest.mark.devices(8)


def test_a_chunk_holds_about_the_tokens_asked_for():
    options = {"row": PLATFORMS["gpu"], "chip": CHIPS["h200"], "vocab_size": 128_256}
    for num_tokens, want in ((8192, 1000), (100, 100)):
        got = memory.chunk_tokens(1000, num_tokens=num_tokens, head_trainable=False, **options)
        assert got == want


@pytest.mark.parametrize(
    "chip, trained, most",
    [
        ("h200", False, 2**30), (None, False, 2**30), ("v5e", False, 2**29),
        ("h200", True, 2**31), (None, True, 2**30), ("v5e", True, 2**29),
    ],
)  # fmt: skip
def test_two_models_logits_of_a_chunk_fill_little_of_the_memory(chip, trained, most):
    for vocab_size in (32_000, 128_256, 152_064):
        tokens = memory.chunk_tokens(
            None, PLATFORMS["tpu"], CHIPS.get(chip), vocab_size, 10**6, head_trainable=trained
        )
        assert most / 2 < 2 * 4 * tokens * vocab_size <= most


def with_cache(config):
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, cache="c"))


def open_config(name, **changes):
    """Returns a configuration of this repository and its models' architectures.

    A name that ends in "cached" has a teacher from a cache, one that ends in "ema" the student's
    average with a prompt of its own.
    """
    name, _, kind = name.partition(" ")
    config = dataclasses.replace(load_config(CONFIGS / f"{name}.py"), **changes)
    if kind == "cached":
        config = with_cache(config)
    elif kind == "ema":
        teacher = TeacherConfig(kind="ema", system="Meow.", seq_len=3 * config.data.seq_len // 2)
        config = dataclasses.replace(config, teacher=teacher)
    parts = [config.student] + ([config.teacher_part] if config.teacher_part else [])
    archs = [read_architecture(KNOWN_MODELS[part.path], part.path) for part in parts]
    return config, archs[0], (archs[1] if config.teacher else None)


LAYOUTS = [
    (MeshConfig(data=8), {}),
    (MeshConfig(data=1, fsdp=8), {}),
    (MeshConfig(data=1, fsdp=1, tensor=8), {}),
    (MeshConfig(data=2, fsdp=2, tensor=2), {"shard_over": ("tensor",)}),
    (MeshConfig(data=2, fsdp=4, tensor=1), {"shard_over": ()}),
    (MeshConfig(data=2, fsdp=2, context=2), {}),
]


@pytest.mark.parametrize("mesh, student", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "name, trainable",
    [
        ("8b_to_1b", "lora"),
        ("8b_to_1b", "full"),
        ("8b_to_1b cached", "lora"),
        ("8b_to_1b ema", "full"),
        ("qwen2p5_7b_to_3b", "lora"),
        ("1b_sft", "full"),
    ],
)
def test_bytes_by_kind_are_those_of_the_runs_arrays(name, trainable, mesh, student):
    config, ours, theirs = open_config(name, trainable=trainable, mesh=mesh)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=8),
        student=dataclasses.replace(config.student, **student),
    )
    devices = make_mesh(mesh, 8)
    run = abstract_run(config, ours, theirs, devices)
    got = memory.estimate_memory(
        cost.Case(
            config=config,
            student=ours,
            teacher=theirs,
            sizes=devices.shape,
            topology=find_topology("cpu:8"),
        )
    ).arguments

    def on_one_device(tree):
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim]  # but scalars
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    assert got["teacher"] == on_one_device(run.models.teacher_arrays)
    assert got["student"] == on_one_device(run.models.frozen)
    assert got["trainable"] == on_one_device(run.models.trainable)
    assert got["optimizer"] == on_one_device(run.state.opt_state)
    assert got["batch"] == on_one_device(run.batch)


def test_a_cached_teacher_costs_its_head_alone():
    config, *archs = open_config("8b_to_1b")
    live, cached = (
        cost.step_flops(one, *archs, 1000, 500)[0] for one in (config, with_cache(config))
    )
    layers = sum(cost.layer_flops(archs[1], config.data.seq_len))
    assert live - cached == pytest.approx(1000 * layers) and layers > 1e10


def test_what_a_run_needs_beside_its_steps_is_counted():
    config, *archs = open_config("8b_to_1b", remat="layer")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8))
    cached = with_cache(config)
    filling = dataclasses.replace(cached.teacher, cache_missing="compute")
    topology, sizes = find_topology("v5e:2x4"), {"data": 8, "fsdp": 1, "tensor": 1}

    def peak(config):
        case = cost.Case(
            config=config, student=archs[0], teacher=archs[1], sizes=sizes, topology=topology
        )
        found = memory.estimate_memory(case)
        return sum(found.arguments.values()) + found.temporaries, found.arguments["teacher"]

    whole, computed = peak(config)[1], dataclasses.replace(cached, teacher=filling)
    assert peak(cached)[0] < whole / 2 and whole < peak(computed)[0] < 1.1 * whole
    assert choose_sizes(cached, *archs, topology) == sizes
    assert choose_sizes(computed, *archs, topology)["data"] < 8
    asked = dataclasses.replace(cached, eval=EvalConfig(path="d", accuracy=10**6))
    assert peak(asked)[0] > peak(cached)[0] + memory.CACHE_SHARE * topology.memory_limit / 2


def test_a_teacher_with_longer_rows_does_more_and_own_weights_cost_nothing():
    config, *archs = open_config("8b_to_1b ema")
    short = dataclasses.replace(config, teacher=TeacherConfig(kind="ema"))
    prompted, plain = (cost.step_flops(x, *archs, 1000, 500)[0] for x in (config, short))
    S, arch = config.data.seq_len, archs[1]
    more = 1500 * sum(cost.layer_flops(arch, 3 * S // 2)) - 1000 * sum(cost.layer_flops(arch, S))
    assert prompted - plain == pytest.approx(more) and more > 1e11


def tiny_case(trainable="lora"):
    """Returns a run of one row, and architectures whose products XLA can be asked to count."""
    config = Config(
        workdir="unused",
        teacher=TeacherConfig(path="unused", dtype="float32"),
        student=StudentConfig(path="unused", dtype="float32"),
        data=DataConfig(path="unused", seq_len=64, batch_size=1),
        trainable=trainable,
        lora=LoraConfig(rank=8),
        loss=LossConfig(chunk_tokens=64),
        remat="none",
        steps=1,
    )
    wide = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 2048}
    student, teacher = (
        read_architecture(tiny.make_config(num_hidden_layers=1, **wide | more), "tiny")
        for more in ({}, {"hidden_size": 768})
    )
    return config, student, teacher


def test_a_models_flops_are_what_xla_counts():
    """One layer, since XLA counts a scan's body once.

    XLA also counts the upper half of attention and elementwise operations, which are small
    compared with wide weights."""
    config, student, _ = tiny_case()
    run = abstract_run(config, student, None, make_mesh(MeshConfig(), 1, jax.devices()[:1]))
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def forward(arrays, ids):
        return logits(Decoder(run.program.student, arrays), ids, ids, ids)

    arrays = run.models.frozen | run.models.trainable["student"]
    counted = jax.jit(forward).lower(arrays, ids).compile().cost_analysis()["flops"]
    head = 2.0 * student.vocab_size * student.hidden_size
    adapters = 2.0 * cost.count(adapter_weights(config.lora, student))
    want = 64 * (sum(cost.layer_flops(student, 64)) + adapters + head)
    assert counted == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_steps_flops_are_what_xla_counts(trainable):
    config, student, teacher = tiny_case(trainable)
    run = abstract_run(config, student, teacher, make_mesh(MeshConfig(), 1, jax.devices()[:1]))
    counted = run.trace().lower().compile().cost_analysis()["flops"]
    needed, again = cost.step_flops(config, student, teacher, 64, 64)
    assert again == 0
    assert counted == pytest.approx(needed, rel=0.1)


def test_remat_adds_a_forward_pass_of_the_student():
    config, student, teacher = open_config("8b_to_1b", remat="layer")
    tokens = config.data.batch_size * config.data.seq_len
    needed, again = cost.step_flops(config, student, teacher, tokens, tokens)
    assert needed / tokens == pytest.approx(21e9, rel=0.03)  # the cost model of the records
    products = sum(cost.layer_flops(student, config.data.seq_len))
    adapters = 2 * cost.count(adapter_weights(config.lora, student))
    assert again == tokens * (products + adapters)


def test_the_rank_of_adapters_counts_only_where_they_are_trained():
    def traffic(trainable, rank):
        changes = {"trainable": trainable, "remat": "dots", "lora": LoraConfig(rank=rank)}
        config, student, teacher = open_config("8b_to_1b", **changes)
        sizes, topology = {"data": 1, "fsdp": 1, "tensor": 1}, find_topology("h100:1x1")
        case = cost.Case(
            config=config, student=student, teacher=teacher, sizes=sizes, topology=topology
        )
        return cost.work(case).traffic_bytes

    assert traffic("full", 8) == traffic("full", 64)
    assert traffic("lora", 8) < traffic("lora", 64)


def test_a_collectives_least_time_is_its_slowest_links():
    two_hosts = find_topology("h200:2x4")
    chip, size = two_hosts.chip, 8 * 10**9
    every = network.Transfer("all-gather", size, 1, network._groups({"a": 8}, ("a",)))
    near = network.Transfer("all-gather", size, 2, network._groups({"b": 2, "a": 4}, ("a",)))
    far = network.Transfer("all-reduce", size, 1, network._groups({"b": 2, "a": 4}, ("b",)))
    assert near.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert far.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    seconds = [network.network_seconds([x], two_hosts) for x in (every, near, far)]
    # Half of what is gathered comes from the other host, over four network adapters.
    assert seconds[0] == pytest.approx(size / 2 / 4 / chip.network_bandwidth)
    assert seconds[1] == pytest.approx(2 * size * 3 / 4 / chip.link_bandwidth)
    assert seconds[2] == pytest.approx(2 * size / 2 / chip.network_bandwidth)


def test_split_rows_send_keys_and_divide_activations():
    """Twin of each: with whole rows nothing is gathered but weights."""
    config, *archs = open_config("8b_to_1b", remat="dots")
    data = dataclasses.replace(config.data, batch_size=8)
    config = dataclasses.replace(config, data=data)

    def case(**sizes):
        sizes = {"data": 8, "fsdp": 1, "tensor": 1, **sizes}
        student, teacher = archs
        topology = find_topology("h100:1x8")
        return cost.Case(
            config=config, student=student, teacher=teacher, sizes=sizes, topology=topology
        )

    whole, parts = case(), case(data=2, context=4)
    keys = 4 * 2048 * 8 * 64 * 2, 4 * 2048 * 8 * 128 * 2  # [4, 2048, 8, H] bfloat16 in each group
    found = {(x.kind, x.num_bytes, x.times) for x in network.transfers(parts)}
    assert {("all-gather", keys[0], 64), ("all-gather", keys[1], 64)} <= found
    assert ("reduce-scatter", keys[0], 32) in found
    assert {x.kind for x in network.transfers(whole)} == {"all-reduce"}
    (all_reduced,) = (x for x in network.transfers(parts) if x.kind == "all-reduce")
    assert all_reduced.groups.shape == (1, 8)  # a weight's gradient is of all tokens
    same = [cost.make_shares(x)[0].residuals("dots") for x in (whole, parts)]
    assert same[0] == same[1]  # a quarter of four times as many rows
    assert cost.work(whole).awaited_flops == 0
    attention = cost.attention_flops(config, *archs, parts.num_tokens)
    assert cost.work(parts).awaited_flops == 0.75 * attention


def test_a_drawing_of_samples_has_room_for_keys_values_and_a_copy_of_the_student():
    config = load_config(CONFIGS / "8b_to_1b.py")
    config = dataclasses.replace(config, on_policy=OnPolicyConfig(fraction=0.5))
    arch = read_architecture(KNOWN_MODELS["meta-llama/Llama-3.2-1B-Instruct"], "1b")
    case = cost.Case(
        config=config,
        student=arch,
        teacher=arch,
        sizes={"data": 1, "fsdp": 1, "tensor": 1},
        topology=find_topology("h200:1x1"),
    )
    rows = config.data.batch_size // 2
    slots = rows * 2048 // (2 * 256)  # prompts as long as answers
    cache = 2 * 16 * slots * 2048 * 8 * 64 * 2  # keys and values of 16 layers, bfloat16
    assert memory.sampling_bytes(case, cost.make_shares(case)[0]) == cache + 1_235_814_400 * 2


@pytest.mark.parametrize(
    "kernel, rows, remat, context, compiled",
    [
        ("auto", 1, "dots", 1, 46.27),
        ("auto", 4, "layer", 1, 43.36),
        ("auto", 1, "dots", 4, 25.58),
        ("auto", 1, "dots", 8, 22.37),
        ("cudnn", 1, "dots", 1, 49.85),
        ("cudnn", 4, "layer", 1, 51.36),
    ],
)
def test_long_rows_on_a_gpu_are_estimated_with_their_mask(kernel, rows, remat, context, compiled):
    """Compiled: kd_jax.plan --topology h100:1x1 or 1x8, GiB (docs/benchmarks.md)."""
    config, *archs = open_config("8b_to_1b", remat=remat, attention=kernel)
    data = dataclasses.replace(config.data, batch_size=rows, seq_len=32768)
    case = cost.Case(
        config=dataclasses.replace(config, data=data),
        student=archs[0],
        teacher=archs[1],
        sizes={"data": 1, "fsdp": 1, "context": context, "tensor": 1},
        topology=find_topology("h100:1x1"),
    )
    found = memory.estimate_memory(case)
    total = (sum(found.arguments.values()) + found.temporaries) / GIB
    assert compiled <= total < 1.08 * compiled
