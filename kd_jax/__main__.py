"""python -m kd_jax, or kd-jax: lists the commands; kd-jax NAME is python -m kd_jax.NAME."""

import ast
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import convert
import kd_jax
from kd_jax.config.command import report_error, run_command
from kd_jax.config.errors import UserError, did_you_mean


def find_commands() -> dict[str, str]:
    """Returns the module of each command, by the command's name."""
    found = {}
    for package in (kd_jax, convert):
        for module in pkgutil.iter_modules(package.__path__):
            if not module.ispkg and module.name != "__main__":
                found[module.name.replace("_", "-")] = f"{package.__name__}.{module.name}"
    return found


def describe(module: str) -> str:
    """Returns the first line of a command's docstring, without the command and without import."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    return docstring.partition("\n")[0].partition(": ")[2]


def list_commands(argv: Sequence[str]) -> None:
    print("kd-jax NAME [FLAGS], where NAME --help lists the flags:\n")
    for name, module in find_commands().items():
        print(f"  {name:10}{describe(module)}")


def main() -> int:
    """Runs the command that the first argument names; returns the exit status."""
    name = sys.argv[1].replace("_", "-") if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        return run_command(list_commands, [])
    commands = find_commands()
    if name not in commands:
        hint = did_you_mean(name, commands) or f" There are {', '.join(commands)}"
        return report_error(UserError(f"kd-jax {sys.argv[1]}: no such command.{hint}"))
    sys.argv[1:] = sys.argv[2:]
    return run_command(importlib.import_module(commands[name]).main)


if __name__ == "__main__":
    sys.exit(main())
