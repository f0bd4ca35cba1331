"""A step's collectives from shapes, and a lower bound of its time. Needs no jax."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kd_jax.models.weight_table import head_weights, layer_weights, trained_weights
from kd_jax.parallel.rules import ROWS_AXIS, Sizes, axes_size
from kd_jax.planning.chips import Topology
from kd_jax.planning.cost import RECOMPUTING, Case, Shares, Work, make_shares


class Transfer(NamedTuple):
    """A collective of a step."""

    kind: str
    num_bytes: int
    """Bytes of the full array on a device: an all-gather's output, a reduce-scatter's input."""
    times: int
    groups: np.ndarray
    """[groups, devices] int, device numbers."""


def transfers(case: Case) -> list[Transfer]:
    """Returns a step's large collectives: of weights, gradients, the residual stream, keys."""
    config, sizes = case.config, case.sizes
    student, teacher = make_shares(case)
    recomputes = config.remat_policy in RECOMPUTING
    found = _of_layers(student, 3 if recomputes else 2, 3 if recomputes else 2)
    trained = trained_weights(config, case.student)
    if student.fsdp > 1:
        found.append(("reduce-scatter", student.in_use(trained, 4), 1, (ROWS_AXIS,)))
    copies = ("data", "context") if student.context > 1 else ("data",)
    found.append(("all-reduce", student.stored(trained, 4), 1, copies))
    found += _of_keys(student, 1 if config.remat_policy == "none" else 2, trained=True)
    if teacher is not None:
        found += _of_layers(teacher, 1, 1, head_only=config.reads_cache)
        found += [] if config.reads_cache else _of_keys(teacher, 1)
    accumulation = config.optim.accumulation_steps
    return [
        Transfer(kind, num_bytes, times * accumulation, _groups(sizes, axes))
        for kind, num_bytes, times, axes in found
        if axes_size(sizes, axes) > 1
    ]


def _of_layers(
    model: Shares, gathers: int, sums: int, head_only: bool = False
) -> list[tuple[str, int, int, tuple]]:
    """Returns a model's collectives; layers are all-gathered and all-reduced that many times."""
    layer, head = layer_weights(model.arch), head_weights(model.arch)
    L = 0 if head_only else model.arch.num_hidden_layers
    found: list[tuple[str, int, int, tuple]] = []
    if model.fsdp > 1:
        found.append(("all-gather", model.in_use(layer, model.itemsize), gathers * L, (ROWS_AXIS,)))
        found.append(("all-gather", model.in_use(head, model.itemsize), 1, (ROWS_AXIS,)))
    if model.tensor > 1:
        found.append(("all-reduce", model.stream, 2 * sums * L, ("tensor",)))
    return found


def _of_keys(
    model: Shares, gathers: int, trained: bool = False
) -> list[tuple[str, int, int, tuple]]:
    """Returns the collectives of whole rows' keys and values, and of their gradients."""
    if model.context == 1:
        return []
    num_bytes, L = model.gathered_keys // 2, model.arch.num_hidden_layers
    found: list[tuple[str, int, int, tuple]] = []
    found.append(("all-gather", num_bytes, 2 * gathers * L, ("context",)))
    if trained:
        found.append(("reduce-scatter", num_bytes, 2 * L, ("context",)))
    return found


def _groups(sizes: Sizes, axes: tuple[str, ...]) -> np.ndarray:
    """Returns the devices that differ only along these axes, [groups, devices]."""
    numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    order = [list(sizes).index(name) for name in (*(x for x in sizes if x not in axes), *axes)]
    return numbers.transpose(order).reshape(-1, axes_size(sizes, axes))


def network_seconds(transfers: Iterable[Transfer], topology: Topology) -> float:
    """Returns the least time of collectives, one after the other, at the links' full speed."""
    return sum(x.times * _transfer_seconds(x, topology) for x in transfers)


def _transfer_seconds(transfer: Transfer, topology: Topology) -> float:
    chip, size = topology.rated_chip, transfer.groups.shape[1]
    if chip is None or size < 2:
        return 0.0
    ways = 2 if transfer.kind == "all-reduce" else 1  # reduced, then gathered
    whole = transfer.kind == "collective-permute"
    sent = ways * transfer.num_bytes * (1.0 if whole else (size - 1) / size)
    hosts = len(np.unique(transfer.groups[0] // (topology.num_devices // topology.num_hosts)))
    abroad = ways * transfer.num_bytes * (hosts - 1) / size  # over all devices' adapters
    return max(sent / chip.link_bandwidth, abroad / chip.network_bandwidth)


def bound_seconds(
    needs: Work, transfers: Iterable[Transfer], topology: Topology
) -> dict[str, float]:
    """Returns the least time of a step's compute, memory and network; {} for unknown speeds.

    The longest is the step's bound, as if the others hid behind it.
    """
    chip = topology.rated_chip
    if chip is None:
        return {}
    flops = needs.flops + needs.recomputed_flops + needs.awaited_flops
    return {
        "compute": flops / chip.flops / topology.num_devices,
        "memory": needs.traffic_bytes / chip.bandwidth,
        "network": network_seconds(transfers, topology),
    }
