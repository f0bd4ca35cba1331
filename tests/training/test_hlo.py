"""Analysis of compiled programs with known answers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kd_jax
from kd_jax.config import MeshConfig
from kd_jax.models.embedding import _sum_by_token
from kd_jax.parallel.mesh import make_mesh
from kd_jax.training import hlo

pytestmark = [pytest.mark.fast, pytest.mark.devices(8)]

PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]
HALVES = [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    "text, want",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true", PAIRS),
        ("replica_groups=[4,2]<=[8], to_apply=%add", PAIRS),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", HALVES),
        ("replica_groups=mesh['x'=1,'y'=4,'z'=2] {'y'}, dimensions={0}", HALVES),
        (
            "replica_groups=mesh['x'=8,'y'=1], device_ids=([4,2]T(1,0)) {'x'}",
            [[*HALVES[0], *HALVES[1]]],
        ),
        ("source_target_pairs={{0,1},{1,0}}, channel_id=3", [[0, 1], [1, 0]]),
    ],
)
def test_the_devices_of_a_collective_are_read_in_every_form(text, want):
    assert hlo.device_groups(f"%x = f32[8] all-gather(%y), {text}").tolist() == want


@pytest.mark.parametrize(
    "shape, want", [("bf16[8,2048]", 32768), ("f32[]", 4), ("pred[10]", 10), ("s4[6]", 3)]
)
def test_bytes_follow_shape_and_dtype(shape, want):
    assert hlo.shape_bytes(shape) == want


def compiled(length):
    """Returns a program of a loop that gathers a weight and sums its product each time."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), 8)
    split, whole = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P())

    def run(x, weights, count):
        def body(i, x):
            w = jax.lax.with_sharding_constraint(weights[i % 4], whole)
            return jnp.tanh(x @ w)

        return jax.lax.fori_loop(0, count if length is None else length, body, x)

    weights = jax.device_put(jnp.ones((4, 64, 64)), split)
    x = jax.device_put(jnp.ones((8, 64)), whole)
    text = jax.jit(run).lower(x, weights, jnp.int32(3)).compile().as_text()
    return hlo.read_module(text)


@pytest.mark.parametrize("length, times", [(5, 5), (None, 7)])
def test_a_collective_in_a_loop_counts_each_time(length, times):
    program = compiled(length)
    gathers = [x for x in hlo.collectives(program, loop_trips=7) if x.loops]
    [one] = gathers or [None]
    assert one is not None and one.transfer.kind == "all-gather"
    assert one.transfer.times == times
    assert one.transfer.num_bytes == 64 * 64 * 4
    assert one.transfer.groups.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_the_largest_arrays_are_named_but_not_what_is_inside_fusions():
    def run(x):
        return jnp.sum(jnp.sort(jnp.exp(x[:, None] * x[None]), axis=0) ** 2)

    program = hlo.read_module(jax.jit(run).lower(jnp.ones(512)).compile().as_text())
    largest = hlo.largest_arrays(program, 3)
    assert largest[0].num_bytes == 512 * 512 * 4 and largest[0].shape == "f32[512,512]"
    assert len(largest) <= 3


def test_an_asynchronous_instruction_makes_its_output_and_not_its_inputs():
    lines = [
        "%inner (p: f32[32,64]) -> f32[1,64] {",
        "  %p = f32[32,64]{1,0} parameter(0)",
        "  %n = f32[32,64]{1,0} negate(%p)",
        "  ROOT %r = f32[1,64]{1,0} slice(%n), slice={[0:1], [0:64]}",
        "}",
        "ENTRY %main (x: f32[32,64]) -> f32[1,64] {",
        "  %x = f32[32,64]{1,0} parameter(0)",
        "  %s = ((f32[32,64]{1,0}, s32[]), f32[1,64]{1,0}, u32[]) fusion-start(%x), calls=%inner",
        "  ROOT %d = f32[1,64]{1,0} fusion-done(%s)",
        "}",
    ]
    arrays = hlo.largest_arrays(hlo.read_module("\n".join(lines)), 9)
    assert [(x.shape, x.opcode) for x in arrays] == [("f32[1,64]", "fusion-start")]


def test_an_instruction_is_named_by_its_innermost_line_of_this_package():
    def run(rows, tokens):
        return _sum_by_token(rows, tokens, 5)

    lowered = jax.jit(run).lower(jnp.ones((1, 8, 4)), jnp.zeros((1, 8), jnp.int32))
    sources = hlo.read_module(lowered.compile().as_text()).sources.values()
    assert sources and all(re.fullmatch(r"models/embedding\.py:\d+", x) for x in sources)


def test_two_collectives_of_a_shard_map_count_twice_and_one_in_two_fusions_once():
    gather = "f32[8]{0} all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}"
    lines = [
        *(
            x
            for i in (1, 2)
            for x in (f"%f{i} (x: f32[4]) -> f32[8] {{", f"  %g{i} = {gather}", "}")
        ),
        "ENTRY %main (x: f32[4]) -> f32[8] {",
        "  %x = f32[4]{0} parameter(0)",
        *(f"  %c{i} = f32[8]{{0}} fusion(%x), calls=%f{i}" for i in (1, 2)),
        *(f"  %h{i} = {gather}" for i in (1, 2)),
        "}",
    ]
    assert len(hlo.collectives(hlo.read_module("\n".join(lines)))) == 3


def test_a_file_beside_the_package_in_a_clone_of_its_name_is_not_of_this_package():
    text = """HloModule jit_f

FileNames
1 "/home/kd_jax/.venv/lib/python3.11/site-packages/jax/numpy.py"
2 "{package}/models/rope.py"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}}
2 {{file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}
3 {{file_location_id=1 parent_frame_id=2}}

ENTRY %main () -> f32[] {{
  ROOT %a = f32[] constant(0)
}}
"""
    program = hlo.read_module(text.format(package=Path(kd_jax.__file__).parent))
    assert program.sources == {"2": "models/rope.py:7", "3": "models/rope.py:7"}
