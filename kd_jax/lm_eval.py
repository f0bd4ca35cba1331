"""python -m kd_jax.lm_eval: runs tasks of the lm-eval harness on a folder or workdir.

Needs the `eval` extra: pip install 'kd-jax[eval]'. For example

  python -m kd_jax.lm_eval --model FOLDER --tasks truthfulqa_mc2,hellaswag,commonsense_qa
  python -m kd_jax.lm_eval --model WORKDIR --tasks my_task --include-path FOLDER_OF_YAML --json

Scores equal those of lm-eval's `hf` model. In Python, import kd_jax.inference.lm_eval_model and
pass "kd_jax" as the model to lm_eval.simple_evaluate.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from kd_jax.config import UserError
from kd_jax.config.checks import Checks, OptionalPath, Range
from kd_jax.config.command import ModelArgs, check_out_file, parse_args, run_command
from kd_jax.config.errors import did_you_mean, first_line, raise_all
from kd_jax.weights.files import write_whole


@dataclass(frozen=True, kw_only=True, slots=True)
class LmEvalArgs(ModelArgs):
    tasks: str
    """Tasks, groups or tags of lm-eval, separated by commas."""
    include_path: OptionalPath = None
    """Folder with YAML files of more tasks."""
    num_fewshot: Annotated[int | None, Range(least=0)] = None
    """Examples in each prompt; None: the task's number."""
    limit: Annotated[int | None, Range(least=1)] = None
    """Use only the first examples of each task; None uses all."""
    apply_chat_template: bool = False
    """Apply the tokenizer's chat template to each prompt."""
    system_instruction: str | None = None
    """System message before each prompt."""
    add_bos_token: bool | None = None
    """Encode texts with special tokens; None: the tokenizer's setting."""
    max_length: Annotated[int | None, Range(least=1)] = None
    """Context length in tokens; None: config.json's."""
    batch_size: Annotated[int | None, Range(least=1)] = None
    """Rows of 512 tokens per batch over all devices; None: the platform's default."""
    json: bool = False
    """Print one JSON object instead of a table."""
    out: OptionalPath = None
    """File to write the JSON object to."""
    log_samples: bool = False
    """Add every example with its answers to the JSON object."""

    def check(self, checks: Checks) -> None:
        folder = self.include_path
        if folder is not None and not Path(folder).expanduser().is_dir():
            checks.refuse("--include-path", "a folder of YAML files", folder)
        if not self.tasks.strip(","):
            checks.refuse("--tasks", "names with commas", self.tasks)


def main(argv: Sequence[str]) -> None:
    args = parse_args(LmEvalArgs, argv, __doc__)
    file = None if args.out is None else check_out_file(args.out, "--out", "results")
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
    """Returns the result of lm_eval.simple_evaluate: `results` by task, `configs`, `versions`."""
    try:
        import lm_eval
    except ImportError:
        raise UserError(
            "lm-eval: expected the eval extra, which is not installed: pip install 'kd-jax[eval]'"
        ) from None
    from kd_jax.inference.lm_eval_model import KdJaxLM

    manager = make_manager(args)
    model = KdJaxLM(
        args.model,
        dtype=args.dtype,
        step=args.step,
        student_path=args.student_path,
        batch_size=args.batch_size or "auto",
        max_length=args.max_length,
        add_bos_token=args.add_bos_token,
    )
    names = ("num_fewshot", "limit", "apply_chat_template", "system_instruction", "log_samples")
    options = {name: getattr(args, name) for name in names}
    tasks = [name for name in args.tasks.split(",") if name]
    return lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, **options)


def make_manager(args: LmEvalArgs) -> Any:
    """Returns lm-eval's task manager; raises UserError for unknown tasks and unreadable data."""
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, *names, **options):
            try:
                return super().load(*names, **options)
            except Exception as error:  # of the hub, of datasets or of the task's code
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise UserError(
                    f"--tasks: expected tasks whose data can be read, got {args.tasks} ({reason})"
                ) from None

    folder = None if args.include_path is None else str(Path(args.include_path).expanduser())
    wanted = set(args.tasks.split(",")) - {""}
    # Reading lm-eval's own tasks takes seconds.
    manager = Manager(include_path=folder, include_defaults=folder is None)
    if folder is not None and wanted - set(manager.all_tasks):
        manager = Manager(include_path=folder)
    problems = []
    for name in sorted(wanted - set(manager.all_tasks)):
        hint = did_you_mean(name, manager.all_tasks) or " --include-path adds your own tasks"
        problems.append(f"--tasks: expected tasks of lm-eval, got {name}.{hint}")
    raise_all(problems)
    return manager


if __name__ == "__main__":
    sys.exit(run_command(main))
