"""A teacher whose final-normed hidden states come with the batch; only its head is loaded."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kd_jax.data.store import TEACHER
from kd_jax.models.architecture import Architecture
from kd_jax.models.weight_table import head_weights
from kd_jax.parallel.placement import Arrays
from kd_jax.teachers.live import HiddenStates
from kd_jax.teachers.storage import Field, Fields

_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Largest value of dtypes that need a scale for each token."""
_ENTRIES = {"float8": "float8_e4m3fn"}


def hidden_fields(width: int, dtype: str) -> Fields:
    """Returns the arrays of a cache of hidden states in bfloat16, float32, float8 or int8."""
    dtype = _ENTRIES.get(dtype, dtype)
    scales = {"scales": Field((), "float32")} if dtype in _LARGEST else {}
    return {"hidden": Field((width,), dtype), **scales}


def encode(hidden: jax.Array, dtype: str) -> Arrays:
    """Returns hidden states [B, S, Dt] as stored, with scales [B, S] float32 if the dtype has them.

    A token's largest entry becomes the dtype's largest; int8 rounds to the nearest, half to even.
    """
    if dtype not in _LARGEST:
        return {"hidden": hidden.astype(dtype)}
    wide = hidden.astype(jnp.float32)  # the scale and its quotient are float32
    highest = jnp.max(jnp.abs(wide), axis=-1)
    scales = jnp.where(highest > 0, highest, 1.0) / _LARGEST[dtype]
    scaled = wide / scales[..., None]
    scaled = jnp.round(scaled) if dtype == "int8" else scaled
    return {"hidden": scaled.astype(dtype), "scales": scales}


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A teacher read from a cache; static under jit."""

    arch: Architecture

    def __call__(
        self, arrays: Arrays, batch: Arrays, layers: tuple[int, ...] = ()
    ) -> tuple[HiddenStates, None]:
        """Returns the side of rows [B, S]; there are no outputs of layers."""
        assert not layers
        (path,) = head_weights(self.arch)
        hidden, scales = batch[f"{TEACHER}hidden"], batch.get(f"{TEACHER}scales")
        return HiddenStates(hidden, arrays[path], scales), None
