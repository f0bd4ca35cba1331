"""The hidden-state loss: compares outputs of paired student and teacher layers per token.

With s the output of a student layer [Ds], u that of a teacher layer [Dt], n(x) = x / rms(x) and P
the pair's trained projection [Dt, Ds] (the identity where the widths are equal):

    z = P n(s)
    mse     mean over Dt of (z - n(u))^2       0 if equal; 1 if z explains nothing of n(u)
    cosine  1 - z . n(u) / (|z| |n(u)|)        0 if parallel; ignores the norm of z

per token, averaged over the pairs. n gives every layer and token equal weight, although norms in
the residual stream grow with depth and are huge at attention sinks. Without a projection both
sides have equal norms, and mse is exactly twice cosine.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kd_jax.config import HiddenConfig
from kd_jax.config.errors import raise_all
from kd_jax.models.architecture import Architecture

_STREAM = 2**32 - 1  # random stream, apart from those of steps and adapters
_EPSILON = 1e-12  # added to mean squares, because a state of zeros has no direction


def check_layers(
    config: HiddenConfig, student: Architecture | None, teacher: Architecture | None
) -> None:
    """Raises UserError with every layer that a model lacks; None: an unknown model, not checked."""
    sides = ("student", config.student_layers, student), ("teacher", config.teacher_layers, teacher)
    problems = []
    for side, layers, arch in sides:
        depth = 0 if arch is None else arch.num_hidden_layers
        problems += [
            f"hidden.{side}-layers: expected {-depth} to {depth - 1} (the {side} has {depth} "
            f"layers), got {layer}"
            for layer in layers
            if arch is not None and not -depth <= layer < depth
        ]
    raise_all(problems)


def init_projection(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Returns a random projection [pairs, Dt, Ds] float32 that preserves mean squares."""
    key = jax.random.fold_in(jax.random.key(seed), _STREAM)
    return jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def hidden_loss(kind, student, teacher, projection, mask):
    """Returns the float32 sum over unmasked tokens of the mean over pairs.

    Args:
      kind: a name of KINDS.
      student: [pairs, B, S, Ds]; the projection's matmul runs in its dtype.
      teacher: [pairs, B, S, Dt]; gets no gradient.
      projection: [pairs, Dt, Ds] float32, or None with equal widths.
      mask: [B, S] bool; a token without a loss contributes nothing.
    """
    return _forward(kind, student, teacher, projection, mask)[0]


def _forward(kind, student, teacher, projection, mask):
    """Scans over the pairs, so that only one pair's float32 states exist at a time."""

    def run_pair(total, pair):
        loss, gradients = _pair(kind, *pair, mask)
        return total + loss, gradients

    total, gradients = jax.lax.scan(
        run_pair, jnp.zeros((), jnp.float32), (student, teacher, projection)
    )
    return total / len(student), gradients


def _backward(kind, gradients, cotangent):
    d_student, d_projection = gradients
    scale = cotangent / len(d_student)
    d_student = (d_student.astype(jnp.float32) * scale).astype(d_student.dtype)
    return d_student, None, None if d_projection is None else d_projection * scale, None


hidden_loss.defvjp(_forward, _backward)


def _pair(kind, student, teacher, projection, mask):
    """Returns a pair's summed loss and its gradients with respect to student and projection."""
    s, u = student.astype(jnp.float32), teacher.astype(jnp.float32)  # norms and losses are float32
    inverse_rms = jax.lax.rsqrt(jnp.mean(s * s, axis=-1, keepdims=True) + _EPSILON)
    u *= jax.lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + _EPSILON)
    projected = s
    if projection is not None:
        weight = projection.astype(student.dtype)  # float32 masters multiply in the model's dtype
        projected = jnp.einsum("BSd,ed->BSe", student, weight, preferred_element_type=jnp.float32)
    z = projected * inverse_rms
    values, d_z = KINDS[kind](z, u)
    d_z = jnp.where(mask[:, :, None], d_z, 0.0)
    d_projected = d_student = d_z * inverse_rms
    d_projection = None
    if projection is not None:
        d_projected = d_projected.astype(student.dtype)  # that of the matmuls
        d_student = jnp.einsum(
            "BSe,ed->BSd", d_projected, weight, preferred_element_type=jnp.float32
        )
        d_projection = jnp.einsum(
            "BSe,BSd->ed", d_projected, student, preferred_element_type=jnp.float32
        )
    along = jnp.sum(d_z * z, axis=-1, keepdims=True) * inverse_rms**2 / s.shape[-1]
    d_student = (d_student - along * s).astype(student.dtype)
    return jnp.sum(jnp.where(mask, values, 0.0)), (d_student, d_projection)


def mean_square(z: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of (z - u)^2 over the width, [B, S], and its gradient in z."""
    residual = z - u
    return jnp.mean(residual * residual, axis=-1), 2 * residual / z.shape[-1]


def cosine(z: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns 1 - cos(z, u), [B, S], and its gradient in z."""
    D = z.shape[-1]
    of_z = jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + _EPSILON)
    of_u = jax.lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + _EPSILON)
    cos = jnp.mean(z * u, axis=-1, keepdims=True) * of_z * of_u
    return 1 - cos[..., 0], (cos * of_z * z - of_u * u) * of_z / D


KINDS = {"mse": mean_square, "cosine": cosine}
