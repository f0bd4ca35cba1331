"""Attention kernels on packed documents: time, error and whether they repeat themselves.

python -m benchmarks.attention [--rows 8] [--tokens 2048] [--document 146] [--kernels cudnn triton]
    [--sweep]

Documents have random lengths with this mean; 0 makes each row one document. Times the forward pass
for the heads of Llama 3.1 8B, and both passes for those of 3.2 1B. The error is the largest
difference from float32, of the largest entry. --sweep times triton's kernels with other blocks, on
these documents and on rows of one document.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.config import MeshConfig
from kd_jax.config.command import run_command
from kd_jax.models.attention import attention
from kd_jax.parallel.mesh import Layout, make_mesh

SHAPES = {"8B": (32, 8, 128), "1B": (32, 8, 64)}
"""Query heads, key heads, head dimension."""
ROUNDS = 10
BLOCKS = [
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 4, 2), (128, 64, 8, 2),
    (128, 64, 8, 3), (64, 128, 4, 2), (64, 128, 8, 2), (128, 128, 8, 2), (64, 32, 4, 3),
    (32, 64, 4, 3), (128, 32, 4, 3),
]  # fmt: skip
"""Queries and keys of a block, warps and stages."""


def documents(rng: np.random.Generator, rows: int, tokens: int, mean: int) -> np.ndarray:
    """Returns segment ids [B, S] int32."""
    if mean == 0:
        return np.ones((rows, tokens), np.int32)
    starts = rng.random((rows, tokens)) < 1 / mean
    return 1 + np.cumsum(starts, axis=1, dtype=np.int32)


def both_passes(run: Callable) -> Callable:
    """Returns a function of (q, k, v, segments, d_out): output and gradients."""

    def passes(q, k, v, segments, d_out):
        out, backward = jax.vjp(lambda *heads: run(*heads, segments), q, k, v)
        return out, *backward(d_out)

    return passes


def milliseconds(compiled: Any, inputs: Sequence[jax.Array]) -> float:
    """Returns the median of at most ROUNDS calls in about a second, each of five runs in a row."""
    jax.block_until_ready(compiled(*inputs))
    found: list[float] = []
    while len(found) < ROUNDS and sum(found) < 0.2:
        start = time.perf_counter()
        jax.block_until_ready([compiled(*inputs) for _ in range(5)])
        found.append((time.perf_counter() - start) / 5)
    return 1e3 * statistics.median(found)


def make_inputs(args: argparse.Namespace, model: str) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    N, K, H = SHAPES[model]
    shape = (args.rows, args.tokens)
    q, k, v, d = (rng.normal(size=(*shape, n, H)).astype(jnp.bfloat16) for n in (N, K, K, N))
    segments = documents(rng, *shape, args.document)
    return [jnp.asarray(x) for x in (q, k, v, segments, d)]


def compare(args: argparse.Namespace, layout: Layout, model: str) -> None:
    inputs = make_inputs(args, model)
    few = [x[:1, :512] for x in inputs]  # a prefix of a row is a row
    wide = [np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else x.dtype) for x in few]
    with jax.default_device(jax.devices("cpu")[0]):
        exact = jax.jit(both_passes(partial(attention, layout=layout)))(*wide)
    for name in args.kernels:
        run = partial(attention, layout=layout, implementation=name)
        forward, passes = jax.jit(run), jax.jit(both_passes(run))
        errors = [
            np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()
            for got, want in zip(passes(*few), exact, strict=True)
        ]
        first, *others = (passes(*inputs) for _ in range(4))
        same = all(
            jnp.array_equal(x, y) for other in others for x, y in zip(first, other, strict=True)
        )
        print(
            f"{model:4}{name:10}{milliseconds(forward, inputs[:4]):10.3f}"
            f"{milliseconds(passes, inputs):14.3f}{max(errors):12.4f}{same!s:>10}",
            flush=True,
        )


def sweep(args: argparse.Namespace, layout: Layout, model: str) -> None:
    """Times each kernel with other blocks, on documents and on rows of one document."""
    from kd_jax.models import triton_attention as module

    inputs = make_inputs(args, model)
    whole = [*inputs[:3], jnp.ones_like(inputs[3]), inputs[4]]
    run = partial(attention, layout=layout, implementation="triton")
    for name, is_forward in (("FORWARD", True), ("QUERY_GRADIENT", False), ("KEY_GRADIENT", False)):
        count, chosen, lowered = 4 if is_forward else 5, getattr(module, name), []
        for blocks in BLOCKS:
            setattr(module, name, module.Blocks(*blocks))
            jax.clear_caches()
            function = jax.jit(lambda *x: run(*x)) if is_forward else jax.jit(both_passes(run))
            lowered.append(function.lower(*inputs[:count]))
        setattr(module, name, chosen)
        with ThreadPoolExecutor() as pool:
            programs = list(pool.map(_try_compile, lowered))
        for blocks, program in zip(BLOCKS, programs, strict=True):
            if program is not None:
                times = [milliseconds(program, x[:count]) for x in (inputs, whole)]
                print(f"{model:4}{name:16}{times[0]:9.3f}{times[1]:9.3f}  {blocks}", flush=True)


def _try_compile(lowered: Any) -> Any:
    """Returns the compiled program; None for blocks that do not fit the device."""
    try:
        return lowered.compile()
    except Exception:
        return None


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--document", type=int, default=146)
    parser.add_argument("--kernels", nargs="+", default=["cudnn", "triton"])
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args(argv)
    layout = Layout(make_mesh(MeshConfig(), jax.device_count()))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'':14}{'forward, ms':>10}{'both, ms':>14}{'error':>12}{'repeats':>10}")
    for model in SHAPES:
        compare(args, layout, model)
    if args.sweep:
        print(f"{'':20}{'documents':>9}{'whole':>9}  blocks")
        for model in SHAPES:
            sweep(args, layout, model)


if __name__ == "__main__":
    sys.exit(run_command(main))
