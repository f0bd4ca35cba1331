"""python -m convert.from_hf: writes a Hugging Face folder as an Orbax checkpoint for kd_jax."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_jax.config.checks import Checked, PathText
from kd_jax.config.command import parse_args, run_command


@dataclass(frozen=True, kw_only=True, slots=True)
class FromHfArgs(Checked):
    source: PathText
    """Hugging Face folder or hub id."""
    out: PathText
    """Folder to write; it must not exist."""


def main(argv: Sequence[str]) -> None:
    args = parse_args(FromHfArgs, argv, __doc__)
    from kd_jax.setup.runtime import start_jax
    from kd_jax.weights.export import save_orbax
    from kd_jax.weights.folder import resolve

    start_jax()
    source = resolve(args.source, "--source")
    save_orbax(source, Path(args.out).expanduser())
    print(f"wrote {source} to {args.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
