"""A run on its devices, each model's share of one, and the FLOPs of a step. Needs no jax."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from kd_jax.config import Config, StudentConfig, TeacherConfig
from kd_jax.models.architecture import Architecture
from kd_jax.models.weight_table import Weight, adapter_weights, layer_weights, trained_weights
from kd_jax.parallel.platforms import TRITON_BLOCK, choose_attention, choose_dtype
from kd_jax.parallel.rules import (
    BATCH_AXES,
    ROWS_AXIS,
    Sizes,
    axes_size,
    context_size,
    row_axes,
    split,
)
from kd_jax.planning.chips import Topology

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}

RECOMPUTING = ("layer", "attention")  # remat policies that run a layer's matmuls again


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A run and its devices."""

    config: Config
    student: Architecture
    teacher: Architecture | None
    sizes: Sizes
    """Devices along each mesh axis."""
    topology: Topology
    target_share: float = 1.0
    """Share of the tokens that have a loss."""

    @property
    def num_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.config.data.batch_size * self.config.data.seq_len

    @property
    def num_targets(self) -> float:
        """Tokens with a loss of an optimizer step."""
        return self.target_share * self.num_tokens


def cached_bytes(case: Case) -> int:
    """Returns the bytes of a token that come from the teacher's cache, at most; 0 without one."""
    teacher = case.config.teacher
    if case.teacher is None or teacher is None or not case.config.reads_cache:
        return 0
    dtype = choose_dtype(teacher.dtype, case.topology.platform)
    return case.teacher.hidden_size * DTYPE_BYTES[dtype]


class Work(NamedTuple):
    """FLOPs and memory traffic of one optimizer step."""

    flops: float
    """Matmuls, attention and heads of all devices, forward and backward."""
    recomputed_flops: float
    """Added by gradient checkpointing."""
    awaited_flops: float
    """FLOPs that devices with earlier parts of rows could compute while they wait for the last
    parts, which attend to more keys than the average."""
    traffic_bytes: float
    """Between one device and its memory: weights, optimizer state, residuals and logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """One model's share of a device, in one micro-batch."""

    arch: Architecture
    sizes: Sizes
    axes: tuple[str, ...]
    """Axes that shard its weights."""
    tokens: int
    itemsize: int
    """Bytes of its activations' dtype."""
    mask: int
    """Bytes of attention's mask, [B, 1, S, T] bfloat16 for cuDNN, also where triton leaves windows
    and ragged parts of rows to it; other kernels make no array."""
    rank: int = 0
    """Rank of its adapters; 0: it has none."""

    @property
    def tensor(self) -> int:
        return self.sizes["tensor"] if "tensor" in self.axes else 1

    @property
    def context(self) -> int:
        return context_size(self.sizes)

    @property
    def fsdp(self) -> int:
        return self.sizes[ROWS_AXIS] if ROWS_AXIS in self.axes else 1

    def stored(self, table: Mapping[str, Weight], itemsize: int) -> int:
        """Returns the bytes of these weights as they are stored, sharded."""
        return sum(_share(self.sizes, self.axes, weight) for weight in table.values()) * itemsize

    def in_use(self, table: Mapping[str, Weight], itemsize: int) -> int:
        """Returns the bytes of these weights all-gathered for a matmul."""
        axes = tuple(axis for axis in self.axes if axis != ROWS_AXIS)
        return sum(_share(self.sizes, axes, weight) for weight in table.values()) * itemsize

    def _activations(self, width: int) -> int:
        return self.tokens * width * self.itemsize

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self._activations(self.arch.hidden_size)

    @property
    def heads(self) -> int:
        """Bytes of queries, and of attention's output."""
        width = self.arch.num_attention_heads * self.arch.head_dim
        return self._activations(width) // self.tensor

    @property
    def keys(self) -> int:
        """Bytes of keys, and of values."""
        width = max(self.arch.num_key_value_heads, self.tensor) * self.arch.head_dim
        return self._activations(width) // self.tensor

    @property
    def gathered_keys(self) -> int:
        """Bytes of whole rows' keys and values, all-gathered for attention."""
        return 2 * self.context * self.keys if self.context > 1 else 0

    @property
    def hidden(self) -> int:
        """Bytes of one of the MLP's hidden activations."""
        return self._activations(self.arch.intermediate_size) // self.tensor

    def residuals(self, remat: str) -> int:
        """Returns the bytes of one layer's residuals."""
        statistics = self.tokens * self.arch.num_attention_heads * 4 // self.tensor
        low = 7 * self.tokens * self.rank * self.itemsize
        products = 3 * self.stream + self.heads + 2 * self.keys + 2 * self.hidden + low
        none = products + 3 * self.stream + 3 * self.heads + 2 * self.keys + 4 * self.hidden
        return {
            "layer": self.stream,
            "attention": self.stream + self.heads + statistics,
            "dots": products + self.heads + statistics,
            "none": none + self.gathered_keys,
        }[remat]


def _share(sizes: Sizes, axes: tuple[str, ...], weight: Weight) -> int:
    """Returns the entries of a weight on one device."""
    parts = split(sizes, axes, weight.dims, weight.shape)
    return math.prod(weight.shape) // axes_size(sizes, [axis for part in parts for axis in part])


