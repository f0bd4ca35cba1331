"""Comparison of a teacher's cache with the live teacher, on rows of data."""

import dataclasses
from typing import Any

import numpy as np

from kd_jax.config import Config
from kd_jax.data.batches import ReadTeacher
from kd_jax.data.rows import Rows
from kd_jax.data.store import COLUMNS
from kd_jax.inference import scores
from kd_jax.inference.cached import Data, open_finished, with_live_teacher
from kd_jax.inference.evaluation import evaluate_rows
from kd_jax.parallel.processes import say
from kd_jax.setup.cached import CachedTeacher
from kd_jax.setup.models import Models, load_models
from kd_jax.setup.program import make_program
from kd_jax.teachers.reading import CachedRows

MOST_ROWS = 64  # of training data, where nothing is held out


def check_cache(config: Config, path: str, data: Data) -> dict[str, float]:
    """Prints and returns the divergences of a student from the live and from the cached teacher.

    The student is that of the configuration before training.

    Returns:
      tokens: target tokens compared; live, cached: mean loss.divergence, nats per token;
      difference: cached - live; of hidden states also kl: KL(live || cached), nats per token, and
      top1_agreement of the two.
    """
    config = with_live_teacher(config)
    cached = open_finished(config, path, data.identity, data.rows)
    rows, read_teacher = _some(data.rows, cached)
    models = load_models(config, data.student, data.teacher, data.mesh)
    student_arrays = models.frozen | models.trainable["student"]
    stored = dataclasses.replace(models, teacher_outputs=cached.kind)

    def measure(
        models: Models, arrays: Any, rows: Rows, read_teacher: ReadTeacher | None
    ) -> dict[str, float]:
        program = make_program(config, models, data.vocab_size, data.mesh)
        both = (arrays, models.teacher_arrays)
        return scores.whole(evaluate_rows(program, data.mesh, *both, rows, config, read_teacher)[0])

    live = measure(models, student_arrays, rows, None)
    from_cache = measure(stored, student_arrays, rows, read_teacher)
    out = {
        "tokens": live["target_tokens"],
        "live": live["kd_loss"],
        "cached": from_cache["kd_loss"],
        "difference": from_cache["kd_loss"] - live["kd_loss"],
    }
    shown = ""
    if cached.kind == "hidden":
        assert models.teacher is not None
        teacher = dataclasses.replace(stored, student=models.teacher)
        # Both see the teacher's prompt, where it has one of its own.
        own = rows if rows.teacher is None else rows.teacher
        apart = measure(teacher, models.teacher_arrays, own, read_teacher.of_rows(own))
        out |= {"kl": apart["kl_reverse"], "top1_agreement": apart["top1_agreement"]}
        shown = f"; KL(live || cache) {out['kl']:.3g}, top-1 agreement {out['top1_agreement']:.2%}"
    say(
        f"{path}: over {out['tokens']:,.0f} tokens the student's {config.loss.divergence} is "
        f"{out['live']:.6g} nats from the live teacher and {out['cached']:.6g} from the cache, "
        f"{out['difference']:+.3g}{shown}"
    )
    return out


def _some(rows: tuple[Rows, Rows | None], cached: CachedTeacher) -> tuple[Rows, CachedRows]:
    """Returns the held-out rows, or the first training rows, and their values."""
    train, held_out = rows
    if held_out is not None and cached.held_out is not None:
        return held_out, cached.held_out
    return _first_rows(train), cached.train


def _first_rows(rows: Rows) -> Rows:
    columns: dict[str, Any] = {name: np.array(getattr(rows, name)[:MOST_ROWS]) for name in COLUMNS}
    teacher = None if rows.teacher is None else _first_rows(rows.teacher)
    return dataclasses.replace(rows, **columns, teacher=teacher)
