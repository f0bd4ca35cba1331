"""python -m kd_jax.cache --config FILE --out DIR: runs the teacher once, and stores its outputs.

Training with --teacher.cache DIR then needs the teacher's lm_head alone. The same command goes on
where a killed one stopped, and adds the documents of other data.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kd_jax.config.checks import Checked
from kd_jax.config.command import parse_args, parse_config, run_command
from kd_jax.config.flags import split_flags
from kd_jax.config.streams import outlive_readers


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheArgs(Checked):
    config: str
    """Python file with get_config(): its teacher, data and evaluation data."""
    out: str
    """Folder of the cache, or an address such as gs://bucket/folder; one that is there is
    completed."""
    kind: Literal["hidden"] = "hidden"
    """What is stored of each token with a loss. hidden: the teacher's final-normed hidden state,
    exact for every divergence."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype of the stored hidden states; auto: the teacher's, which is exact."""
    dry_run: bool = False
    """Print tokens, bytes and the time at a measured rate, and write nothing."""


def main(argv: Sequence[str]) -> None:
    own, flags = split_flags(CacheArgs, argv)
    description = f"{__doc__}\nAny flag of kd_jax.train changes the config file's fields."
    args = parse_args(CacheArgs, own, description)
    config = parse_config(["--config", args.config, *flags])
    from kd_jax.parallel.processes import joined
    from kd_jax.setup.runtime import start_jax

    start_jax(config.compilation_cache)  # before `joined`, which starts jax
    with outlive_readers(), joined(config.distributed):
        from kd_jax.inference.cached import make_cache

        make_cache(config, args.out, kind=args.kind, dtype=args.dtype, dry_run=args.dry_run)


if __name__ == "__main__":
    sys.exit(run_command(main))
