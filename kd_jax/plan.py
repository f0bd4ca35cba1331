"""python -m kd_jax.plan --config FILE --topology NAME: memory and speed of a run before it starts.

Needs neither the devices nor the weights.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from kd_jax.config import Config, UserError
from kd_jax.config.checks import Checked, PathText, Range
from kd_jax.config.command import parse_args, parse_config, run_command
from kd_jax.config.flags import split_flags
from kd_jax.models.architecture import Architecture, describe_context, read_architecture
from kd_jax.models.known import KNOWN_MODELS
from kd_jax.parallel.rules import describe_mesh
from kd_jax.planning.chips import GIB, find_topology
from kd_jax.planning.choices import choose_dtypes, choose_remat, with_remat
from kd_jax.planning.cost import Case
from kd_jax.planning.estimate import Report, estimate
from kd_jax.planning.mesh_choice import choose_sizes, remedy, walk
from kd_jax.planning.topology import devices_of, local_topology, prepare
from kd_jax.training.ahead import compile_ahead
from kd_jax.weights.folder import load_architecture, resolve

LISTED = 10  # results of a search that are shown


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanArgs(Checked):
    config: PathText
    """Python file with get_config()."""
    topology: str = "local"
    """Devices: h200:1x8, v5e:2x4, v5p-16, cpu:8, or local for those of this machine."""
    analytic: bool = False
    """Estimate from shapes in under a second, without the compiler."""
    search: bool = False
    """Search batch size, micro-batches, remat and mesh, and plan for the fastest that fits."""
    target_share: Annotated[float, Range(above=0, most=1)] = 1.0
    """Share of the tokens that have a loss; the head computes no others."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(argv: Sequence[str]) -> None:
    own, flags = split_flags(PlanArgs, Config, argv)
    description = f"{__doc__}\nAny flag of kd_jax.train changes the config file's fields."
    args = parse_args(PlanArgs, own, description)
    case, devices = open_case(args, flags)
    if args.search:
        found = walk(case)
        if not found:
            limit = case.topology.memory_limit / GIB
            raise UserError(
                f"--search: expected a run that fits {case.topology.num_devices} devices of "
                f"{limit:.1f} GiB, found none. {remedy(case)}"
            )
        if not args.json:
            print(describe_walk([report for _, report in found[:LISTED]]))
        case = found[0][0]
    report = estimate(case) if args.analytic else compile_ahead(case, devices)
    if args.search:
        report["search"] = [report for _, report in found[:LISTED]]
    print(json.dumps(report) if args.json else describe(report))


def open_case(args: PlanArgs, flags: Sequence[str]) -> tuple[Case, Sequence[Any]]:
    """Returns the run to plan, and the devices to compile it for; none with --analytic.

    Raises:
      UserError: for a wrong topology, compiler, config, model or mesh.
    """
    topology = find_topology(args.topology)
    config = parse_config(["--config", args.config, *flags])
    student = find_architecture(config.student.path, "student.path")
    teacher = None
    if config.teacher is not None and config.distils:
        own = config.teacher.path
        teacher = student if own is None else find_architecture(own, "teacher.path")
    for arch, field in ((student, "student"), (teacher, "teacher")):
        if arch is not None and (line := describe_context(arch, config.data.seq_len, field)):
            print(line, file=sys.stderr)
    devices: Sequence[Any] = ()
    if not args.analytic or topology.name == "local":
        prepare(topology)
        from kd_jax.setup.runtime import start_jax

        start_jax()
        devices = devices_of(topology)
    if topology.name == "local":
        topology = local_topology(devices)
    if args.search and topology.rated_chip is None:
        raise UserError(
            f"--search: expected devices of known speed, got {args.topology}. Name one such as "
            "h200:1x8"
        )
    case = Case(
        config=choose_dtypes(config, topology.platform),
        student=student,
        teacher=teacher,
        sizes={},
        topology=topology,
        target_share=args.target_share,
    )
    if args.search:
        return case, devices
    sizes = choose_sizes(config, student, teacher, topology)
    case = dataclasses.replace(case, sizes=sizes)
    return with_remat(case, choose_remat(case)), devices