def make_shares(case: Case) -> tuple[Shares, Shares | None]:
    """Returns the student's shares and the teacher's; None without a teacher."""
    config, sizes = case.config, case.sizes

    def shares(part: StudentConfig | TeacherConfig, arch: Architecture, seq_len: int) -> Shares:
        rows = config.data.batch_size // config.optim.accumulation_steps
        own = rows // axes_size(sizes, row_axes(sizes, part.shard_over, rows))
        tokens = own * seq_len // context_size(sizes)
        dtype = choose_dtype(part.dtype, case.topology.platform)
        kernel = choose_attention(config.attention, case.topology.platform, dtype, arch.head_dim)
        slides = any(size and size < seq_len for size in arch.layer_windows)
        ragged = context_size(sizes) > 1 and seq_len // context_size(sizes) % TRITON_BLOCK > 0
        masked = kernel == "cudnn" or (kernel == "triton" and (slides or ragged))
        return Shares(
            arch=arch,
            sizes=sizes,
            axes=part.shard_over,
            tokens=tokens,
            itemsize=DTYPE_BYTES[dtype],
            mask=2 * tokens * seq_len if masked else 0,
        )

    student = shares(config.student, case.student, config.data.seq_len)
    if config.trainable == "lora":
        student = replace(student, rank=config.lora.rank)
    if case.teacher is None or config.teacher_part is None:
        return student, None
    return student, shares(config.teacher_part, case.teacher, config.teacher_seq_len)


def count(table: Mapping[str, Weight]) -> int:
    """Returns the number of parameters in a table of weights."""
    return sum(math.prod(weight.shape) for weight in table.values())


def layer_flops(arch: Architecture, seq_len: int) -> tuple[float, float]:
    """Returns a token's forward FLOPs in all layers: of weights, and of causal attention."""
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
    """Returns the FLOPs of one optimizer step, and those that gradient checkpointing adds.

    2 FLOPs forward for each weight of the layers and each token; the student's backward pass takes
    as many for the inputs' gradients, and as many for those of trained weights. Attention likewise.
    Heads count only for tokens with a loss.
    """
    full = config.trainable == "full"
    products, attention = layer_flops(student, config.data.seq_len)
    adapters = 0.0 if full else 2.0 * count(adapter_weights(config.lora, student))
    head = 2.0 * student.vocab_size * student.hidden_size
    passes = 3 if full else 2
    needed = num_tokens * (passes * products + 3 * adapters + 3 * attention)
    needed += num_targets * passes * head
    if teacher is not None and not config.reads_cache:
        longer = config.teacher_seq_len / config.data.seq_len
        needed += num_tokens * longer * sum(layer_flops(teacher, config.teacher_seq_len))
    if teacher is not None:
        needed += num_targets * 2.0 * teacher.vocab_size * teacher.hidden_size
    again = {"layer": products + adapters + attention, "attention": products + adapters}
    return needed, num_tokens * again.get(config.remat_policy, 0.0)


def attention_flops(
    config: Config, student: Architecture, teacher: Architecture | None, num_tokens: int
) -> float:
    """Returns the FLOPs of a step's causal attention, with what gradient checkpointing adds."""
    passes = 4 if config.remat_policy == "layer" else 3
    flops = passes * num_tokens * layer_flops(student, config.data.seq_len)[1]
    if teacher is not None and not config.reads_cache:
        longer = config.teacher_seq_len / config.data.seq_len
        flops += num_tokens * longer * layer_flops(teacher, config.teacher_seq_len)[1]
    return flops


def work(case: Case) -> Work:
    """Returns the FLOPs and the memory traffic of an optimizer step."""
    config, sizes = case.config, case.sizes
    num_tokens, accumulation = case.num_tokens, config.optim.accumulation_steps
    num_targets = case.num_targets
    models = (case.student, case.teacher)
    flops, again = step_flops(config, *models, num_tokens, num_targets)
    # The last of c parts of a row has 2 - 1 / c times the average number of keys.
    awaited = attention_flops(config, *models, num_tokens) * (1 - 1 / context_size(sizes))
    student, teacher = make_shares(case)
    targets = num_targets / accumulation / axes_size(sizes, BATCH_AXES) / context_size(sizes)
    logits = 2 * targets * (student.arch.vocab_size // sizes["tensor"]) * 4
    passes = 3 if config.remat_policy in RECOMPUTING else 2
    L = student.arch.num_hidden_layers
    residuals = L * student.residuals(config.remat_policy)
    each = passes * _layers(student) + 2 * residuals + logits
    if teacher is not None:
        each += logits + (0 if config.reads_cache else _layers(teacher))
    # Weights, both moments and the gradients are read and written.
    updates = 8 * student.stored(trained_weights(config, case.student), 4)
    return Work(
        flops=flops,
        recomputed_flops=again,
        awaited_flops=awaited,
        traffic_bytes=accumulation * each + updates,
    )


def _layers(model: Shares) -> int:
    """Returns the bytes of all layers' weights in their matmuls."""
    return model.in_use(layer_weights(model.arch), model.itemsize) * model.arch.num_hidden_layers
