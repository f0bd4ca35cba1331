"""The command line: a config file, flags over it, and exit statuses. Needs no jax."""

import dataclasses
import errno
import importlib.util
import io
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from kd_jax.config.checks import (
    IS_PATH,
    Checked,
    OptionalPath,
    PathText,
    metadata,
    out_path,
    plain_type,
)
from kd_jax.config.data import DataConfig
from kd_jax.config.errors import UserError, did_you_mean
from kd_jax.config.flags import check_flags, plain_switches
from kd_jax.config.run import Config, StudentConfig
from kd_jax.config.streams import flush_streams, is_unread, open_streams
from kd_jax.config.teacher import Dtype, TeacherConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelArgs(Checked):
    """The arguments of every command that opens a trained model."""

    model: PathText
    """Hugging Face folder, hub id, output of convert.from_hf, or a workdir."""
    dtype: Dtype = "auto"
    """dtype of weights and matrix products; float32 uses stored weights at full precision. auto:
    bfloat16 where the devices multiply it faster, else float32."""
    step: int | None = None
    """Checkpoint of the workdir; None takes the latest."""
    student_path: OptionalPath = None
    """The student of the workdir's run where it is now, if it has moved. Its content must be what
    the run was started with."""


def load_config(path: str | Path) -> Config:
    """Returns `get_config()` of a Python file."""
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        near = (file.name for file in path.parent.glob("*.py"))
        hint = did_you_mean(path.name, near, f"{path.parent}/")
        raise UserError(f"--config: expected a Python file, got {path}, no such file.{hint}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: expected a file ending in .py, got {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path}: expected a function get_config(), got none")
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_place(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: expected get_config() to return a Config, got {config!r:.60}")
    return config


def _place(error: Exception, path: Path) -> str:
    """Returns `file:line` of the config file's innermost line in an error's traceback."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
    return f"{path}:{lines[-1]}" if lines else str(path)


def parse_args(
    cls: type[T], argv: Sequence[str], description: str = "", *, default: T | None = None
) -> T:
    """Returns `argv` as an instance of dataclass `cls`; fields without a flag come from `default`.

    Args:
      description: a command's docstring, which begins with the command.

    Raises:
      UserError: a flag is unknown (the message names the nearest), lacks a value or is invalid.
    """
    import tyro  # takes 0.3 s

    argv = plain_switches(cls, argv)
    check_flags(cls, argv)
    command = re.search(r"python (-m )?[\w./]+", description)
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            return tyro.cli(
                cls,
                prog=command and command[0],
                args=list(argv),
                description=description,
                config=(tyro.conf.AvoidSubcommands,),
                default=tyro.MISSING_NONPROP if default is None else default,
                registry=_own_help(),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_plain(message.getvalue())) from None


def _own_help() -> Any:
    """Returns a tyro registry for --help: ranges next to defaults, docstrings as paragraphs."""
    import tyro
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    inside: list[bool] = []

    @registry.struct_rule
    def rule(info):
        if inside or not dataclasses.is_dataclass(info.type):
            return None
        inside.append(True)  # then the next call is tyro's own rule
        spec = ConstructorRegistry.get_struct_spec(info)
        inside.pop()
        if not hasattr(spec, "fields"):
            return spec
        return dataclasses.replace(spec, fields=tuple(map(change, spec.fields)))

    def change(entry):
        text = entry.helptext

        def paragraph() -> str:
            return " ".join(((text() if callable(text) else text) or "").split())

        entry = dataclasses.replace(entry, helptext=paragraph)
        notes = "".join(f"; {mark}" for mark in metadata(entry.type) if mark is not IS_PATH)
        if not notes:
            return entry
        hint = tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default}{notes})")
        return dataclasses.replace(entry, type=Annotated[plain_type(entry.type), hint])

    return registry


def _plain(boxed: str) -> str:
    """Returns tyro's boxed error as plain lines, without the title."""
    lines = [line.strip("\u2502\u2570\u256f\u2500 ") for line in boxed.splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("\u256d"))


def parse_config(argv: Sequence[str], description: str = "") -> Config:
    """Returns the Config of the file after `--config`, changed by all other flags of `argv`."""
    rest, path = [], None
    words = iter(argv)
    for word in words:
        if word == "--config":
            path = next(words, None)
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    wants_help = "--help" in rest or "-h" in rest
    if path is None and not wants_help:
        raise UserError("--config: expected a Python file with get_config(), got none.")
    description += "\n\n--config FILE: Python file with get_config(); flags change its fields."
    default = _blank_config() if path is None else _open_to_flags(load_config(path), rest)
    return parse_args(Config, rest, description, default=default)


def _open_to_flags(config: Config, argv: Sequence[str]) -> Config:
    """Returns the config with a placeholder wherever a flag replaces None."""
    flags = {word.split("=")[0] for word in argv}
    if "--steps" in flags:
        config = dataclasses.replace(config, steps=1, epochs=None)
    if "--epochs" in flags:
        config = dataclasses.replace(config, steps=None, epochs=1)
    of_teacher = sorted(flag for flag in flags if flag.startswith("--teacher."))
    if config.teacher is None and of_teacher:
        if not {"--teacher.path", "--teacher.kind"} & {*of_teacher}:
            raise UserError(
                f"{of_teacher[0]}: expected --teacher.path as well, since the file has no teacher"
            )
        path = "placeholder" if "--teacher.path" in of_teacher else None
        kind: Any = "model" if path else "ema"
        config = dataclasses.replace(config, teacher=TeacherConfig(path=path, kind=kind))
    return config


def _blank_config() -> Config:
    """Returns a Config for --help, in which every field without a default is required."""
    import tyro

    config = Config(
        workdir="unused",
        teacher=TeacherConfig(path="unused"),
        student=StudentConfig(path="unused"),
        data=DataConfig(path="unused"),
        epochs=1,
    )
    # Validation refuses these values.
    for part in (config.student, config.data):
        object.__setattr__(part, "path", tyro.MISSING)
    object.__setattr__(config.teacher, "path", None)  # another teacher.kind needs none
    object.__setattr__(config, "workdir", tyro.MISSING)
    object.__setattr__(config, "epochs", None)
    return config


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of `main(argv)`: 0 success, 2 user error, 1 any other error.

    Args:
      argv: flags; None: those of this process, which exits here on an error.
    """
    # Without torch transformers would print a warning first.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    open_streams()
    if argv is None:
        threading.excepthook = _report_thread
    status = 0
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BaseException as error:
        status = report_error(error)
        if argv is None and status:
            exit_now(status)
    flush_streams()
    return status


def _report_thread(failed: Any) -> None:
    """Prints a thread's error, unless a file caused it: the main thread meets that one as well."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def exit_now(status: int) -> NoReturn:
    """Ends the process without joining threads: after an error, Orbax's may wait for ever."""
    flush_streams()
    os._exit(status)


_ADVICE = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EACCES: "Make it writable",
    errno.EPERM: "Make it writable",
    errno.EROFS: "Make it writable",
    errno.EFBIG: "Raise the limit of file sizes",
    errno.ENAMETOOLONG: "Give a shorter name",
}


