"""An estimate of a run's memory on one device, from shapes. Needs no jax."""

import math
from dataclasses import replace
from typing import NamedTuple

from kd_jax.models.weight_table import head_weights, layer_weights, trained_weights, weights
from kd_jax.parallel.platforms import PLATFORMS, Platform
from kd_jax.parallel.rules import BATCH_AXES, axes_size, context_size
from kd_jax.planning.chips import GIB, Chip, Topology
from kd_jax.planning.cost import Case, Shares, cached_bytes, make_shares

BATCH_BYTES = 4 + 4 + 4 + 1  # tokens, positions, segment ids, loss mask of one token
TEACHER_BYTES = 4 + 4 + 4  # tokens, positions, segment ids of a token of the teacher's own rows
PLACE_BYTES = 4  # of the teacher's hidden state, for each of the student's tokens

CACHE_SHARE = 0.2
"""Share of a device's memory for the keys and values of samples."""


def chunk_tokens(
    wanted: int | None,
    row: Platform,
    chip: Chip | None,
    vocab_size: int,
    num_tokens: int,
    *,
    head_trainable: bool,
) -> int:
    """Returns the tokens of a chunk on one device.

    Defaults: the platform's own; else as many as let both float32 logits chunks fill a 32nd of the
    memory, at most 1 GiB, or 2 GiB where each chunk reads and writes the gradient of the head.

    Args:
      wanted: the config's; None: the default.
      chip: None is an unknown chip, assumed to have a large memory.
      vocab_size: entries on one device.
      num_tokens: on one device.
    """
    if wanted is None:
        most = 2 * GIB if head_trainable else GIB
        room = min(most, chip.memory_bytes // 32 if chip else GIB)
        own = row.trained_chunk_tokens if head_trainable else row.chunk_tokens
        wanted = own or max(128, room // (2 * 4 * vocab_size) // 128 * 128)
    return min(wanted, num_tokens)


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: dict[str, int]
    """teacher and student (frozen weights), trainable, optimizer (both moments, and the average
    that is the teacher with teacher.kind ema), batch."""
    temporaries: int


def estimate_memory(case: Case) -> Memory:
    """Returns an estimate of the memory that XLA allocates; docs/planning.md compares the two."""
    config = case.config
    student, teacher = make_shares(case)
    trainable = student.stored(trained_weights(config, case.student), 4)
    frozen = weights(case.student) if config.trainable == "lora" else {}
    loaded = head_weights if config.reads_cache else weights
    token_bytes: float = BATCH_BYTES + cached_bytes(case) / context_size(case.sizes)
    if config.prompts_teacher and not config.reads_cache:
        token_bytes += PLACE_BYTES
        token_bytes += TEACHER_BYTES * config.teacher_seq_len / config.data.seq_len
    kind = config.teacher.kind if config.teacher is not None and teacher is not None else "model"
    frozen_teacher = 0  # of a student that is its own teacher
    if teacher is not None and kind == "model":
        frozen_teacher = teacher.stored(loaded(teacher.arch), teacher.itemsize)
    arguments = {
        "teacher": frozen_teacher,
        "student": student.stored(frozen, student.itemsize),
        "trainable": trainable,
        "optimizer": (3 if kind == "ema" else 2) * trainable,
        "batch": int(case.num_tokens // axes_size(case.sizes, BATCH_AXES) * token_bytes),
    }
    temporaries = _temporaries(case, student, teacher, trainable)
    return Memory(arguments, max(temporaries, beside_steps(case, sum(arguments.values()))))


def beside_steps(case: Case, arguments: int) -> int:
    """Returns the bytes that a run needs between steps, and those before the first step that are
    more than the step's arguments.

    Between steps it draws samples and answers. Before the first, the teacher runs on documents
    that its cache lacks, and no student is loaded.
    """
    config, (student, teacher) = case.config, make_shares(case)
    found = [0]
    if config.samples:
        found.append(sampling_bytes(case, student))
    if config.eval.accuracy:
        tokens = 2 * config.eval.max_new_tokens
        found.append(_decoding_bytes(case, student, config.eval.accuracy, tokens))
    if config.fills_cache and teacher is not None:
        loaded = teacher.stored(weights(teacher.arch), teacher.itemsize)
        found.append(loaded + _forward_bytes(teacher) - arguments)
    return max(found)


def sampling_bytes(case: Case, student: Shares) -> int:
    """Returns the bytes of a drawing of samples: keys and values, and the student's weights.

    Prompts are taken to be as long as answers; keys and values have room for a row of the data
    each, and fill at most CACHE_SHARE of the device.
    """
    config = case.config
    S, rows = config.data.seq_len, config.on_policy.highest_fraction * config.data.batch_size
    prompts = math.ceil(rows * max(1, S // (2 * config.on_policy.max_new_tokens)))
    return _decoding_bytes(case, student, prompts, S)


def _decoding_bytes(case: Case, student: Shares, prompts: int, tokens: int) -> int:
    """Returns the bytes of answering prompts, each with room for `tokens` keys and values."""
    topology, platform = case.topology, PLATFORMS[case.topology.platform]
    slots = min(math.ceil(prompts / axes_size(case.sizes, BATCH_AXES)), platform.sampled_rows)
    cache = 2 * replace(student, tokens=slots * tokens).keys * student.arch.num_hidden_layers
    cache = cache * platform.kv_itemsize(student.itemsize) // student.itemsize
    cache = min(cache, int(CACHE_SHARE * topology.memory_limit))
    return cache + student.in_use(weights(student.arch), student.itemsize)


def _temporaries(case: Case, student: Shares, teacher: Shares | None, gradients: int) -> int:
    """Returns the bytes of the largest of the step's phases."""
    config = case.config
    saved = student.residuals(config.remat_policy)
    residuals = student.arch.num_hidden_layers * saved
    summed = gradients if config.optim.accumulation_steps > 1 else 0
    # A layer's activations and their gradients, or what is recomputed for its backward pass and the
    # gradient of its output; or the gradient of cuDNN's mask, at another time.
    layer = 2 * (2 * student.hidden + 2 * student.stream + student.heads)
    layer = max(layer, student.residuals("none") - saved + student.stream, student.mask)
    keys = 2 * student.gathered_keys  # and their gradients
    backward = residuals + summed + gradients + layer + student.mask + keys
    backward += _gathered_layer(student)
    head = residuals + summed + _head(case, student, teacher)
    if teacher is None or config.reads_cache:
        return max(backward, head)
    return max(backward, head, _forward_bytes(teacher))


def _forward_bytes(teacher: Shares) -> int:
    """Returns the bytes of a teacher's forward pass."""
    activations = 2 * (teacher.hidden + teacher.stream) + teacher.mask
    return activations + _gathered_layer(teacher) + teacher.gathered_keys


def _head(case: Case, student: Shares, teacher: Shares | None) -> int:
    """Returns the bytes of the fused head: logits of a chunk, hidden states, the gradient of the
    student's, gathered heads."""
    config, topology = case.config, case.topology
    full, entries = config.trainable == "full", student.arch.vocab_size // student.sizes["tensor"]
    shards = config.optim.accumulation_steps * axes_size(student.sizes, BATCH_AXES)
    shards *= student.context
    row, chip = PLATFORMS[topology.platform], topology.rated_chip
    C = chunk_tokens(
        config.loss.chunk_tokens, row, chip, entries, case.num_tokens // shards, head_trainable=full
    )
    models = [student] if teacher is None else [student, teacher]
    rows = 2 if row.gathers_all else 1
    total = student.stream + sum(C * entries * (4 + 1) + rows * m.stream for m in models)
    total += sum(_gathered_head(m, topology) for m in models if m.fsdp > 1)
    return total + (student.in_use(head_weights(student.arch), 4 + student.itemsize) if full else 0)


def _gathered_layer(model: Shares) -> int:
    """Returns the bytes of all-gathered layers: the one in use and the next."""
    if model.fsdp == 1:
        return 0
    return 2 * model.in_use(layer_weights(model.arch), model.itemsize)


def _gathered_head(model: Shares, topology: Topology) -> int:
    """Returns the bytes of an all-gathered head; a TPU copies shards that fill no tiles of 8."""
    ragged = model.arch.vocab_size // (model.fsdp * model.tensor) % 8 > 0
    copies = 2 if ragged and topology.platform == "tpu" else 1
    return copies * model.in_use(head_weights(model.arch), model.itemsize)
