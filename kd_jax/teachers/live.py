"""A teacher that runs in the program: its hidden states and its head."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.data.store import TEACHER
from kd_jax.losses.head_inputs import ChunkContext
from kd_jax.models.decoder import Decoder, DecoderSpec
from kd_jax.parallel.placement import Arrays


class HiddenStates(NamedTuple):
    """The outputs of a teacher model and its head; implements losses.head_inputs.Teacher."""

    hidden: jax.Array
    """[B, S, Dt], final-normed hidden states, as stored if they come from a cache."""
    head: jax.Array
    """[V', Dt]: the lm_head, or the tied embedding; the matmul runs in its dtype."""
    scales: jax.Array | None = None
    """[B, S] float32, by which the hidden states are multiplied; None: they are whole."""

    @property
    def num_entries(self) -> int:
        return len(self.head)

    @property
    def rows(self) -> tuple[jax.Array, jax.Array | None]:
        return self.hidden, self.scales

    @property
    def vocab_arrays(self) -> jax.Array:
        return self.head

    @staticmethod
    def logits(
        rows: tuple[jax.Array, jax.Array | None], vocab_arrays: jax.Array, context: ChunkContext
    ) -> jax.Array:
        """Returns [C, V] float32 of hidden states [C, Dt], scales [C] and the head [V, Dt]."""
        hidden, scales = rows
        if scales is not None:
            hidden = hidden.astype(jnp.float32) * scales[:, None]
        hidden = hidden.astype(vocab_arrays.dtype)  # of a stored one the live teacher's
        return jnp.einsum("CD,VD->CV", hidden, vocab_arrays, preferred_element_type=jnp.float32)


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A teacher model in the student's program; static under jit."""

    spec: DecoderSpec
    separate_teacher_rows: bool = False
    """The batch has the teacher's rows as data.batches.read_batch adds them."""

    def __call__(
        self, arrays: Arrays, batch: Arrays, layers: tuple[int, ...] = ()
    ) -> tuple[HiddenStates, jax.Array | None]:
        """Returns the side of rows [B, S], and the outputs of `layers`, [len(layers), B, S, Dt]."""
        model = Decoder(self.spec, arrays)
        prefix = TEACHER if self.separate_teacher_rows else ""
        tokens, positions, segments = (
            batch[f"{prefix}{name}"] for name in ("tokens", "positions", "segment_ids")
        )
        hidden, outputs = model.with_layers(tokens, positions, segments, layers)
        if self.separate_teacher_rows:
            places = batch[f"{TEACHER}places"]
            gather = jax.vmap(lambda x, at: x[at])  # [St, Dt], [S]
            hidden = gather(hidden, places)
            if outputs is not None:
                outputs = jax.vmap(gather, (0, None))(outputs, places)
        head = model.head_weight().astype(hidden.dtype)  # here, not in each chunk
        return HiddenStates(hidden, head), outputs
