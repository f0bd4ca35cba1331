"""The fused head compared with its bare matmuls, a dense head and other libraries' losses.

python benchmarks/kd_head.py [--tokens N ...] [--widths STUDENT TEACHER] [--vocab 128256]
    [--dtypes bfloat16 float32] [--divergences all] [--masked 0.5] [--head-trainable] [--json FILE]

Every side computes 0.5 cross-entropy + 0.5 divergence on random arrays, and the gradient in the
student's hidden states (and in its lm_head with --head-trainable):

products   only the matmuls of kd_jax's loop, in its chunks, dtypes and orientation
kd_jax     kd_head, as in training, metrics included
dense      full logits of both models, and jax.grad through the first divergence
liger      LigerFusedLinearJSDLoss (Jensen-Shannon); it always computes the lm_head's gradient
torchtune  its chunked losses, compiled as in its recipe

A round runs each side once. The table has medians, their ratio to `products`, and the temporary
memory planned by XLA, also in units of a chunk's float32 logits. --divergences all adds each
divergence's cost relative to forward_kl. --masked adds kd_jax with that share of tokens masked.
Liger and torchtune run if installed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory to torch

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.config import LossConfig, MeshConfig, UserError
from kd_jax.config.command import run_command
from kd_jax.losses import divergences
from kd_jax.losses.fused_head import kd_head
from kd_jax.losses.head_inputs import HeadConfig, Student, Targets
from kd_jax.losses.token_loss import LossScalars
from kd_jax.losses.token_weights import token_weight
from kd_jax.parallel.mesh import compiler_options, make_mesh
from kd_jax.setup.program import make_head
from kd_jax.setup.runtime import start_jax
from kd_jax.teachers.live import HiddenStates

GPU_TOKENS, CPU_TOKENS = (1024, 2048, 4096, 8192), (800,)
GPU_WIDTHS, CPU_WIDTHS = (2048, 4096), (256, 512)  # Llama 3.2 1B and 3.1 8B; the yardstick's
LOGIT_DEVIATION = 2.0
TORCHTUNE = {
    "forward_kl": "ForwardKLWithChunkedOutputLoss",
    "reverse_kl": "ReverseKLWithChunkedOutputLoss",
    "symmetric_kl": "SymmetricKLWithChunkedOutputLoss",
}
TORCHTUNE_CHUNKS = 8
IGNORED = -100
"""torch's label of a masked token."""


class Inputs(NamedTuple):
    """Random arrays: [1, S, Ds], [1, S, Dt], [V, Ds], [V, Dt], and [1, S] twice."""

    student_hidden: Any
    teacher_hidden: Any
    student_head: Any
    teacher_head: Any
    labels: Any
    mask: Any


class Entry(NamedTuple):
    run: Callable[[], float | None]
    """Computes once and blocks; returns the loss per target token, or None."""
    temporary_bytes: int | None


def make_inputs(
    num_tokens: int, widths: Sequence[int], vocab_size: int, dtype: str, masked: float = 0.0
) -> Inputs:
    """Returns random arrays whose logits have a standard deviation of LOGIT_DEVIATION."""

    def draw(key):
        keys = iter(jax.random.split(key, 4))
        hidden = [jax.random.normal(next(keys), (1, num_tokens, D)) for D in widths]
        heads = [jax.random.normal(next(keys), (vocab_size, D)) / D**0.5 for D in widths]
        return [x.astype(dtype) for x in (*hidden, *(LOGIT_DEVIATION * x for x in heads))]

    rng = np.random.default_rng(0)
    labels = rng.integers(0, vocab_size, (1, num_tokens), np.int32)
    mask = rng.permutation(num_tokens)[None] >= round(masked * num_tokens)
    return Inputs(*jax.jit(draw)(jax.random.key(0)), *map(jnp.asarray, (labels, mask)))


def compile_side(function: Callable, *arguments: Any) -> Entry:
    """Returns the side of a jax function whose first output is the loss."""
    options = compiler_options(make_mesh(MeshConfig(), jax.device_count()))
    program = jax.jit(function, compiler_options=options).lower(*arguments).compile()

    def run():
        return float(jax.block_until_ready(program(*arguments))[0])

    return Entry(run, program.memory_analysis().temp_size_in_bytes)


