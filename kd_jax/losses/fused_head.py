"""The fused head: from hidden states to the loss, metrics and the student's gradient.

No array of tokens x vocabulary is larger than one chunk. A loop over chunks of tokens computes both
models' logits, the loss and its closed-form gradient, multiplies that by the student's head, and
keeps only the gradient of the hidden states as the residual. The backward pass scales it. Chunks
take the tokens with a loss first, and those without any are skipped.

The formula of each divergence and of its gradient is in divergences.py, the gradient in the logits
of a token in token_loss.py.

On a mesh, each device runs the loop on its own tokens and its share of the vocabulary. The only
collectives inside the loop are the reductions over the vocabulary; loss, metrics and gradients are
summed over devices after it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kd_jax.losses.chunks import (
    common_entries,
    read_chunk,
    restore,
    row_form,
    scatter_chunk,
    shard_mapped,
    token_spec,
    write_chunk,
)
from kd_jax.losses.head_inputs import NUM_GROUPS, HeadConfig, Student, Targets, Teacher
from kd_jax.losses.token_loss import (
    EVAL_METRICS,
    METRICS,
    SINGLE_EVAL_METRICS,
    SINGLE_METRICS,
    LossScalars,
    token_losses,
)
from kd_jax.losses.vocabulary import overlap, top_k
from kd_jax.models.bits import from_bits
from kd_jax.parallel.rules import ROWS_AXIS, axes_size

Metrics = dict[str, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def kd_head(
    config: HeadConfig,
    scalars: LossScalars | None,
    student: Student,
    teacher: Teacher | None,
    targets: Targets,
) -> tuple[jax.Array, Metrics]:
    """Returns the loss and the metrics, summed over unmasked tokens.

    Args:
      scalars: None without a teacher.
      student: hidden [B, S, D] and head [V, D], V at least config.vocab_size.
      teacher: at least config.vocab_size entries; gets no gradient. None: the loss is
        cross-entropy.
      targets: labels [B, S] int32, mask [B, S] bool, and perhaps groups.

    Returns:
      (loss, metrics): the float32 sum over tokens of (1 - kd_ratio) * CE + kd_ratio * divergence,
      differentiable in student.hidden and, with head_trainable, student.head; float32 sums by the
      names in METRICS, or SINGLE_METRICS without a teacher, [NUM_GROUPS] where targets have groups.
    """
    loss, metrics, _ = _run(config, scalars, student, teacher, targets)
    return loss, metrics


def _forward(config, scalars, student, teacher, targets):
    loss, metrics, gradient = _run(config, scalars, student, teacher, targets)
    if gradient.head is not None:  # vocabulary padding that was cut gets a gradient of 0
        padding = len(student.head) - len(gradient.head)
        gradient = gradient._replace(head=jnp.pad(gradient.head, ((0, padding), (0, 0))))
    return (loss, metrics), gradient


def _backward(config, gradient, cotangents):
    scale, _ = cotangents  # the metrics are not differentiable
    d_hidden, d_head = gradient
    d_hidden = (d_hidden.astype(jnp.float32) * scale).astype(d_hidden.dtype)
    return None, Student(d_hidden, None if d_head is None else d_head * scale), None, None


kd_head.defvjp(_forward, _backward)


def token_metrics(
    config: HeadConfig,
    scalars: LossScalars | None,
    student: Student,
    teacher: Teacher | None,
    targets: Targets,
) -> Metrics:
    """Returns each token's metrics, [B, S] float32, 0 where masked.

    They are at temperature 1, except loss and kd_loss, which are those of training.

    Args:
      as kd_head.

    Returns:
      values by the names in EVAL_METRICS, or SINGLE_EVAL_METRICS without a teacher, and with
      config.top_k and a teacher topk_overlap.
    """
    spec = token_spec(config, targets)
    return shard_mapped(config, _device_metrics, spec, scalars, student, teacher, targets)


def _run(config, scalars, student, teacher, targets):
    """Returns loss, metrics and the gradient, a Student; its head is None if that is frozen."""
    # The vocabulary of the head's gradient is also sharded over fsdp where that divides it.
    axes, num_entries = ("tensor", "fsdp"), common_entries(student, teacher)
    scatters = num_entries % axes_size(config.mesh.shape, axes) == 0
    d_head = P(axes if scatters else config.vocab_axis) if config.head_trainable else None
    specs = P(), P(), Student(token_spec(config, targets), d_head)
    run = partial(_device_gradients, scatters=scatters)
    return shard_mapped(config, run, specs, scalars, student, teacher, targets)


def _device_gradients(config, scalars, share, scatters):
    """Returns loss, metrics and the gradient, a Student, of one device's share.

    Args:
      scatters: shard the gradient of the head over fsdp.
    """
    hidden = share.rows.hidden
    # Float32 where devices have parts of a sum.
    dtype = hidden.dtype if share.vocab.axis is None else jnp.dtype("float32")

    def run_chunk(index, carry):
        sums, d_hidden, d_head = carry
        rows, z_s, z_t = read_chunk(config, share, index)
        inputs = (z_s, z_t, rows.targets, share.vocab, config.listed_only)
        values, d_logits = token_losses(config.loss, scalars, *inputs)
        sums = {n: x + _sum_targets(values[n], rows.targets) for n, x in sums.items()}
        d_logits = d_logits.astype(hidden.dtype)  # that of the matmuls
        product = "CV,DV->CD" if config.transpose_head else "CV,VD->CD"
        d_rows = jnp.einsum(product, d_logits, share.head, preferred_element_type=jnp.float32)
        d_hidden = scatter_chunk(config, share, d_hidden, d_rows.astype(dtype), index)
        if d_head is not None:
            d_head += jnp.einsum(
                "CV,CD->VD", d_logits, rows.hidden, preferred_element_type=jnp.float32
            )
        return sums, d_hidden, d_head

    names = ("loss", *(SINGLE_METRICS if share.teacher_logits is None else METRICS))
    shape = () if share.rows.targets.group is None else (NUM_GROUPS,)
    sums = dict.fromkeys(names, jnp.zeros(shape, jnp.float32))
    d_hidden = row_form(config, jnp.zeros(hidden.shape, dtype))
    d_head = None
    if config.head_trainable:
        d_head = jnp.zeros((len(share.vocab.entries), hidden.shape[-1]), jnp.float32)
    carry = (sums, d_hidden, d_head)
    sums, d_hidden, d_head = jax.lax.fori_loop(0, share.num_chunks, run_chunk, carry)
    d_hidden = from_bits(d_hidden, dtype).reshape(*share.shape, -1)
    sums, d_hidden, d_head = _psum(share, sums, d_hidden, d_head, scatters)
    loss = jnp.sum(sums.pop("loss"))
    return loss, sums, Student(d_hidden.astype(hidden.dtype), d_head)


def _sum_targets(values, targets):
    """Returns the sum of values [C] over unmasked tokens, or [NUM_GROUPS] sums of each group's."""
    if targets.group is None:
        return jnp.sum(values, where=targets.mask)
    there = targets.mask[:, None] & (targets.group[:, None] == jnp.arange(NUM_GROUPS)[None])
    return jnp.sum(jnp.where(there, values[:, None], 0.0), axis=0)


