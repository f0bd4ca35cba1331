"""python -m convert.to_hf: exports a run's student as a folder for transformers or peft."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd_jax.config import UserError
from kd_jax.config.checks import Checked, OptionalPath, PathText
from kd_jax.config.command import parse_args, run_command


@dataclass(frozen=True, kw_only=True, slots=True)
class ToHfArgs(Checked):
    workdir: PathText
    """Workdir of a kd_jax.train run."""
    out: PathText
    """Folder to write; it must not exist."""
    student_path: OptionalPath = None
    """The run's student where it is now, if it has moved. Its content must be what the run was
    started with."""
    step: int | None = None
    """Optimizer step of the checkpoint to export. None: the latest."""
    format: Literal["merged", "adapter"] = "merged"
    """merged: a full model in the student's stored dtype. adapter: LoRA factors in PEFT's form."""


def main(argv: Sequence[str]) -> None:
    args = parse_args(ToHfArgs, argv, __doc__)
    from kd_jax.data.chat import saved_template
    from kd_jax.setup.runtime import start_jax
    from kd_jax.weights.export import export_adapter, export_merged
    from kd_jax.weights.folder import fingerprint, resolve
    from kd_jax.workdir.checkpoints import open_trained
    from kd_jax.workdir.history import MOVABLE_STUDENT, read_config
    from kd_jax.workdir.resume import check_same_inputs

    start_jax()
    workdir = Path(args.workdir).expanduser()
    config = read_config(workdir, args.student_path)
    if args.format == "adapter" and config.trainable == "full":
        raise UserError("--format: expected merged, since this run trained all weights")
    source = resolve(config.student.path, MOVABLE_STUDENT)
    check_same_inputs(workdir, {"student.path": fingerprint(source)})
    trained = open_trained(workdir, args.step)
    export = export_adapter if args.format == "adapter" else export_merged
    template = saved_template(workdir, config.data)
    export(source, config, trained, Path(args.out).expanduser(), template=template)
    print(f"wrote step {trained.step} of {args.workdir} to {args.out} ({args.format})")


if __name__ == "__main__":
    sys.exit(run_command(main))
