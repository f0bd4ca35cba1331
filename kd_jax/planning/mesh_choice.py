"""Search for layouts, batch sizes and remat policies that fit, fastest first. Needs no jax."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import get_args

from kd_jax.config import Config, Remat, UserError
from kd_jax.config.errors import raise_all
from kd_jax.models.architecture import Architecture
from kd_jax.models.weight_table import weights
from kd_jax.parallel.rules import (
    AXES,
    BATCH_AXES,
    Sizes,
    axes_size,
    context_size,
    describe_mesh,
    mesh_axes,
    mesh_sizes,
    split,
    uneven_rows,
    wanted_split,
)
from kd_jax.planning.chips import GIB, Topology
from kd_jax.planning.cost import Case
from kd_jax.planning.estimate import Report, estimate

MARGIN = 0.9
"""Share of a device's memory that an estimate may fill: its own error is of that size."""

BATCH_FACTORS = (0.25, 0.5, 1, 2, 4, 8)

ACCUMULATION = (1, 2, 4, 8, 16)

REMAT = get_args(Remat)


def choose_sizes(
    config: Config, student: Architecture, teacher: Architecture | None, topology: Topology
) -> dict[str, int]:
    """Returns the devices along each axis; axes that the config leaves at 0 are chosen.

    Chooses the fastest layout that fits by `estimate`; of equals, the one that shards weights
    least; if none is certain to fit, the one with the lowest peak. Tokens of a row are split over
    devices only where no other layout fits. Weights are not sharded on devices of unknown memory.

    Raises:
      UserError: no layout divides the models, or none holds them.
    """
    asked = [name for name in ("fsdp", "tensor") if getattr(config.mesh, name)]
    if topology.chip is None or len(asked) == 2:
        rows = config.data.batch_size // config.optim.accumulation_steps
        sizes = mesh_sizes(config.mesh, topology.num_devices, rows)
        check_layout(config, sizes, student=student, teacher=teacher)
        return sizes
    case = Case(config=config, student=student, teacher=teacher, sizes={}, topology=topology)
    found = [estimate(one) for one in layouts(case)]
    if found and not any(map(fits, found)):
        found += [estimate(one) for one in layouts(case, split_rows=True)]
    if not found:  # raises the reason
        plain = {name: getattr(config.mesh, name) or 1 for name in ("fsdp", "tensor")}
        return choose_sizes(_with_sizes(config, **plain), student, teacher, topology)
    fitting = [report for report in found if fits(report)]
    if fitting:
        return min(fitting, key=slowness)["mesh"]
    least = min(found, key=lambda report: report["peak_bytes_per_device"])
    if MARGIN * least["peak_bytes_per_device"] <= least["limit_bytes_per_device"]:
        return least["mesh"]  # it may fit
    raise UserError(
        f"mesh: expected a layout that holds the run on {topology.num_devices} devices of "
        f"{least['limit_bytes_per_device'] / GIB:.1f} GiB, got "
        f"{least['peak_bytes_per_device'] / GIB:.1f} GiB a device with the lowest peak, "
        f"{describe_mesh(least['mesh'])}. {remedy(case)}. --mesh.fsdp and --mesh.tensor "
        "set a layout without this check"
    )


def layouts(case: Case, split_rows: bool = False) -> Iterator[Case]:
    """Yields the case in every layout that its config allows and that divides the models.

    Args:
      split_rows: a context that the config leaves open is above 1; otherwise it is 1.
    """
    config, num_devices = case.config, case.topology.num_devices
    rows = config.data.batch_size // config.optim.accumulation_steps
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    asked = [getattr(config.mesh, name) for name in AXES]
    choices = [divisors if size in (-1, 0) else [size] for size in asked]
    if config.mesh.context == 0:
        choices[AXES.index("context")] = divisors[1:] if split_rows else [1]
    elif split_rows:
        return
    for values in itertools.product(*choices):
        sizes = mesh_axes(dict(zip(AXES, values, strict=True)))
        if math.prod(values) != num_devices or rows % axes_size(sizes, BATCH_AXES):
            continue
        try:
            check_layout(config, sizes, student=case.student, teacher=case.teacher)
        except UserError:
            continue
        yield dataclasses.replace(case, sizes=sizes)


def walk(case: Case) -> list[tuple[Case, Report]]:
    """Returns all batch sizes, micro-batches, remat policies and allowed layouts that fit, with
    their estimates, fastest first. Tokens of a row are split only if nothing fits otherwise."""
    return _walk(case) or _walk(case, split_rows=True)


