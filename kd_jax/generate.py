"""python -m kd_jax.generate: answers prompts, printing tokens as they are generated.

With --data and --out it answers the prompts of a file, several at a time, and writes records that
kd_jax.train reads. The same command goes on where a killed one stopped; several processes, started
as for training, share the prompts. Both change answers by rounding only.
"""

import sys
from collections.abc import Sequence

from kd_jax.config.command import parse_args, run_command
from kd_jax.config.errors import naming_flags
from kd_jax.inference.arguments import GenerateArgs


@naming_flags("chat-template", "split", "date")
def main(argv: Sequence[str]) -> None:
    args = parse_args(GenerateArgs, argv, __doc__)
    from kd_jax.inference.answering import answer_data, answers  # imports jax

    if args.data is not None:
        answer_data(args)
        return
    shown = [""] * len(args.prompt)
    alone = len(args.prompt) == 1
    for row, text in answers(args):
        shown[row] += text
        if alone:
            print(text, end="", flush=True)
    if alone:
        print()
    else:
        pairs = zip(args.prompt, shown, strict=True)
        print("\n\n".join(f"> {prompt}\n{text}" for prompt, text in pairs))


if __name__ == "__main__":
    sys.exit(run_command(main))
