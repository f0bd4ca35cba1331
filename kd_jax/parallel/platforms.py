"""Traits of each platform: one row for CPU, GPU and TPU each. Needs no jax at import.

Take the row of the mesh's devices (`mesh.traits`) or, inside a program, of the devices that it is
lowered for (`by_platform`); never that of the default backend. Programs are compiled for devices
that are not here. docs/benchmarks.md and docs/log.md have the measurements.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd_jax.config import Dtype, Remat

Implementation = Literal["xla", "cudnn", "triton", "splash"]

TRITON_HEAD_DIMS = (16, 32, 64, 128)
"""Head dimensions whose blocks fit the shared memory of every GPU."""
TRITON_BLOCK = 64
"""Tokens in a block of its kernels; rows are padded to a multiple."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKernel:
    name: Implementation
    head_dims: Collection[int]
    """Head dimensions that it computes."""
    dtypes: Collection[str] = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    lowering: str
    """Name in jax.lax.platform_dependent."""
    attention: Sequence[AttentionKernel] = ()
    """Attention kernels of this platform alone, the fastest first; any has xla."""
    tiled_tokens: int | None = None
    """Fewest tokens of a row, for each core of a CPU, for attention in loops that skip blocks of
    other documents. The loops keep one core busy, and attention without them all. None: never."""
    wide_products: bool = False
    """Ask for float32 results of bfloat16 matmuls, then round: XLA's CPU has a bfloat16 kernel for
    that form only, several times faster than the float32 matmul it makes of the other."""
    transposed_head: bool = False
    """Transpose a bfloat16 lm_head once to [D, V]: its matmuls are faster in that layout."""
    joined_adapters: bool = False
    """On one device, multiply a weight and its adapter as one matrix: an adapter's own result costs
    a CPU as much memory traffic as the weight's."""
    integer_residuals: bool = False
    """Save bfloat16 residuals of the layers as integers: XLA's CPU converts the whole stack of
    them to float32 and back when it writes one layer's."""
    summed_attention: bool = False
    """Decode with sums over a float32 cache in place of attention's matmuls: XLA's CPU has a call
    for each row and head, which takes longer than the products, and converts a whole bfloat16
    cache to float32 at every token."""
    one_pass_softmax: bool = False
    """Reduce maxima and sums of the logits in one pass over memory."""
    integer_lookup: bool = False
    """Look up and write rows of a bfloat16 array as integers: XLA's CPU converts the whole array to
    float32, and back."""
    sorted_embedding_gradient: bool = False
    """Sum the embedding's gradient in token order: the plain scatter adds in an order that varies,
    and so does its rounding."""
    chunk_tokens: int | None = None
    """Tokens in a chunk of the fused head: those that fit the caches. None: from the memory."""
    trained_chunk_tokens: int | None = None
    """The same where the lm_head is trained: each chunk reads and writes its gradient."""
    scored_tokens: int = 16384
    """Tokens that a device scores at a time in lm_eval and evaluate, or prefills at a time."""
    bfloat16_features: Collection[str] = ()
    """Features of a CPU of which one makes bfloat16 products faster than float32 ones; empty: they
    always are."""
    remat: Sequence[Remat] = ("dots", "layer")
    """Gradient checkpointing policies that remat="auto" takes, the fastest first."""
    remat_memory: float = 0.9
    """Share of a device's memory that a run may fill with such a policy, by its estimate."""
    decoded_rows: int = 1
    """Fewest rows that decode fast in bfloat16."""
    sampled_rows: int = 256
    """Most rows that a device decodes at once where more are to be answered."""
    gathers_all: bool = False
    """Gather the fused head's rows before its loop over chunks: in the loop a TPU's compiler keeps
    more arrays, others a chunk."""
    blocked_sums: bool = False
    """Sum over the vocabulary in blocks: a CPU adds a row's terms one after another."""
    memory_share: float = 1.0
    """Share of a device's memory that jax preallocates."""
    compiler_options: Mapping[str, bool | int | str] = field(default_factory=dict)
    """XLA options that differ from its defaults."""

    def kv_itemsize(self, itemsize: int) -> int:
        """Returns the bytes of an entry of the KV cache of a model whose dtype has `itemsize`."""
        return 4 if self.summed_attention else itemsize


PLATFORMS: Mapping[str, Platform] = {
    "cpu": Platform(
        lowering="cpu",
        tiled_tokens=256,
        wide_products=True,
        transposed_head=True,
        joined_adapters=True,
        integer_residuals=True,
        summed_attention=True,
        integer_lookup=True,
        blocked_sums=True,
        chunk_tokens=80,
        trained_chunk_tokens=256,
        scored_tokens=1536,  # then activations of a layer stay in the caches
        bfloat16_features=("avx512_bf16", "amx_bf16"),
        remat_memory=0.5,  # the machine's, which has other uses
        decoded_rows=2,  # a single row is five times slower
        sampled_rows=32,
        compiler_options={
            # Sums over the vocabulary are vectorised only if their terms may be added in any order;
            # NaN and infinity stay what they are.
            "xla_cpu_enable_fast_math": True,
            "xla_cpu_prefer_vector_width": 512,
            # The CPU slices bfloat16 weights as float32; this pass would convert those of all
            # layers before the loop over them.
            "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
        },
    ),
    "gpu": Platform(
        lowering="cuda",
        attention=(
            AttentionKernel(name="triton", head_dims=TRITON_HEAD_DIMS, dtypes=("bfloat16",)),
            # Training kernels of every generation.
            AttentionKernel(name="cudnn", head_dims=range(8, 129, 8), dtypes=("bfloat16",)),
        ),
        one_pass_softmax=True,
        sorted_embedding_gradient=True,
        memory_share=0.92,
    ),
    "tpu": Platform(
        lowering="tpu",
        attention=(AttentionKernel(name="splash", head_dims=(64, 128, 256)),),
        gathers_all=True,
    ),
}


def by_platform(trait: str, if_true: Callable, if_false: Callable) -> Callable:
    """Returns a function that runs `if_true` on platforms whose row has the trait, else `if_false`.

    The choice is made when the program is lowered.
    """

    def run(*arguments: Any) -> Any:
        from jax import lax

        chosen = {row.lowering: if_true for row in PLATFORMS.values() if getattr(row, trait)}
        return lax.platform_dependent(*arguments, **chosen, default=if_false)

    return run


def choose_dtype(wanted: Dtype, platform: str) -> Dtype:
    """Returns `wanted`; for "auto" bfloat16 where this platform multiplies it faster than float32.

    A CPU is this machine's, also for devices that are not here.
    """
    if wanted != "auto":
        return wanted
    features = PLATFORMS[platform].bfloat16_features
    fast = not features or not cpu_features().isdisjoint(features)
    return "bfloat16" if fast else "float32"


def choose_attention(wanted: str, platform: str, dtype: str, head_dim: int) -> Implementation:
    """Returns the kernel `wanted`; for "auto" the platform's fastest that computes the model."""
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    kernels = PLATFORMS[platform].attention
    able = (x.name for x in kernels if dtype in x.dtypes and head_dim in x.head_dims)
    return next(able, "xla")


def num_cores() -> int:
    """Returns the cores of this machine that the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_features() -> set[str]:
    """Returns the features of this machine's CPU by Linux's names; none where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    return next((set(x.split()) for name, _, x in lines if name.strip() == "flags"), set())