def _psum(share, sums, d_hidden, d_head, scatters):
    """Returns sums over devices: d_hidden over the vocabulary's axis, others over the tokens'."""
    if share.vocab.axis is not None:
        d_hidden = jax.lax.psum(d_hidden, share.vocab.axis)
    if d_head is not None:
        d_head = jax.lax.psum(d_head, tuple(axis for axis in share.token_axes if axis != ROWS_AXIS))
        if scatters:
            d_head = jax.lax.psum_scatter(d_head, ROWS_AXIS, tiled=True)
        else:
            d_head = jax.lax.psum(d_head, ROWS_AXIS)
    return jax.lax.psum(sums, share.token_axes), d_hidden, d_head


def _device_metrics(config, scalars, share):
    """Returns each token's metrics, [B, S] float32, of one device's share."""

    def run_chunk(index, metrics):
        rows, z_s, z_t = read_chunk(config, share, index)
        # XLA drops the gradient, which is unused.
        inputs = (z_s, z_t, rows.targets, share.vocab, config.listed_only)
        values, _ = token_losses(config.loss, scalars, *inputs)
        if "topk_overlap" in metrics:
            values["topk_overlap"] = overlap(
                *(top_k(z, config.top_k, share.vocab) for z in (z_s, z_t))
            )
        mask = rows.targets.mask
        return {
            name: write_chunk(x, jnp.where(mask, values[name], 0.0), index)
            for name, x in metrics.items()
        }

    names = SINGLE_EVAL_METRICS if share.teacher_logits is None else EVAL_METRICS
    if config.top_k is not None and share.teacher_logits is not None:
        names += ("topk_overlap",)
    zeros = jnp.zeros(share.places.shape, jnp.float32)
    metrics = jax.lax.fori_loop(0, share.num_chunks, run_chunk, dict.fromkeys(names, zeros))
    return {name: restore(share, value) for name, value in metrics.items()}
