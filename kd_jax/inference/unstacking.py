"""Layers apart, as decoding is fastest: a stack's copies by layer, adapters merged."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.models.decoder import DecoderSpec
from kd_jax.models.weight_table import FACTORS, is_adapter, layer_weights
from kd_jax.parallel.mesh import Layout
from kd_jax.parallel.placement import Arrays
from kd_jax.parallel.rules import ROWS_AXIS


def unstack_layers(spec: DecoderSpec, arrays: Arrays, *, gather: bool = False) -> None:
    """Replaces stacked arrays by one per layer, in place: adapters merged, in the spec's dtype.

    At most one stack is in memory twice. On a CPU, slicing the stacks takes longer than the
    matmuls of one token. For arrays that are still needed, pass a shallow copy: their copies live
    as long as it.

    Args:
      gather: all-gather weights along ROWS_AXIS, once rather than at every token.
    """
    stacked = "layers.self_attn.o_proj.weight" in arrays
    layout = spec.layout if gather else None
    for path in [path for path in arrays if not is_adapter(path)]:
        value = arrays.pop(path)
        if not stacked or not path.startswith("layers."):
            arrays[path] = _convert(spec.dtype, layout, value)
            continue
        module, name = path.removeprefix("layers.").rsplit(".", 1)
        factors = [f"layers.{module}.{factor}" for factor in FACTORS]
        merges = name == "weight" and factors[0] in arrays
        pair = tuple(arrays.pop(factor) for factor in factors) if merges else None
        dims = layer_weights(spec.arch)[f"{module}.{name}"].dims
        layers = _split(spec.dtype, layout, dims, spec.lora_scale, value, pair)
        arrays |= {f"layers.{i}.{module}.{name}": layer for i, layer in enumerate(layers)}


def _convert(dtype: Any, layout: Layout | None, value: jax.Array) -> jax.Array:
    if layout is None or layout.mesh.size == 1 or value.ndim < 2:
        return value.astype(dtype)
    sharding = layout.in_use(("vocab", "embed"), value.shape)
    return jax.device_put(value.astype(dtype), sharding)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _split(dtype, layout, dims, scale, stack, factors) -> list[jax.Array]:
    """Returns the layers of a stack [L, ...], with adapters A and B merged if there are any."""
    layers = []
    for i, layer in enumerate(stack):
        if factors is not None:
            A, B = (factor[i].astype(jnp.float32) for factor in factors)
            # Added in float32 and rounded once.
            layer = layer.astype(jnp.float32) + scale * jnp.matmul(B, A, precision="highest")
        layer = layer.astype(dtype)
        if layout is not None and layout.mesh.size > 1:
            layer = jax.lax.with_sharding_constraint(layer, layout.in_use(dims, layer.shape))
        layers.append(layer)
    return layers


def unstacked(spec: DecoderSpec, arrays: Arrays) -> tuple[DecoderSpec, Arrays]:
    """Returns a spec and arrays by layer; arrays that are stacked are copied, and all-gathered
    along ROWS_AXIS."""
    if "layers.self_attn.o_proj.weight" not in arrays:
        return spec, arrays
    arrays = dict(arrays)
    unstack_layers(spec, arrays, gather=True)
    axes = tuple(axis for axis in spec.layout.axes if axis != ROWS_AXIS)
    return replace(spec, layout=Layout(spec.layout.mesh, axes)), arrays
