"""Parts of the decoder: its static description, linear layers, norms and RoPE."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.architecture import Architecture
from kd_jax.models.attention import Implementation
from kd_jax.models.matmul import project, project_adapted
from kd_jax.models.residuals import SAVED_PRODUCT, save
from kd_jax.models.rope import Rope
from kd_jax.models.weight_table import layer_weights
from kd_jax.parallel.mesh import Layout, traits


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """Static description of a decoder: architecture, dtype, sharding; a static argument of jit."""

    arch: Architecture
    dtype: Any
    """Dtype of activations and matmuls."""
    attention: Implementation = "xla"
    layout: Layout
    """Shardings of weights and rows."""
    remat: Literal["none", "dots", "attention", "layer"] = "none"
    lora_scale: float = 0.0
    """alpha / rank of the adapters."""
    dropout: float = 0.0
    """Dropout probability of the adapters' input in training."""

    @property
    def saves_bits(self) -> bool:
        """True if bfloat16 residuals are saved as integers."""
        return traits(self.layout.mesh).integer_residuals

    def save(self, x: jax.Array, name: str) -> jax.Array:
        return save(x, name, self.saves_bits)

    def save_low(self, low: jax.Array) -> jax.Array:
        """Names an adapter's x Aᵀ, which its backward pass needs."""
        return self.save(low, SAVED_PRODUCT)

    def joins_adapters(self, x: jax.Array) -> bool:
        """True if a projection of x [B, S, in] and its adapter are one matmul: on one device."""
        mesh = self.layout.mesh
        return mesh.size == 1 and x.shape[1] > 1 and traits(mesh).joined_adapters


class LoraParam(nnx.Param):
    """A trainable low-rank factor."""


class Linear(nnx.Module):
    """y = x Wᵀ (+ b) (+ lora_scale (x Aᵀ) Bᵀ), by the arrays present."""

    def __init__(self, spec: DecoderSpec, arrays: Mapping[str, Any], path: str):
        """Takes `path`.weight [out, in], and bias and LoRA factors if present."""

        def optional(name: str, kind: type[nnx.Param]) -> Any:
            value = arrays.get(f"{path}.{name}")
            return nnx.data(None if value is None else kind(value))

        self.weight = nnx.Param(arrays[f"{path}.weight"])
        self.bias = optional("bias", nnx.Param)
        self.lora_A = optional("lora_A", LoraParam)
        self.lora_B = optional("lora_B", LoraParam)
        self.dims = layer_weights(spec.arch)[f"{path}.weight"].dims
        self.spec = spec

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps [B, S, in] to [B, S, out] in the model's dtype; a `key` enables dropout."""
        out, into = self.dims
        joined = self.lora_A is not None and key is None and self.spec.joins_adapters(x)
        if joined:
            factors = (self.lora_A[...], self.lora_B[...])
            y = project_adapted(
                x,
                self.weight[...],
                factors,
                self.spec.lora_scale,
                self.spec.dtype,
                self.spec.save_low,
            )
        else:
            y = self._project(x, self.weight[...], out, into)
        if self.bias is not None:
            bias = self.bias[...].astype(self.spec.dtype)  # like weights in project
            y = y + bias[None, None]
        if self.lora_A is not None and not joined:
            dropout = self.spec.dropout
            if key is not None and dropout > 0:
                keep = jax.random.bernoulli(key, 1 - dropout, x.shape)
                x = jnp.where(keep, x / (1 - dropout), 0).astype(x.dtype)
            low = self._project(x, self.lora_A[...], "rank", into)
            low = self.spec.save_low(low)
            y = y + self.spec.lora_scale * self._project(low, self.lora_B[...], out, "rank")
        return self.spec.save(y, SAVED_PRODUCT)  # the backward pass needs only the sum

    def _project(self, x: jax.Array, weight: jax.Array, *dims: str) -> jax.Array:
        layout = self.spec.layout
        in_use = layout.in_use(dims, weight.shape) if layout.mesh.size > 1 else None
        return project(x, weight, self.spec.dtype, in_use)


class RMSNorm(nnx.Module):
    """x / rms(x) * (weight + norm_offset) (arXiv 1910.07467)."""

    def __init__(self, weight: Any, arch: Architecture):
        self.weight = nnx.Param(weight)
        self.eps, self.offset = arch.rms_norm_eps, arch.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)  # squares lose precision in bfloat16
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.offset:  # a sum near 1 loses precision in bfloat16
            weight = self.weight[...].astype(jnp.float32) + self.offset
            weight = jnp.expand_dims(weight, range(x.ndim - 1))
            return (x32 * scale * weight).astype(x.dtype)
        normed = (x32 * scale).astype(x.dtype)  # before the weight, as in transformers
        weight = self.weight[...].astype(x.dtype)
        return normed * jnp.expand_dims(weight, range(x.ndim - 1))


def optional_linear(spec: DecoderSpec, arrays: Mapping[str, Any], path: str) -> Any:
    """Returns a Linear as data of a module; None if the model has no such weight."""
    return nnx.data(Linear(spec, arrays, path) if f"{path}.weight" in arrays else None)


def optional_norm(spec: DecoderSpec, arrays: Mapping[str, Any], path: str) -> Any:
    """Returns an RMSNorm as data of a module; None if the model has no such weight."""
    weight = arrays.get(f"{path}.weight")
    return nnx.data(None if weight is None else RMSNorm(weight, spec.arch))


class VocabWeight(nnx.Module):
    """A weight [V, D]: the embedding or the lm_head."""

    def __init__(self, weight: Any):
        self.weight = nnx.Param(weight)


def rope_tables(
    positions: jax.Array, rope: Rope, head_dim: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of the RoPE angles, [B, S, 1, R] each; R entries are rotated.

    They are repeated for both entries of a pair; the sine is negative for the first.
    """
    frequency = jnp.asarray(rope.inverse_frequencies(head_dim))
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]

    def table(first: jax.Array, second: jax.Array) -> jax.Array:
        values = jnp.concatenate([first, second], axis=-1)
        scale = rope.attention_factor
        return (values if scale == 1 else scale * values).astype(dtype)

    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return table(cos, cos), table(-sin, sin)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies RoPE to the first R entries of x [B, S, heads, H], pairing i and i + R / 2.

    It is computed in float32 and rounded once, in the form that XLA's CPU vectorises: with each
    operation in bfloat16 it takes eight times as long.
    """
    R = cos.shape[-1]
    if x.shape[-1] > R:
        return jnp.concatenate([rotate(x[..., :R], cos, sin), x[..., R:]], axis=-1)
    wide, cos, sin = (y.astype(jnp.float32) for y in (x, cos, sin))
    first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([second, first], axis=-1)
    return (wide * cos + turned * sin).astype(x.dtype)