def _walk(case: Case, split_rows: bool = False) -> list[tuple[Case, Report]]:
    config, found = case.config, list[Case]()
    own = config.data.batch_size
    for factor, steps, remat in itertools.product(BATCH_FACTORS, ACCUMULATION, REMAT):
        rows = int(own * factor)
        if rows % steps or rows < steps:
            continue
        data = dataclasses.replace(config.data, batch_size=rows)
        optim = dataclasses.replace(config.optim, accumulation_steps=steps)
        try:
            changed = dataclasses.replace(config, data=data, optim=optim, remat=remat)
        except UserError:  # on-policy.fraction of so few rows is less than one
            continue
        found += layouts(dataclasses.replace(case, config=changed), split_rows)

    def order(pair: tuple[Case, Report]) -> tuple:
        report = pair[1]
        return _seconds(report), abs(math.log(report["batch_size"] / own)), slowness(report)

    pairs = ((one, estimate(one)) for one in found)
    return sorted((pair for pair in pairs if fits(pair[1])), key=order)


def fits(report: Report) -> bool:
    """Returns True if the estimated peak leaves a tenth of a device's memory free."""
    return report["peak_bytes_per_device"] <= MARGIN * report["limit_bytes_per_device"]


def slowness(report: Report) -> tuple:
    """Returns a sort key: time of a token, micro-batches, splits of rows and weights, memory."""
    mesh = report["mesh"]
    splits = (report["accumulation_steps"], context_size(mesh), mesh["tensor"], mesh["fsdp"])
    return _seconds(report), *splits, report["peak_bytes_per_device"]


def _seconds(report: Report) -> float:
    speed = report["bound_tokens_per_second"]
    return 1 / speed if speed else 0.0  # unknown: all the same


def _with_sizes(config: Config, **sizes: int) -> Config:
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))


def remedy(case: Case) -> str:
    """Returns advice for a run that does not fit: smaller steps, or more devices."""
    open_mesh = _with_sizes(case.config, data=-1, fsdp=0, tensor=0, context=0)
    if found := walk(dataclasses.replace(case, config=open_mesh)):
        best = found[0][1]
        return (
            f"It fits with --optim.accumulation-steps {best['accumulation_steps']} --remat "
            f"{best['remat']} --data.batch-size {best['batch_size']} and the mesh "
            f"{describe_mesh(best['mesh'])}"
        )
    return "It needs more devices, or devices with more memory"


def check_layout(config: Config, sizes: Sizes, **models: Architecture | None) -> None:
    """Raises UserError with everything in the models, by field, that the mesh does not divide."""
    found = {field: arch for field, arch in models.items() if arch is not None}
    runs = config.fills_cache or not config.reads_cache
    loaded = {x: arch for x, arch in found.items() if x != "teacher" or runs}
    problems = [x for field, arch in loaded.items() for x in _problems(config, sizes, field, arch)]
    size = min(arch.vocab_size for arch in found.values())
    if size % sizes["tensor"]:
        problems.append(
            f"mesh.tensor: expected a divisor of the vocabulary's {size} entries, got "
            f"{sizes['tensor']}"
        )
    lengths = {"data.seq-len": config.data.seq_len}
    if config.prompts_teacher:
        lengths["teacher.seq-len"] = config.teacher_seq_len
    raise_all([*problems, *uneven_rows(sizes, lengths)])


def _problems(config: Config, sizes: Sizes, field: str, arch: Architecture) -> list[str]:
    part = config.student if field == "student" else config.teacher_part
    assert part is not None
    axes, tolerance = part.shard_over, config.mesh.unsharded_tolerance
    problems, whole, total = [], {}, 0
    size, N, K = sizes["tensor"], arch.num_attention_heads, arch.num_key_value_heads
    if "tensor" in axes and (N % size or (K % size and size % K)):
        problems.append(
            f"mesh.tensor: expected a divisor of the {field}'s {N} query heads that divides "
            f"its {K} key/value heads or is a multiple of them, got {size}"
        )
    for name, weight in weights(arch).items():
        count = math.prod(weight.shape)
        total += count
        if split(sizes, axes, weight.dims, weight.shape) != wanted_split(sizes, axes, weight.dims):
            whole[name] = count
    if sum(whole.values()) > tolerance * total:
        wanted = ", ".join(f"{axis} {sizes[axis]}" for axis in axes)
        problems.append(
            f"mesh: expected dimensions of the {field} that divide by {wanted} for all but "
            f"{tolerance:.0%} of its weights, got {sum(whole.values()) / total:.0%} that do not: "
            f"{', '.join(whole)}. Choose other mesh.* sizes, or raise mesh.unsharded-tolerance"
        )
    return problems
