"""python -m kd_jax.lm_eval: a folder or workdir on the tasks of the lm-eval harness.

Needs the `eval` extra: pip install 'kd-jax[eval]'. For example

  python -m kd_jax.lm_eval --model FOLDER --tasks truthfulqa_mc2,hellaswag,commonsense_qa
  python -m kd_jax.lm_eval --model WORKDIR --tasks my_task --include-path FOLDER_OF_YAML --json

Scores are those of lm-eval's own `hf` model. In Python, import kd_jax.inference.lm_eval_model and
give "kd_jax" as the model to lm_eval.simple_evaluate.
"""

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_jax.config import Dtype, UserError
from kd_jax.config.command import check_out_file, parse_args, run_command
from kd_jax.config.errors import first_line
from kd_jax.weights.files import write_whole


@dataclass(frozen=True, kw_only=True, slots=True)
class LmEvalArgs:
    model: str
    """Folder in Hugging Face form, hub id, output of convert.from_hf, or a workdir."""
    tasks: str
    """Names of tasks, groups or tags of lm-eval, with commas between them."""
    include_path: str | None = None
    """Folder of further tasks' YAML files."""
    dtype: Dtype = "bfloat16"
    """dtype of weights and matrix products; float32 uses what is stored at full precision."""
    step: int | None = None
    """Checkpoint of the workdir; None takes the latest."""
    num_fewshot: int | None = None
    """Examples in each prompt; None takes the task's."""
    limit: int | None = None
    """Use only the first examples of each task; None uses all."""
    apply_chat_template: bool = False
    """Put each prompt into the tokenizer's chat template."""
    system_instruction: str | None = None
    """System message before each prompt."""
    add_bos_token: bool | None = None
    """Whether texts are encoded with special tokens; None asks the tokenizer."""
    max_length: int | None = None
    """Tokens that the model sees at most; None takes config.json's."""
    batch_size: int | None = None
    """Rows of 512 tokens at a time, over all devices; None takes what fits the device's kind."""
    json: bool = False
    """Print one JSON object instead of a table."""
    out: str | None = None
    """File to write the JSON object to."""
    log_samples: bool = False
    """Put every example with its answers into the JSON object."""


def main(argv: Sequence[str]) -> None:
    prog = "python -m kd_jax.lm_eval"
    args = parse_args(LmEvalArgs, argv, prog=prog, description=__doc__)
    file = None if args.out is None else check_out_file(args.out, "--out")
    result = run_tasks(args)
    text = json.dumps(result, default=str)
    if file is not None:
        write_whole(file, text + "\n")
    if args.json:
        print(text)
        return
    from lm_eval.utils import make_table

    print(make_table(result))
    if result.get("groups"):
        print(make_table(result, "groups"))


def run_tasks(args: LmEvalArgs) -> dict[str, Any]:
    """Returns what lm_eval.simple_evaluate does: `results` by task, `configs`, `versions`, ..."""
    try:
        import lm_eval
    except ImportError:
        raise UserError(
            "lm-eval: expected the eval extra, which is not installed: pip install 'kd-jax[eval]'"
        ) from None
    from kd_jax.inference.lm_eval_model import KdJaxLM

    for name in ("limit", "batch_size", "max_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    manager, names = find_tasks(args.tasks, args.include_path)
    model = KdJaxLM(
        args.model,
        dtype=args.dtype,
        step=args.step,
        batch_size=args.batch_size or "auto",
        max_length=args.max_length,
        add_bos_token=args.add_bos_token,
    )
    return lm_eval.simple_evaluate(
        model,
        tasks=names,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        system_instruction=args.system_instruction,
        log_samples=args.log_samples,
    )


def find_tasks(tasks: str, include_path: str | None) -> tuple[Any, list[str]]:
    """Returns lm-eval's task manager and the tasks' names.

    Raises:
      UserError: with every name that is no task, or a folder that is not there.
    """
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, *args, **options):
            try:
                return super().load(*args, **options)
            except Exception as error:  # of the hub, of datasets, of a task's own code
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise UserError(
                    f"--tasks: {tasks}: expected tasks whose data can be read ({reason})"
                ) from None

    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise UserError(f"--include-path: expected a folder of YAML files, got {include_path}")
    manager = Manager(include_path=include_path and str(Path(include_path).expanduser()))
    names = [name for name in tasks.split(",") if name]
    problems = []
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"Did you mean {near[0]}?" if near else "--include-path adds tasks of your own"
            problems.append(f"--tasks: expected tasks of lm-eval, got {name}. {hint}")
    if problems or not names:
        raise UserError("\n".join(problems) or "--tasks: expected names with commas, got none")
    return manager, names


if __name__ == "__main__":
    sys.exit(run_command(main))
