"""python -m kd_jax.evaluate: a student's cross-entropy and distance to its teacher, per token."""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from kd_jax.config.command import check_out_file, parse_args, run_command
from kd_jax.config.errors import naming_flags
from kd_jax.inference import scores
from kd_jax.inference.arguments import EvaluateArgs
from kd_jax.weights.files import write_whole


@naming_flags("seq-len", "batch-size", "chat-template", "split")
def main(argv: Sequence[str]) -> None:
    # kd_jax.train has these flags as --teacher.cache and the like.
    words = [re.sub(r"^--teacher\.(?=cache|system|messages)", "--teacher-", x) for x in argv]
    args = parse_args(EvaluateArgs, words, __doc__)
    places = {"--out": args.out, "--save": f"{args.model}/evaluation.json" if args.save else None}
    files = [check_out_file(x, flag, "by_position") for flag, x in places.items() if x is not None]
    from kd_jax.inference.comparison import evaluate  # imports jax, which --help avoids

    with redirect_stdout(sys.stderr):  # what --json prints is one object
        result = evaluate(args)
    text = json.dumps(result)
    try:
        for file in files:
            write_whole(file, text + "\n")
    finally:  # a full disk does not lose the numbers
        print(text if args.json else scores.describe(result))


if __name__ == "__main__":
    sys.exit(run_command(main))
