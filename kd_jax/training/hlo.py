"""Reads a compiled program's HLO text: its collectives and its largest arrays."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd_jax.planning.network import Transfer

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip

_BITS = {"pred": 8, "s4": 4, "u4": 4}  # dtypes whose names do not end in a multiple of 8

# The type of these is (input, output, ...); that of other asynchronous instructions is
# ((inputs), output, ...).
_WITH_INPUTS = {"all-gather-start", "reduce-scatter-start", "collective-permute-start"}

_FUSIONS = {"fusion", "fusion-start"}

_PACKAGE = f"{Path(__file__).parents[1]}/"

_NO_ARRAY = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[str, ...]
    """Its outputs, such as bf16[8,2048]."""
    line: str

    @property
    def num_bytes(self) -> int:
        return sum(map(shape_bytes, self.shapes))


@dataclass(frozen=True, slots=True)
class HloModule:
    computations: dict[str, list[Instruction]]
    entry: str
    sources: dict[str, str] = field(default_factory=dict)
    """room/file.py:line in kd_jax by stack_frame_id."""


class Collective(NamedTuple):
    transfer: Transfer
    shapes: tuple[str, ...]
    loops: tuple[str, ...]
    """Names of the loops around it, outermost first."""
    source: str


def read_module(text: str) -> HloModule:
    """Returns the computations of a compiled program, from `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            current = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None:
            current += _instructions(line)
    return HloModule(computations, entry, _sources(text))


def _instructions(line: str) -> Iterator[Instruction]:
    found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line)
    if not found:
        return
    kind = next(_split(found[2], " "))
    opcode = found[2][len(kind) + 1 :].partition("(")[0]
    parts = [kind]
    if kind.startswith("((") or (kind.startswith("(") and opcode in _WITH_INPUTS):
        parts = list(_split(kind[1:-1], ","))[1:2]
    shapes = tuple(shape for part in parts for shape in re.findall(r"\w+\[[\d,]*\]", part))
    yield Instruction(found[1], opcode, shapes, line)


def _split(text: str, mark: str) -> Iterator[str]:
    """Yields the parts of a text between the marks that no brackets enclose."""
    start = depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and depth == 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array by its HLO shape, such as bf16[8,2048]."""
    dtype, _, sizes = shape.rstrip("]").partition("[")
    digits = re.match(r"[a-z]+(\d+)", dtype)
    bits = _BITS.get(dtype) or (int(digits[1]) if digits else 0)
    return math.prod(map(int, filter(None, sizes.split(",")))) * bits // 8


def _sources(text: str) -> dict[str, str]:
    """Returns the innermost line of this package by stack frame."""
    names = text.partition("\nFileNames\n")[2].partition("\n\n")[0]
    files = dict(re.findall(r'^(\d+) "(.*)"$', names, re.M))
    places = {
        m[1]: (files.get(m[2], ""), m[3])
        for m in re.finditer(r"^(\d+) \{file_name_id=(\d+) .*? line=(\d+) ", text, re.M)
    }
    frames = {
        m[1]: (m[2], m[3])
        for m in re.finditer(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", text, re.M)
    }
    found: dict[str, str] = {}
    for frame, (place, above) in frames.items():  # callers come first
        file, line = places.get(place, ("", ""))
        own = f"{file.removeprefix(_PACKAGE)}:{line}" if file.startswith(_PACKAGE) else ""
        if source := own or found.get(above):
            found[frame] = source
    return found


def _source(module: HloModule, line: str) -> str:
    """Returns an instruction's file and line in this package, or else jax's name of it."""
    frame = re.search(r"stack_frame_id=(\d+)", line)
    name = re.search(r'op_name="([^"]*)"', line)
    place = module.sources.get(frame[1], "") if frame else ""
    return place or (name[1].removeprefix("jit(train_step)/") if name else "")


def _walk(
    module: HloModule, loop_trips: int
) -> Iterator[tuple[Instruction, int, tuple[str, ...], bool]]:
    """Yields each instruction, how often it runs, the loops around it, and whether it is inside a
    fusion, where arrays take no memory.

    Args:
      loop_trips: trips of a loop whose number is not known before it runs.
    """
    stack: list[tuple[str, int, tuple[str, ...], bool]] = [(module.entry, 1, (), False)]
    while stack:
        name, times, loops, fused = stack.pop()
        for one in module.computations.get(name, ()):
            yield one, times, loops, fused
            inner, around = times, loops
            if one.opcode == "while":
                inner = times * (trips(module, one) or loop_trips)
                around = (*loops, one.name)
            called = re.findall(r"(?:body|calls|to_apply|_computation)=%?([\w.-]+)", one.line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", one.line):
                called += re.findall(r"%?([\w.-]+)", group)
            stack += [(child, inner, around, fused or one.opcode in _FUSIONS) for child in called]


def trips(module: HloModule, loop: Instruction) -> int | None:
    """Returns a loop's trips: the compiler's count, or the constant in its condition; or None."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.line)
    lines = [one.line for one in module.computations.get(condition[1] if condition else "", ())]
    limits = [int(x) for line in lines for x in re.findall(r" s32\[\]\S* constant\((\d+)\)", line)]
    return max(limits, default=None)


def collectives(module: HloModule, loop_trips: int = 1) -> list[Collective]:
    """Returns the program's collectives; one inside two asynchronous fusions counts once.

    Those of a shard_map all have channel 1, so a channel tells copies apart only inside fusions.
    """
    found: dict[tuple, Collective] = {}
    for one, times, loops, fused in _walk(module, loop_trips):
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups = device_groups(one.line)
        num_bytes = one.num_bytes
        if kind == "reduce-scatter":
            num_bytes *= groups.shape[1]
        channel = re.search(r"channel_id=(\d+)", one.line)
        key = (kind, channel[1] if fused and channel else one.name, loops)
        source = _source(module, one.line)
        transfer = Transfer(kind, num_bytes, times, groups)
        found.setdefault(key, Collective(transfer, one.shapes, loops, source))
    return list(found.values())


def device_groups(line: str) -> np.ndarray:
    """Returns the device groups of a collective, [groups, devices] int."""
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", line):
        return np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    text = line.partition("replica_groups=")[2]
    if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(found[2], found[3]).reshape(_numbers(found[1]))
    if found := _MESH_GROUPS.match(text):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        numbers = _iota(found[2] or str(math.prod(axes.values())), found[3])
        inner = re.findall(r"'([^']+)'", found[4])
        outer = [name for name in axes if name not in inner]
        order = [list(axes).index(name) for name in (*outer, *inner)]
        numbers = numbers.reshape(list(axes.values())).transpose(order)
        return numbers.reshape(-1, math.prod(axes[name] for name in inner))
    groups = re.findall(r"\{([\d,]+)\}", text.partition("}}")[0] + "}")
    return np.array([[int(x) for x in group.split(",")] for group in groups], int)


_MESH_GROUPS = re.compile(
    r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Returns an array of these sizes that counts from 0, transposed to this order."""
    numbers = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


class Largest(NamedTuple):
    num_bytes: int
    shape: str
    opcode: str
    source: str


def largest_arrays(module: HloModule, count: int) -> list[Largest]:
    """Returns the largest arrays that the program makes, one for each shape and source line.

    They are not all alive at once.
    """
    found: dict[tuple[str, str], Largest] = {}
    for one, _, _, fused in _walk(module, 1):
        if fused or one.opcode in _NO_ARRAY or one.opcode.endswith("-done"):
            continue
        for shape in one.shapes:
            source = _source(module, one.line)
            array = Largest(shape_bytes(shape), shape, one.opcode, source)
            found.setdefault((shape, source), array)
    return sorted(found.values(), key=lambda x: (-x.num_bytes, x.shape, x.source))[:count]