def with_gradients(loss: Callable, config: HeadConfig, inputs: Inputs) -> Entry:
    """Returns the side of a function from Inputs to (summed loss, auxiliary outputs)."""
    trained = ("student_hidden", "student_head")[: 1 + config.head_trainable]

    def step(inputs):
        def mean(*arrays):
            total, aux = loss(inputs._replace(**dict(zip(trained, arrays, strict=True))))
            return total / jnp.sum(inputs.mask), aux

        arrays = [getattr(inputs, name) for name in trained]
        (value, aux), gradients = jax.value_and_grad(
            mean, argnums=tuple(range(len(arrays))), has_aux=True
        )(*arrays)
        return value, aux, gradients

    return compile_side(step, inputs)


def fused(config: HeadConfig, inputs: Inputs) -> Entry:
    def loss(inputs):
        scalars = LossScalars(jnp.float32(config.loss.kd_ratio), jnp.float32(1))
        student = Student(inputs.student_hidden, inputs.student_head)
        teacher = HiddenStates(inputs.teacher_hidden, inputs.teacher_head)
        return kd_head(config, scalars, student, teacher, Targets(inputs.labels, inputs.mask))

    return with_gradients(loss, config, inputs)


def dense(config: HeadConfig, inputs: Inputs) -> Entry:
    def log_probs(hidden, head):
        z = jnp.einsum("BSD,VD->BSV", hidden, head, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(z)

    def loss(inputs):
        log_q = log_probs(inputs.student_hidden, inputs.student_head)
        log_p = log_probs(inputs.teacher_hidden, inputs.teacher_head)
        weight = token_weight(jax.lax.stop_gradient(log_q), log_p, config.loss)
        terms = divergences.divergence_terms(log_q, log_p, config.loss, weight).value
        ce = -jnp.take_along_axis(log_q, inputs.labels[..., None], axis=-1)[..., 0]
        ratio = config.loss.kd_ratio
        values = (1 - ratio) * ce + ratio * jnp.sum(terms, axis=-1)
        return jnp.sum(jnp.where(inputs.mask, values, 0.0)), None

    return with_gradients(loss, config, inputs)


def products(config: HeadConfig, inputs: Inputs) -> Entry:
    """Returns the lower bound: only the matmuls of the head's loop.

    A constant stands for the logits' gradient. Barriers tie it to a chunk's logits; otherwise XLA
    would drop the logits and hoist the gradient's matmul out of the loop.
    """
    C, (_, num_tokens, _) = config.chunk_tokens, inputs.student_hidden.shape
    num_chunks = -(-num_tokens // C)
    rows = (inputs.student_hidden, inputs.teacher_hidden)
    rows = [jnp.pad(x[0], ((0, num_chunks * C - num_tokens), (0, 0))) for x in rows]
    dtype, V = inputs.student_head.dtype, len(inputs.student_head)
    heads = (
        inputs.student_head.T if config.transpose_head else inputs.student_head,
        inputs.teacher_head,
    )
    dims = "DV" if config.transpose_head else "VD"
    d_logits = jnp.ones((C, V), dtype) / V

    def multiply(rows, heads, d_logits):
        def run_chunk(index, carry):
            total, d_hidden, d_head = carry
            h_s, h_t = (jax.lax.dynamic_slice_in_dim(x, index * C, C) for x in rows)
            z_s = jnp.einsum(f"ND,{dims}->NV", h_s, heads[0], preferred_element_type=jnp.float32)
            z_t = jnp.einsum("ND,VD->NV", h_t, heads[1], preferred_element_type=jnp.float32)
            d, z_s, z_t = jax.lax.optimization_barrier((d_logits, z_s, z_t))
            product = jnp.einsum(f"NV,{dims}->ND", d, heads[0], preferred_element_type=jnp.float32)
            d_hidden = jax.lax.dynamic_update_slice_in_dim(
                d_hidden, product.astype(dtype), index * C, axis=0
            )
            if d_head is not None:
                d_head += jnp.einsum("NV,ND->VD", d, h_s, preferred_element_type=jnp.float32)
            return total + z_s[0, 0] + z_t[0, 0], d_hidden, d_head

        d_head = (
            jnp.zeros(inputs.student_head.shape, jnp.float32) if config.head_trainable else None
        )
        start = (jnp.float32(0), jnp.zeros_like(rows[0]), d_head)
        return jax.lax.fori_loop(0, num_chunks, run_chunk, start)

    side = compile_side(multiply, rows, heads, d_logits)
    return side._replace(run=lambda: side.run() and None)


def to_torch(inputs: Inputs, head_trainable: bool) -> dict[str, Any]:
    """Returns torch tensors by name, on the GPU if there is one; masked labels are IGNORED."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for name, x in inputs._asdict().items():
        array = np.array(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else np.array(x)
        tensor = torch.from_numpy(array).to(device)
        tensors[name] = tensor.to(torch.bfloat16) if x.dtype == jnp.bfloat16 else tensor
    tensors["labels"] = tensors["labels"].long().masked_fill(~tensors.pop("mask"), IGNORED)
    for name in ("student_hidden", "student_head")[: 1 + head_trainable]:
        tensors[name].requires_grad_()
    return tensors


def torch_side(tensors: dict[str, Any], loss: Callable[[], Any]) -> Entry:
    import torch

    cuda = torch.cuda.is_available()

    def run():
        for tensor in tensors.values():
            tensor.grad = None
        value = loss()
        value.backward()
        if cuda:
            torch.cuda.synchronize()
        return value.item()

    if not cuda:
        return Entry(run, None)
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return Entry(run, torch.cuda.max_memory_allocated() - before)


def liger(config: HeadConfig, inputs: Inputs) -> Entry:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    ratio, x = config.loss.kd_ratio, to_torch(inputs, config.head_trainable)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1 - ratio, weight_soft_loss=ratio, beta=0.5)
    hidden = [x[name][0] for name in ("student_hidden", "teacher_hidden")]
    arguments = (hidden[0], x["student_head"], hidden[1], x["teacher_head"], x["labels"][0])
    return torch_side(x, lambda: loss(*arguments, None, None))


def torchtune(config: HeadConfig, inputs: Inputs) -> Entry:
    import torch
    from torchtune import training
    from torchtune.modules import loss as modules

    ratio, x = config.loss.kd_ratio, to_torch(inputs, config.head_trainable)
    names = ("CEWithChunkedOutputLoss", TORCHTUNE[config.loss.divergence])
    ce, kd = (training.compile_loss(getattr(modules, name)(), verbose=False) for name in names)

    def logits(model):
        chunks = x[f"{model}_hidden"].chunk(TORCHTUNE_CHUNKS, dim=1)
        return [torch.nn.functional.linear(chunk, x[f"{model}_head"]) for chunk in chunks]

    def loss():
        with torch.no_grad():
            teacher = logits("teacher")
        student = logits("student")
        return (1 - ratio) * ce(student, x["labels"]) + ratio * kd(student, teacher, x["labels"])

    return torch_side(x, loss)


def absent(name: str, config: HeadConfig) -> str | None:
    """Returns the reason why another library's loss cannot run, or None."""
    package = {"liger": "liger_kernel", "torchtune": "torchtune"}[name]
    if not util.find_spec("torch") or not util.find_spec(package):
        return "not installed"
    import torch

    if name == "liger" and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if name == "torchtune" and config.loss.divergence not in TORCHTUNE:
        return f"has no {config.loss.divergence}"
    return None


def make_configs(args: argparse.Namespace, num_tokens: int, dtype: str) -> dict[str, HeadConfig]:
    """Returns the head's configuration for each divergence on this device."""
    mesh = make_mesh(MeshConfig(), 1, jax.devices()[:1])
    return {
        name: make_head(
            LossConfig(divergence=name, chunk_tokens=args.chunk_tokens),
            mesh,
            args.vocab,
            num_tokens,
            dtype,
            args.head_trainable,
        )
        for name in args.divergences
    }


def make_sides(
    args: argparse.Namespace, num_tokens: int, dtype: str, configs: dict[str, HeadConfig]
) -> dict[str, Entry]:
    """Returns the compared sides by name, `products` first."""
    first, *_ = args.divergences
    shape = (num_tokens, args.widths, args.vocab, dtype)
    config, inputs = configs[first], make_inputs(*shape)
    sides = {"products": products(config, inputs)}
    for name in args.divergences:
        sides[f"kd_jax {name}"] = fused(configs[name], inputs)
    if args.masked:
        mask = make_inputs(*shape, args.masked).mask
        sides[f"kd_jax masked {args.masked:g}"] = fused(config, inputs._replace(mask=mask))
    sides[f"dense {first}"] = dense(config, inputs)
    for make, title in ((liger, "liger jsd"), (torchtune, f"torchtune {first}")):
        if reason := absent(make.__name__, config):
            print(f"{make.__name__}: skipped, {reason}")
        else:
            sides[title] = make(config, inputs)
    return sides


def measure(sides: dict[str, Entry], rounds: int) -> list[dict[str, Any]]:
    """Returns each side's loss, seconds of every round and temporary memory."""
    found = {name: side.run() for name, side in sides.items()}  # warm
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side.run()
            seconds[name].append(time.perf_counter() - begin)
    return [
        {
            "side": name,
            "loss": found[name],
            "median_seconds": statistics.median(seconds[name]),
            "seconds": seconds[name],
            "temporary_bytes": side.temporary_bytes,
        }
        for name, side in sides.items()
    ]


def compare(records: list[dict[str, Any]], first: str, logits_bytes: int) -> None:
    """Adds to every record its ratio to `products`, and kd_jax's to the first divergence.

    Args:
      logits_bytes: size of a chunk's float32 logits.
    """
    medians = {record["side"]: record["median_seconds"] for record in records}
    for record in records:
        record["over_products"] = record["median_seconds"] / medians["products"]
        if record["temporary_bytes"] is not None:
            record["temporary_in_chunk_logits"] = record["temporary_bytes"] / logits_bytes
        if record["side"].startswith("kd_jax "):
            record["over_first"] = record["median_seconds"] / medians[f"kd_jax {first}"]


def print_table(records: list[dict[str, Any]], first: str) -> None:
    def cell(value, form):
        return "–" if value is None else format(value, form)

    print(
        f"{'':25}{'ms':>10}{'/ products':>12}{'/ ' + first:>16}{'MB':>9}{'logits':>8}{'loss':>10}"
    )
    for r in records:
        memory = None if r["temporary_bytes"] is None else r["temporary_bytes"] / 1e6
        print(
            f"{r['side']:25}{r['median_seconds'] * 1e3:10.1f}{r['over_products']:12.2f}"
            f"{cell(r.get('over_first'), '.2f'):>16}{cell(memory, '.0f'):>9}"
            f"{cell(r.get('temporary_in_chunk_logits'), '.2f'):>8}{cell(r['loss'], '.5f'):>10}"
        )
    print(flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_cpu = jax.default_backend() == "cpu"
    names = list(divergences.DIVERGENCES)
    tokens, widths = (CPU_TOKENS, CPU_WIDTHS) if on_cpu else (GPU_TOKENS, GPU_WIDTHS)
    parser.add_argument("--tokens", nargs="+", type=int, default=tokens)
    parser.add_argument("--widths", nargs=2, type=int, default=widths, help="student's, teacher's")
    parser.add_argument("--vocab", type=int, default=128_256)
    dtypes = ["bfloat16", "float32"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--divergences", nargs="+", choices=[*names, "all"], default=names[:1])
    parser.add_argument("--masked", type=float, default=0.0, help="share of masked tokens")
    parser.add_argument("--head-trainable", action="store_true")
    parser.add_argument("--chunk-tokens", type=int, help="default: as in training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="JSON file for all results")
    args = parser.parse_args(argv)
    if "all" in args.divergences:
        args.divergences = names
    sizes = {"tokens": min(args.tokens), "widths": min(args.widths), "vocab": args.vocab}
    sizes |= {"rounds": args.rounds, "chunk-tokens": args.chunk_tokens or 1}
    problems = [f"--{n}: expected at least 1, got {x}" for n, x in sizes.items() if x < 1]
    if not 0 <= args.masked < 1:
        problems.append(f"--masked: expected 0 <= share < 1, got {args.masked}")
    if problems:
        raise UserError("\n".join(problems))
    return args


def machine() -> dict[str, Any]:
    """Returns device, machine and library versions."""
    installed = {"jax", "jaxlib", "torch", "liger_kernel", "torchtune"}
    versions = {n: metadata.version(n) for n in sorted(installed) if util.find_spec(n)}
    device, name = jax.devices()[0], platform.processor() or platform.machine()
    return {"device": device.device_kind, "machine": name, **versions}


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    start_jax(None)
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    first, results = args.divergences[0], []
    for dtype in args.dtypes:
        for num_tokens in args.tokens:
            configs = make_configs(args, num_tokens, dtype)
            chunk = configs[first].chunk_tokens
            shape = {"dtype": dtype, "tokens": num_tokens, "chunk_tokens": chunk}
            print(
                f"{dtype}, {num_tokens} tokens in chunks of {chunk}, widths {args.widths[0]} / "
                f"{args.widths[1]}, vocabulary {args.vocab}, head "
                + ("trained" if args.head_trainable else "frozen")
            )
            records = measure(make_sides(args, num_tokens, dtype, configs), args.rounds)
            compare(records, first, chunk * args.vocab * 4)
            print_table(records, first)
            results += [shape | record for record in records]
    if args.json:
        options = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"about": about, "options": options, "results": results}))


if __name__ == "__main__":
    sys.exit(run_command(main))