def find_architecture(path: str, field: str) -> Architecture:
    """Returns the architecture of a folder or hub id; well-known ones need no download."""
    if path in KNOWN_MODELS and not Path(path).is_dir():
        return read_architecture(KNOWN_MODELS[path], path)
    return load_architecture(resolve(path, field, ["config.json"]))


def describe(report: Report) -> str:
    """Returns a report as text: memory, collectives, time."""
    parts = [_describe_memory(report), _describe_program(report), _describe_time(report)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _describe_memory(report: Report) -> list[str]:
    kinds = report["bytes_by_kind"] | {"temporaries": report["temporary_bytes_per_device"]}
    peak, limit = (report[f"{name}_bytes_per_device"] / GIB for name in ("peak", "limit"))
    verdict = "fits" if report["fits"] else "does not fit"
    rest = "left" if report["fits"] else "too much"
    dtypes = ", ".join(f"{name} {dtype}" for name, dtype in report["dtypes"].items())
    return [
        f"{report['topology']}, {report['devices']} devices: {describe_mesh(report['mesh'])}",
        f"{report['batch_size']:,} rows of {report['seq_len']:,} tokens a step, "
        f"{report['accumulation_steps']} micro-batches, remat {report['remat']}, {dtypes}",
        "",
        f"{verdict}: {peak:.2f} of {limit:.2f} GiB a device, {abs(limit - peak):.2f} {rest}",
        *(f"  {name:20}{value / GIB:9.2f} GiB" for name, value in kinds.items()),
    ]


def _describe_program(report: Report) -> list[str]:
    lines = []
    if "largest_temporaries" in report:
        lines.append("largest arrays of the program, not all alive at once")
        lines += [
            f"  {x['num_bytes'] / GIB:9.3f} GiB  {x['shape']:27} {x['opcode']:19} {x['source']}"
            for x in report["largest_temporaries"]
        ]
        lines.append("")
    lines.append("sent and received by each device in a step")
    lines += [
        f"  {kind:20}{x['bytes'] / GIB:9.2f} GiB in {x['count']:,} collectives"
        for kind, x in report["collectives"].items()
    ]
    return lines if report["collectives"] else lines[:-2]


def _describe_time(report: Report) -> list[str]:
    again = report["recomputed_flops_per_step"]
    lines = [f"{report['flops_per_step']:.3g} FLOP a step, and {again:.3g} recomputed by remat"]
    if report["bound_step_seconds"] is not None:
        parts = ", ".join(f"{name} {x:.3g} s" for name, x in report["bound_seconds"].items())
        lines.append(
            f"at least {report['bound_step_seconds']:.3g} s a step, at most "
            f"{report['bound_tokens_per_second']:,.0f} tokens/s: {parts}"
        )
        if report["cache_bytes_per_step"]:
            rate = report["cache_bytes_per_step"] / report["bound_step_seconds"]
            lines.append(f"reads at most {rate / 1e9:.3g} GB/s from teacher.cache, over all hosts")
    if report["method"] == "compiled":
        guess = report["analytic_peak_bytes_per_device"] / GIB
        lines.append(
            f"compiled in {report['compile_seconds']:.0f} s; estimated from shapes: {guess:.2f} GiB"
        )
    else:
        lines.append("estimated from shapes; without --analytic the program is compiled")
    return lines


def describe_walk(found: Sequence[Report]) -> str:
    """Returns the first reports of a search as a table."""
    lines = ["      tokens/s  GiB a device   rows  in  remat      mesh"]
    for x in found:
        lines.append(
            f"  {x['bound_tokens_per_second']:12,.0f}{x['peak_bytes_per_device'] / GIB:14.1f}"
            f"{x['batch_size']:7}{x['accumulation_steps']:4}  {x['remat']:11}"
            f"{describe_mesh(x['mesh'])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
