"""The batches of an on-policy run: rows of the data, some of them replaced by samples."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.config import Config
from kd_jax.data.store import Batch
from kd_jax.inference.drawing import Sampling
from kd_jax.inference.sampling import sample, stop_length
from kd_jax.models.decoder import DecoderSpec
from kd_jax.onpolicy.prompts import Order
from kd_jax.onpolicy.sampler import Sampler
from kd_jax.onpolicy.samples import (
    Sample,
    describe,
    fill_rows,
    mix,
    num_sampled_rows,
    samples_in,
    with_teacher,
)
from kd_jax.parallel.placement import Arrays, put_batch

NUM_WRITTEN = 4  # samples of a drawing that are written as text


@dataclass(kw_only=True)
class OnPolicySource:
    """A BatchSource: the data's rows, some replaced by samples drawn with the weights of the step.

    All processes draw all samples, because a model may be sharded over processes, and send those
    of their own devices.
    """

    config: Config
    sampler: Sampler
    batches: Iterator[Batch]
    """Batches of the data."""
    mesh: Mesh
    student: DecoderSpec
    frozen: Arrays
    """The student's arrays that are not trained."""
    vocab_size: int
    num_steps: int
    write: Callable[[int, list[dict[str, Any]]], None]
    """Takes the step that first trains on a drawing, and records of some of its samples."""
    columns: Batch
    """The rows in use; at first those of the checkpoint from which the run resumes."""
    age: int = 0
    seconds: float = 0.0
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        config, prompts = self.config, self.sampler.prompts
        self.order = Order(prompts, config.seed, config.on_policy.max_new_tokens)

    def __call__(self, step: int, state: Any) -> Arrays:
        """Returns the batch of a step; draws samples every `every_steps`."""
        self.age = step % self.config.on_policy.every_steps
        if self.age == 0:
            self.columns = self._draw(step, state)
        elif not self.columns:  # the run resumes between drawings, the last of which had no rows
            self.columns = self._fill([], iter(()))
        assert len(self.columns["tokens"]) == self._num_rows(step - self.age)
        return put_batch(mix(next(self.batches), self.columns), self.mesh)

    def metrics(self) -> dict[str, float | None]:
        """Returns metrics of the samples; None for a metric without a value."""
        found = describe(self.columns, self.sampler.stops) | {"samples/age": float(self.age)}
        return found if self.age else found | {"samples/sampling_seconds": self.seconds}

    def resume_arrays(self, step: int) -> Batch:
        """Returns the samples that a run which resumes at `step` trains on but cannot draw."""
        between = step % self.config.on_policy.every_steps > 0
        return self.columns if between and len(self.columns.get("tokens", ())) else {}

    def _num_rows(self, step: int) -> int:
        size = self.config.data.batch_size
        return num_sampled_rows(self.config.on_policy, step, self.num_steps, size)

    @property
    def _most_rows(self) -> int:
        """Rows of the largest drawing."""
        return math.ceil(self.config.on_policy.highest_fraction * self.config.data.batch_size)

    def _draw(self, step: int, state: Any) -> Batch:
        """Returns samples in rows: a function of the weights, the seed and the step."""
        options = self.config.on_policy
        drawing = step // options.every_steps
        rows = self.order.choose(drawing, self._num_rows(step), self._most_rows)
        prompts = [self.sampler.prompts.tokens(number) for row in rows for number in row]
        if not prompts:
            self.seconds = 0.0
            return self._fill(rows, iter(()))
        jax.block_until_ready(state.trainable)
        start = time.perf_counter()
        columns = self._fill(rows, iter(self._sample(prompts, step, state)))
        self.seconds = time.perf_counter() - start
        if options.log_samples and step % options.log_samples < options.every_steps:
            self.write(step + 1, self._records(columns))
        return columns

    def _fill(self, rows: list[list[int]], drawn: Iterator[Sample]) -> Batch:
        """Returns the columns of samples of the prompts in rows."""
        filled = [[next(drawn) for _ in row] for row in rows]
        columns = fill_rows(filled, self.config.data.seq_len, self.sampler.pad)
        teacher = self.sampler.prompts.teacher
        if teacher is None:
            return columns
        own = [
            [sample._replace(prompt=teacher.tokens(i)) for i, sample in zip(*pair, strict=True)]
            for pair in zip(rows, filled, strict=True)
        ]
        return with_teacher(columns, own, teacher.rows.tokens.shape[1])

    def _sample(self, prompts: list[np.ndarray], step: int, state: Any) -> list[Sample]:
        options = self.config.on_policy
        # Each drawing has the same number of prompts, which needs no other program: some are not
        # used, and get one token.
        most = self.order.most_prompts(self._most_rows)
        fill = max(0, most - len(prompts))
        most_new = [options.max_new_tokens] * len(prompts) + [1] * fill
        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(most_new)))
        drawn = sample(
            self.student,
            self.frozen | state.trainable["student"],
            [*prompts, *prompts[:1] * fill],
            keys=keys,
            max_new_tokens=most_new,
            stop_tokens=self.sampler.stops,
            sampling=Sampling(temperature=options.temperature, top_p=options.top_p),
            vocab_size=self.vocab_size,
            longest=int(self.order.sizes[:, 0].max()),
        )
        return [Sample(*one) for one in zip(prompts, drawn.tokens, drawn.log_probs, strict=False)]

    def _records(self, columns: Batch) -> list[dict[str, Any]]:
        """Returns the first samples as text."""
        return [
            {
                "prompt": self.sampler.decode(one.prompt),
                "answer": self.sampler.decode(one.answer),
                "tokens": len(one.answer),
                "ended": stop_length(one.answer, self.sampler.stops) > 0,
                "log_prob": float(one.log_probs.mean()),
            }
            for one in islice(samples_in(columns), NUM_WRITTEN)
        ]
