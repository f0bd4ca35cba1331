"""python -m convert.to_hf: a run's student as a folder that transformers or peft loads."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd_jax.config import UserError
from kd_jax.config.command import parse_args, run_command


@dataclass(frozen=True, kw_only=True, slots=True)
class ToHfArgs:
    workdir: str
    """Folder of a run of kd_jax.train."""
    out: str
    """Folder to write, which must not exist yet."""
    step: int | None = None
    """Checkpoint to export; None takes the latest."""
    format: Literal["merged", "adapter"] = "merged"
    """merged: a whole model in the source's dtype. adapter: a PEFT adapter of the source."""


def main(argv: Sequence[str]) -> None:
    args = parse_args(ToHfArgs, argv, prog="python -m convert.to_hf", description=__doc__)
    from kd_jax.setup.runtime import start_jax
    from kd_jax.weights.export import export_adapter, export_merged
    from kd_jax.weights.folder import fingerprint, load_architecture, resolve
    from kd_jax.workdir.checkpoints import load_trained
    from kd_jax.workdir.record import check_inputs, read_run

    start_jax()
    workdir = Path(args.workdir).expanduser()
    config = read_run(workdir)
    if args.format == "adapter" and config.trainable == "full":
        raise UserError("--format: expected merged, since this run trained whole weights")
    source = resolve(config.student.path, "student.path")
    check_inputs(workdir, {"student.path": fingerprint(source)})
    arch = load_architecture(source)
    trained, step = load_trained(workdir, args.step)
    out = Path(args.out).expanduser()
    if args.format == "adapter":
        export_adapter(source, config.student.path, arch, trained, config.lora, out)
    else:
        export_merged(source, arch, trained, config.lora.alpha / config.lora.rank, out)
    print(f"wrote step {step} of {args.workdir} to {out} ({args.format})")


if __name__ == "__main__":
    sys.exit(run_command(main))
