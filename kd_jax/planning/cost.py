"""What a step needs, from shapes alone: bytes on a device, FLOPs, the least time. Needs no jax."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kd_jax.config import Config, StudentConfig, TeacherConfig
from kd_jax.models.architecture import Architecture
from kd_jax.models.table import Weight, adapter_weights, layer_weights, trained_weights, weights
from kd_jax.parallel.rules import BATCH_AXES, ROWS_AXIS, Sizes, axes_size, row_axes, split
from kd_jax.planning.chips import GIB, Chip, Topology

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


BATCH_BYTES = 4 + 4 + 4 + 1  # tokens, positions, segment ids, loss mask of one token


def chunk_tokens(
    wanted: int | None,
    chip: Chip | None,
    vocab_size: int,
    num_tokens: int,
    *,
    on_cpu: bool,
    head_trainable: bool,
) -> int:
    """Returns how many of a device's tokens are in a chunk, of its `vocab_size` entries each.

    None takes what docs/benchmarks.md found best on a CPU, little more than its caches hold; on an
    accelerator, whose matrix units want many rows, what makes two float32 logits fill a 32nd of its
    memory, a gibibyte at most; two where each chunk reads and writes the gradient of the head. One
    that is not known has a gibibyte.
    """
    if wanted is None:
        most = 2 * GIB if head_trainable else GIB
        room = min(most, chip.memory_bytes // 32 if chip else GIB)
        wanted = 80 if on_cpu else max(128, room // (2 * 4 * vocab_size) // 128 * 128)
    return min(wanted, num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one optimizer step needs."""

    flops: float
    """Of all devices: products of weights, attention and heads, forward and backward."""
    recomputed_flops: float
    """That remat adds."""
    traffic_bytes: float
    """Between a device and its memory: weights, optimizer state, what is kept for the backward
    pass, and logits, each written and read once a use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one device."""

    teacher: int = 0
    student: int = 0
    """Its frozen weights."""
    trainable: int = 0
    optimizer: int = 0
    """The moments of what is trained."""
    batch: int = 0
    temporaries: dict[str, int] = field(default_factory=dict)
    """By the phase of the step; the largest of them counts."""

    @property
    def arguments(self) -> int:
        return self.teacher + self.student + self.trainable + self.optimizer + self.batch

    @property
    def peak(self) -> int:
        return self.arguments + max(self.temporaries.values(), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """One model on one device, in one micro-batch."""

    arch: Architecture
    sizes: Sizes
    axes: tuple[str, ...]
    """That split its weights."""
    tokens: int
    itemsize: int
    """Bytes of its activations' dtype."""

    @property
    def tensor(self) -> int:
        """Devices that share heads and hidden units."""
        return self.sizes["tensor"] if "tensor" in self.axes else 1

    @property
    def fsdp(self) -> int:
        """Devices that share each weight and gather it where it is used."""
        return self.sizes[ROWS_AXIS] if ROWS_AXIS in self.axes else 1

    def stored(self, table: Mapping[str, Weight], itemsize: int) -> int:
        """Returns the bytes that a device keeps of these weights."""
        return sum(_share(self.sizes, self.axes, weight) for weight in table.values()) * itemsize

    def in_use(self, table: Mapping[str, Weight], itemsize: int) -> int:
        """Returns the bytes of these weights gathered for a product."""
        axes = tuple(axis for axis in self.axes if axis != ROWS_AXIS)
        return sum(_share(self.sizes, axes, weight) for weight in table.values()) * itemsize

    @property
    def stream(self) -> int:
        """Bytes of hidden states."""
        return self.tokens * self.arch.hidden_size * self.itemsize

    @property
    def heads(self) -> int:
        """Bytes of queries, and of attention's output."""
        width = self.arch.num_attention_heads * self.arch.head_dim
        return self.tokens * width * self.itemsize // self.tensor

    @property
    def keys(self) -> int:
        """Bytes of keys, and of values."""
        width = max(self.arch.num_key_value_heads, self.tensor) * self.arch.head_dim
        return self.tokens * width * self.itemsize // self.tensor

    @property
    def hidden(self) -> int:
        """Bytes of an array of the MLP's hidden units."""
        return self.tokens * self.arch.intermediate_size * self.itemsize // self.tensor

    def kept(self, remat: str, rank: int) -> int:
        """Returns the bytes of one layer's activations that its backward pass takes."""
        statistics = self.tokens * self.arch.num_attention_heads * 4 // self.tensor
        low = 7 * self.tokens * rank * self.itemsize
        products = 3 * self.stream + self.heads + 2 * self.keys + 2 * self.hidden + low
        return {
            "layer": self.stream,
            "attention": self.stream + self.heads + statistics,
            "dots": products + self.heads + statistics,
            "none": products + 3 * self.stream + 3 * self.heads + 2 * self.keys + 4 * self.hidden,
        }[remat]


def _share(sizes: Sizes, axes: tuple[str, ...], weight: Weight) -> int:
    """Returns the entries of a weight on one device."""
    parts = split(sizes, axes, weight.dims, weight.shape)
    return math.prod(weight.shape) // axes_size(sizes, [axis for part in parts for axis in part])


def make_shares(
    config: Config, part: StudentConfig | TeacherConfig, arch: Architecture, sizes: Sizes
) -> Shares:
    rows = config.data.batch_size // config.optim.accumulation_steps
    share = rows // axes_size(sizes, row_axes(sizes, part.shard_over, rows))
    return Shares(
        arch=arch,
        sizes=sizes,
        axes=part.shard_over,
        tokens=share * config.data.seq_len,
        itemsize=DTYPE_BYTES[part.dtype],
    )


def count(table: Mapping[str, Weight]) -> int:
    return sum(math.prod(weight.shape) for weight in table.values())


def layer_flops(arch: Architecture, seq_len: int) -> tuple[float, float]:
    """Returns the forward FLOP of a token in all layers: of their weights, and of attention, whose
    two products take half of a row."""
    L = arch.num_hidden_layers
    pairs = L * arch.num_attention_heads * arch.head_dim * seq_len / 2
    matrices = {n: w for n, w in layer_weights(arch).items() if len(w.shape) == 2}
    return 2.0 * L * count(matrices), 4.0 * pairs


def step_flops(
    config: Config,
    student: Architecture,
    teacher: Architecture | None,
    num_tokens: int,
    num_targets: float,
) -> tuple[float, float]:
    """Returns the FLOP that one optimizer step needs, and those that remat adds.

    2 FLOP for each weight of the layers and each token forward, as many again for the gradient of
    its input in the student, and of itself where it is trained; attention likewise; both heads and
    the student's gradients for tokens with a loss alone.
    """
    full = config.trainable == "full"
    products, attention = layer_flops(student, config.data.seq_len)
    adapters = 0.0 if full else 2.0 * count(adapter_weights(config.lora, student))
    head = 2.0 * student.vocab_size * student.hidden_size
    passes = 3 if full else 2
    needed = num_tokens * (passes * products + 3 * adapters + 3 * attention)
    needed += num_targets * passes * head
    if teacher is not None:
        needed += num_tokens * sum(layer_flops(teacher, config.data.seq_len))
        needed += num_targets * 2.0 * teacher.vocab_size * teacher.hidden_size
    again = {"layer": products + adapters + attention, "attention": products + adapters}
    return needed, num_tokens * again.get(config.remat, 0.0)


def work(
    config: Config,
    student: Architecture,
    teacher: Architecture | None,
    sizes: Sizes,
    target_share: float = 1.0,
) -> Work:
    """Returns what a step needs; `target_share` of its tokens have a loss."""
    num_tokens = config.data.batch_size * config.data.seq_len
    flops, again = step_flops(config, student, teacher, num_tokens, target_share * num_tokens)
    accumulation = config.optim.accumulation_steps
    ours = make_shares(config, config.student, student, sizes)
    trained = ours.stored(trained_weights(config, student), 4)
    passes = 3 if config.remat in ("layer", "attention") else 2
    each = (
        1.0
        * passes
        * ours.in_use(layer_weights(student), ours.itemsize)
        * student.num_hidden_layers
    )
    kept = ours.kept(config.remat, config.lora.rank) * student.num_hidden_layers
    entries = student.vocab_size // sizes["tensor"]
    targets = target_share * num_tokens / accumulation / axes_size(sizes, BATCH_AXES)
    each += 2 * kept + 2 * targets * entries * 4
    if teacher is not None and config.teacher is not None:
        theirs = make_shares(config, config.teacher, teacher, sizes)
        layers = theirs.in_use(layer_weights(teacher), theirs.itemsize)
        each += layers * teacher.num_hidden_layers + 2 * targets * entries * 4
    # Weights and both moments are read and written, the gradients too.
    return Work(
        flops=flops, recomputed_flops=again, traffic_bytes=accumulation * each + 8 * trained
    )


def memory(
    config: Config,
    student: Architecture,
    teacher: Architecture | None,
    sizes: Sizes,
    topology: Topology,
) -> Memory:
    """Returns an estimate of what XLA takes; docs/planning.md has it beside what it took."""
    lora = config.trainable == "lora"
    ours = make_shares(config, config.student, student, sizes)
    trained = trained_weights(config, student)
    trainable = ours.stored(trained, 4)
    theirs = None
    if teacher is not None and config.teacher is not None:
        theirs = make_shares(config, config.teacher, teacher, sizes)
    tokens = config.data.batch_size * config.data.seq_len // axes_size(sizes, BATCH_AXES)
    return Memory(
        teacher=theirs.stored(weights(theirs.arch), theirs.itemsize) if theirs else 0,
        student=ours.stored(weights(student), ours.itemsize) if lora else 0,
        trainable=trainable,
        optimizer=2 * trainable,
        batch=tokens * BATCH_BYTES,
        temporaries=_temporaries(config, ours, theirs, trained, topology),
    )


def _temporaries(
    config: Config,
    ours: Shares,
    theirs: Shares | None,
    trained: Mapping[str, Weight],
    topology: Topology,
) -> dict[str, int]:
    rank = config.lora.rank if config.trainable == "lora" else 0
    L = ours.arch.num_hidden_layers
    kept = L * ours.kept(config.remat, rank)
    gradients = ours.stored(trained, 4)
    summed = gradients if config.optim.accumulation_steps > 1 else 0
    layer = 2 * ours.hidden + 2 * ours.stream + ours.heads
    found = {"backward": kept + summed + gradients + 2 * layer + _gathered_layer(ours)}
    tokens = config.data.batch_size * config.data.seq_len
    tokens //= config.optim.accumulation_steps * axes_size(ours.sizes, BATCH_AXES)
    entries = ours.arch.vocab_size // ours.sizes["tensor"]
    full = config.trainable == "full"
    C = chunk_tokens(
        config.loss.chunk_tokens,
        topology.chip,
        entries,
        tokens,
        on_cpu=topology.chip is None,
        head_trainable=full,
    )
    models = [ours] if theirs is None else [ours, theirs]
    head = sum(C * entries * (4 + 1) + 2 * m.stream for m in models)
    head += sum(_gathered_head(m, topology) for m in models if m.fsdp > 1)
    if full:
        head += ours.in_use(_head(ours.arch), 4 + ours.itemsize)
    found["head"] = kept + summed + head
    if theirs is not None:
        found["teacher"] = 2 * (theirs.hidden + theirs.stream) + _gathered_layer(theirs)
    return found


def _gathered_layer(model: Shares) -> int:
    """Returns the bytes of layers gathered for use: one at work and the next on its way."""
    if model.fsdp == 1:
        return 0
    return 2 * model.in_use(layer_weights(model.arch), model.itemsize)


def _gathered_head(model: Shares, topology: Topology) -> int:
    """Returns the bytes of a head gathered for use; a TPU copies parts that fill no tiles of 8."""
    ragged = model.arch.vocab_size // (model.fsdp * model.tensor) % 8 > 0
    copies = 2 if ragged and topology.chip and topology.chip.platform == "tpu" else 1
    return copies * model.in_use(_head(model.arch), model.itemsize)


def _head(arch: Architecture) -> dict[str, Weight]:
    return {"head": Weight((arch.vocab_size, arch.hidden_size), ("vocab", "embed"))}


class Transfer(NamedTuple):
    """A collective of a step."""

    kind: str
    num_bytes: int
    """Of the whole array on a device: an all-gather's output, a reduce-scatter's input."""
    times: int
    groups: np.ndarray
    """[groups, devices] of device numbers."""


def transfers(
    config: Config, student: Architecture, teacher: Architecture | None, sizes: Sizes
) -> list[Transfer]:
    """Returns the collectives of a step that count: of weights, their gradients, hidden states."""
    ours = make_shares(config, config.student, student, sizes)
    passes = 3 if config.remat in ("layer", "attention") else 2
    found = _of_layers(ours, passes, 2 if config.remat in ("dots", "none") else 3)
    trained = trained_weights(config, student)
    if ours.fsdp > 1:
        found.append(("reduce-scatter", ours.in_use(trained, 4), 1, (ROWS_AXIS,)))
    found.append(("all-reduce", ours.stored(trained, 4), 1, ("data",)))
    if teacher is not None and config.teacher is not None:
        found += _of_layers(make_shares(config, config.teacher, teacher, sizes), 1, 1)
    accumulation = config.optim.accumulation_steps
    return [
        Transfer(kind, num_bytes, times * accumulation, _groups(sizes, axes))
        for kind, num_bytes, times, axes in found
        if axes_size(sizes, axes) > 1
    ]


def _of_layers(model: Shares, gathers: int, sums: int) -> list[tuple[str, int, int, tuple]]:
    """Returns what a model sends: weights gathered in `gathers` passes, halves of layers summed."""
    L, layer, head = model.arch.num_hidden_layers, layer_weights(model.arch), _head(model.arch)
    found: list[tuple[str, int, int, tuple]] = []
    if model.fsdp > 1:
        found.append(("all-gather", model.in_use(layer, model.itemsize), gathers * L, (ROWS_AXIS,)))
        found.append(("all-gather", model.in_use(head, model.itemsize), 1, (ROWS_AXIS,)))
    if model.tensor > 1:
        found.append(("all-reduce", model.stream, 2 * sums * L, ("tensor",)))
    return found


def _groups(sizes: Sizes, axes: tuple[str, ...]) -> np.ndarray:
    """Returns the devices that differ along these axes alone, [groups, devices]."""
    numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    order = [list(sizes).index(name) for name in (*(x for x in sizes if x not in axes), *axes)]
    return numbers.transpose(order).reshape(-1, axes_size(sizes, axes))


def network_seconds(transfers: Iterable[Transfer], topology: Topology) -> float:
    """Returns the least time of collectives, one after the other, at the links' full speed."""
    return sum(x.times * _transfer_seconds(x, topology) for x in transfers)


def _transfer_seconds(transfer: Transfer, topology: Topology) -> float:
    chip, size = topology.chip, transfer.groups.shape[1]
    if chip is None or size < 2:
        return 0.0
    ways = 2 if transfer.kind == "all-reduce" else 1  # reduced, and then gathered
    whole = transfer.kind == "collective-permute"
    sent = ways * transfer.num_bytes * (1.0 if whole else (size - 1) / size)
    hosts = len(np.unique(transfer.groups[0] // (topology.num_devices // topology.num_hosts)))
    abroad = ways * transfer.num_bytes * (hosts - 1) / size  # over the adapters of its devices
    return max(sent / chip.link_bandwidth, abroad / chip.network_bandwidth)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The least time that a step can take, each of whose parts hides behind the longest."""

    compute_seconds: float
    memory_seconds: float
    network_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds)

    @property
    def limited_by(self) -> str:
        times = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "network": self.network_seconds,
        }
        return max(times, key=lambda name: times[name])


def bound(needs: Work, chip: Chip, num_devices: int, network_seconds: float) -> Bound:
    return Bound(
        compute_seconds=(needs.flops + needs.recomputed_flops) / chip.flops / num_devices,
        memory_seconds=needs.traffic_bytes / chip.bandwidth,
        network_seconds=network_seconds,
    )