def report_error(error: BaseException) -> int:
    """Prints the exception that ended a command; returns the exit status."""
    if isinstance(error, SystemExit):  # --help, or a signal
        return int(error.code or 0)
    with suppress(OSError):  # without a reader of stderr
        return _print_error(error)
    return 1


def _print_error(error: BaseException) -> int:
    if isinstance(error, BrokenPipeError) and is_unread():  # not a broken connection
        return 1
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, OSError) and (error.errno in _ADVICE or error.filename is not None):
        how = _ADVICE.get(error.errno or 0, "Restore the file or folder")
        print(f"error: {error}. {how}; then run the same command to resume", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def check_out_file(path: str, flag: str, field: str, *, lines: bool = False) -> Path:
    """Returns the path of a JSON file to write.

    Args:
      field: a field of the object; a file that is there must have it to be replaced.
      lines: the file has a line for each object, which has no other field.

    Raises:
      UserError: the folder does not exist, or the path is something else than an earlier result.
    """
    file = out_path(path, flag)
    try:
        earlier = not file.exists() or (file.is_file() and _has(file, field, lines))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        earlier = False
    if not earlier:
        raise UserError(
            f"{flag}: expected a new file, or an earlier result to replace, got {path}, which is "
            "another file. Give another name"
        )
    return file


def _has(file: Path, field: str, lines: bool) -> bool:
    with file.open("rb") as stream:
        if lines:
            return json.loads(stream.readline()).keys() == {field}
        return field in json.loads(stream.read())
