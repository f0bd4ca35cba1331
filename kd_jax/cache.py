"""python -m kd_jax.cache --config FILE --out DIR: runs the teacher once, and stores its outputs.

Training with --teacher.cache DIR then needs the teacher's lm_head alone. The same command goes on
where a killed one stopped, and adds the documents of other data.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from kd_jax.config import Config
from kd_jax.config.checks import Checked, Checks, OptionalPath, PathText, Range
from kd_jax.config.command import parse_args, parse_config, run_command
from kd_jax.config.errors import raise_all
from kd_jax.config.flags import split_flags
from kd_jax.config.streams import outlive_readers

DEFAULT_K = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheArgs(Checked):
    config: PathText
    """Python file with get_config(): its teacher, data and evaluation data."""
    out: PathText
    """Folder of the cache, or an address such as gs://bucket/folder; an existing cache is
    completed. With --documents, the file to write."""
    kind: Literal["hidden", "topk", "sampled"] = "hidden"
    """Values stored for each token with a loss. hidden: the teacher's final-normed hidden state,
    exact for every divergence; topk: its most likely entries, which gives a biased loss; sampled:
    entries drawn from it, which gives an unbiased gradient of the forward KL (arXiv 2503.16870)."""
    k: Annotated[int, Range(least=2)] = DEFAULT_K
    """Entries of a token with topk and sampled, an even number; 4.5 bytes each."""
    dtype: Literal["auto", "bfloat16", "float32", "float8", "int8"] = "auto"
    """dtype of the stored hidden states; auto: the teacher's, which is exact. float8 (e4m3) and
    int8 have a scale for each token and take half of the space of bfloat16; --check measures their
    error."""
    source: OptionalPath = None
    """Take the teacher's k most likely entries from this .jsonl, .parquet or .arrow file (also with
    .gz or .zst), folder or glob of such, which another system wrote (docs/caching.md), in place of
    running a teacher. teacher.path then names any model with its tokenizer, such as the student."""
    documents: bool = False
    """Write the tokens of all documents to the file --out as JSON lines, for another system to
    compute log-probabilities of, and do nothing else."""
    dry_run: bool = False
    """Print tokens, bytes and the time at a measured rate, and write nothing."""
    check: bool = False
    """Compare the finished cache with the live teacher on the held-out data, or without any on the
    first rows of the training data: the student's divergence from each."""


def check_args(args: CacheArgs) -> None:
    """Raises UserError for flags that contradict each other, or would have no effect."""
    checks = Checks()
    given = {
        "--documents": args.documents,
        "--source": args.source is not None,
        "--dry-run": args.dry_run,
        "--check": args.check,
    }
    several = [name for name, value in given.items() if value]
    if len(several) > 1:
        checks.refuse(several[0], f"no {' or '.join(several[1:])} beside it", "both")
    stores_hidden = args.kind == "hidden" and args.source is None
    if stores_hidden and args.k != DEFAULT_K:
        checks.refuse("--k", "--kind topk, --kind sampled or --source as well", args.k)
    if args.source is not None and args.kind == "sampled":
        checks.refuse("--kind", "topk with --source", args.kind)
    if not stores_hidden and args.dtype != "auto":
        checks.refuse("--dtype", "auto without hidden states", args.dtype)
    raise_all(checks.problems)


def main(argv: Sequence[str]) -> None:
    own, flags = split_flags(CacheArgs, Config, argv)
    description = f"{__doc__}\nAny flag of kd_jax.train changes the config file's fields."
    args = parse_args(CacheArgs, own, description)
    check_args(args)
    config = parse_config(["--config", args.config, *flags])
    from kd_jax.parallel.processes import joined
    from kd_jax.setup.runtime import start_jax

    start_jax(config.compilation_cache)  # before `joined`, which starts jax
    with outlive_readers(), joined(config.distributed):
        from kd_jax.inference.cache_check import check_cache
        from kd_jax.inference.cache_import import import_cache, write_documents
        from kd_jax.inference.cached import Storage, make_cache
        from kd_jax.setup.inputs import check_outputs

        check_outputs(config, {"--out": args.out})
        if args.documents:
            write_documents(config, args.out)
            return
        if args.source is not None:
            import_cache(config, args.out, args.source, args.k)
            return
        how = Storage(args.kind, args.dtype, args.k)
        data = make_cache(config, args.out, how, dry_run=args.dry_run, check=args.check)
        if args.check:
            check_cache(config, args.out, data)


if __name__ == "__main__":
    sys.exit(run_command(main))
