"""python -m kd_jax.train --config FILE: distils a teacher into a student, or resumes a run."""

import sys
from collections.abc import Sequence
from pathlib import Path

from kd_jax.config.command import parse_config, run_command
from kd_jax.config.streams import outlive_readers


def main(argv: Sequence[str]) -> None:
    config = parse_config(argv, __doc__)
    from kd_jax.parallel.processes import joined
    from kd_jax.setup.runtime import start_jax
    from kd_jax.workdir.lock import lock_workdir

    start_jax(config.compilation_cache)  # before `joined`, which starts jax
    workdir, *caches = (
        Path(path).expanduser()
        for path in (config.workdir, config.data.cache_dir, config.compilation_cache)
        if path is not None
    )
    with outlive_readers(), joined(config.distributed), lock_workdir(workdir, caches):
        from kd_jax.training.loop import train

        train(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
