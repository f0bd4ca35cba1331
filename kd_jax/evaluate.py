"""python -m kd_jax.evaluate: how close a student is to its teacher and to the text, per token."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kd_jax.command import parse_args, run_command
from kd_jax.config import (
    Config,
    DataConfig,
    Dtype,
    MeshConfig,
    StudentConfig,
    TeacherConfig,
    UserError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateArgs:
    model: str
    """Folder in Hugging Face form, hub id, output of convert.from_hf, or a workdir."""
    teacher: str | None = None
    """The model to compare with; without it only cross-entropy and perplexity are given."""
    data: str
    """Conversations in any form that data.path of a run takes."""
    split: str = "test"
    """Split to read when data is a hub id."""
    dtype: Dtype = "bfloat16"
    """dtype of weights and matrix products; float32 uses what is stored at full precision."""
    json: bool = False
    """Print one JSON object instead of lines."""
    step: int | None = None
    """Checkpoint of the workdir to evaluate; None takes the latest."""
    seq_len: int | None = None
    """Tokens in a row; None takes the run's, or 2048."""
    batch_size: int | None = None
    """Rows at a time over all devices; None takes the number of devices."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    max_conversations: int | None = None
    """Use only the first conversations of the data; None uses all."""


def main(argv: Sequence[str]) -> None:
    prog = "python -m kd_jax.evaluate"
    args = parse_args(EvaluateArgs, argv, prog=prog, description=__doc__)
    values = evaluate(args)
    if args.json:
        print(json.dumps(values))
    else:
        print("\n".join(f"{name:16}{value:.6g}" for name, value in values.items()))


def evaluate(args: EvaluateArgs) -> dict[str, float]:
    """Returns means over target tokens, nats, by the names of the contract."""
    import jax  # seconds that --help need not pay

    from kd_jax import data
    from kd_jax.build import (
        load_frozen_models,
        load_models,
        make_program,
        open_source,
        shared_vocab_size,
        start_jax,
    )
    from kd_jax.checkpoint import check_inputs, is_run, load_trained, read_run
    from kd_jax.loop import evaluate_rows
    from kd_jax.sharding import make_mesh
    from kd_jax.text import chat_template_of

    folder = Path(args.model).expanduser()
    workdir = folder if is_run(folder) else None
    config = _config(args, read_run(workdir) if workdir else None, jax.device_count())
    start_jax(config.compilation_cache)
    mesh = make_mesh(config.mesh, config.data.batch_size)
    student = open_source(config.student.path, config.student.adapter, "student")
    teacher = None
    if args.teacher is not None:
        assert config.teacher is not None  # as _config set it
        teacher = open_source(args.teacher, config.teacher.adapter, "teacher")
    vocab_size = shared_vocab_size(student, teacher)
    tokenizers = (student.tokenizer, teacher.tokenizer if teacher else None)
    rows = data.make_rows(config.data, tokenizers[0], chat_template_of(config.data, *tokenizers))
    if workdir is not None:
        check_inputs(workdir, student.hashes)
        models = load_models(config, student, teacher, mesh)
        arrays = models.frozen | models.trainable
        trained, _ = load_trained(workdir, args.step)
        arrays |= {n: jax.device_put(x, arrays[n].sharding) for n, x in trained.items()}
    else:
        models = load_frozen_models(config, student, teacher, mesh)
        arrays = models.frozen
    program = make_program(config, models, vocab_size, mesh)
    values = evaluate_rows(program, mesh, arrays, models.teacher_arrays, rows, config)
    wrong = ", ".join(f"{name} {x}" for name, x in values.items() if not math.isfinite(x))
    if wrong:
        raise UserError(f"{args.model}: expected finite values, got {wrong}")
    return {name: values[name] for name in NAMES if name in values}


NAMES = (
    "ce", "perplexity", "kl_forward", "kl_reverse", "top1_agreement", "acceptance", "teacher_ce",
    "target_tokens",
)  # fmt: skip


def _config(args: EvaluateArgs, run: Config | None, num_devices: int) -> Config:
    """Returns the run's configuration, or a plain one, with the arguments laid over it."""
    if run is None:
        if args.step is not None:
            raise UserError(f"--step: expected a workdir as --model, got {args.model}")
        run = Config(
            workdir="unused",
            teacher=None,
            student=StudentConfig(path=args.model),
            data=DataConfig(path=args.data),
            steps=1,
        )
    teacher = None
    if args.teacher is not None:  # the run's adapter belongs to the run's teacher
        own = run.teacher
        adapter = own.adapter if own is not None and own.path == args.teacher else None
        teacher = TeacherConfig(path=args.teacher, adapter=adapter, dtype=args.dtype)
    return dataclasses.replace(
        run,
        mesh=args.mesh,
        attention="auto",
        optim=dataclasses.replace(run.optim, accumulation_steps=1),
        student=dataclasses.replace(run.student, dtype=args.dtype),
        teacher=teacher,
        data=dataclasses.replace(
            run.data,
            path=args.data,
            split=args.split,
            seq_len=run.data.seq_len if args.seq_len is None else args.seq_len,
            batch_size=num_devices if args.batch_size is None else args.batch_size,
            chat_template=args.chat_template or run.data.chat_template,
            max_conversations=args.max_conversations,
        ),
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
