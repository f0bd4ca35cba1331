"""Evaluation of rows: sums of token metrics by document and by position."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kd_jax.config import Config
from kd_jax.data.batches import ReadTeacher, eval_batches
from kd_jax.data.rows import Rows
from kd_jax.inference.scores import Sums, accepted_length, tally
from kd_jax.losses.fused_head import token_metrics
from kd_jax.models.decoder import Decoder
from kd_jax.parallel.mesh import compiler_options, num_batch_shards, replicated, traits
from kd_jax.parallel.placement import Arrays, one_late, put_batch
from kd_jax.setup.forward import loss_scalars, run_models
from kd_jax.setup.program import Program


def evaluate_rows(
    program: Program,
    mesh: Mesh,
    arrays: Arrays,
    teacher_arrays: Arrays,
    rows: Rows,
    config: Config,
    read_teacher: ReadTeacher | None = None,
    draft_lengths: tuple[int, ...] = (),
) -> tuple[Sums, Sums]:
    """Returns sums over target tokens by document, and by position bucket in the document.

    Bucket b holds positions 2^b <= p < 2^(b + 1); a document begins at position 0.

    Args:
      read_teacher: adds a cached teacher's arrays to a batch.
      draft_lengths: tokens proposed at a time, for which scores.accepted_length is measured.
    """
    run = _jit_eval_step(mesh)
    num_rows = config.data.batch_size // config.optim.accumulation_steps
    num_buckets = rows.tokens.shape[1].bit_length()
    documents, positions = [], []
    batches = eval_batches(rows, num_rows, read_teacher=read_teacher)
    started = ((x, run(program, arrays, teacher_arrays, put_batch(x, mesh))) for x in batches)
    for batch, out in one_late(started):
        mask, metrics = jax.device_get(out)
        values = {name: value[mask] for name, value in metrics.items()}
        groups, num_groups = _documents(batch["segment_ids"], mask)
        for length in draft_lengths:
            runs = _runs(batch["segment_ids"], mask)
            expected = accepted_length(values["acceptance"], runs, length)
            values[f"accepted_length_{length}"] = expected
        documents.append(tally(values, groups, num_groups))
        position = batch["positions"][mask] + 1  # of the predicted token
        buckets = np.frexp(position)[1] - 1  # floor(log2)
        positions.append(tally(values, buckets, num_buckets))
    return (
        {name: np.concatenate([sums[name] for sums in documents]) for name in documents[0]},
        {name: np.sum([sums[name] for sums in positions], axis=0) for name in positions[0]},
    )


@functools.cache
def _jit_eval_step(mesh: Mesh) -> Any:
    """Returns eval_step under jit: one for all evaluations, so that equal programs compile once."""
    return jax.jit(
        eval_step,
        static_argnums=0,
        out_shardings=replicated(mesh),  # every process reads them
        compiler_options=compiler_options(mesh),
    )


def rows_at_once(mesh: Mesh, num_rows: int, seq_len: int) -> int:
    """Returns the rows of a batch over all devices: scored_tokens a device, at most all rows."""
    most = max(1, traits(mesh).scored_tokens // seq_len)
    shards = num_batch_shards(mesh)
    return shards * min(most, -(-num_rows // shards))


def _documents(segment_ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns each unmasked token's document, numbered from 0, and the number of documents."""
    per_row = int(segment_ids.max()) + 1
    number = np.arange(len(segment_ids))[:, None] * per_row + segment_ids
    found, groups = np.unique(number[mask], return_inverse=True)
    return groups, len(found)


def _runs(segment_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the number of each unmasked token's run of such tokens in one document, [n]."""
    begins = mask.copy()
    begins[:, 1:] &= ~(mask[:, :-1] & (segment_ids[:, 1:] == segment_ids[:, :-1]))
    return np.cumsum(begins).reshape(mask.shape)[mask]


def eval_step(
    program: Program, student_arrays: Arrays, teacher_arrays: Arrays, batch: Arrays
) -> tuple[jax.Array, Arrays]:
    """Returns the target mask [B, S] bool, and token metrics [B, S] float32."""
    student = Decoder(program.student, student_arrays)
    inputs, _ = run_models(program, student, teacher_arrays, batch)
    scalars = loss_scalars(program, None)
    return inputs[-1].mask, token_metrics(program.head, scalars, *inputs)
