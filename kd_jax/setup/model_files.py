"""Models on disk, checked before weights are read."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd_jax.config import LoraConfig, UserError
from kd_jax.data.chat import load_tokenizer
from kd_jax.data.rows import Rows
from kd_jax.data.vocabulary import SharedVocab, check_tokens, num_entries, share_vocab
from kd_jax.models.architecture import Architecture, describe_context
from kd_jax.parallel.processes import say
from kd_jax.weights.adapters import Adapter, load_adapter
from kd_jax.weights.files import is_there
from kd_jax.weights.folder import fingerprint, load_architecture, resolve
from kd_jax.weights.load import check_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """A model on disk with checked architecture, tensor names and tensor shapes."""

    folder: Path
    arch: Architecture
    tokenizer: Any
    adapter: Adapter | None
    folders: dict[str, Path]
    """Folders of model and adapter by config field."""

    @property
    def hashes(self) -> dict[str, str]:
        """Content hashes by config field; reads every byte of the folders."""
        return {field: fingerprint(folder) for field, folder in self.folders.items()}


def open_model_files(
    path: str, adapter: str | None, field: str, flag: str | None = None
) -> ModelFiles:
    """Returns a checked model.

    Args:
      field: student or teacher.
      flag: names the path in errors; None: that of the field.
    """
    folder = resolve(path, flag or f"{field}.path")
    arch = load_architecture(folder)
    check_tensors(folder, arch)
    folders = {f"{field}.path": folder}
    loaded = None
    if adapter is not None:
        adapter_folder = resolve(adapter, f"{field}.adapter")
        loaded = load_adapter(adapter_folder, arch)
        folders[f"{field}.adapter"] = adapter_folder
    elif is_there(folder / "adapter_config.json"):
        say(
            f"warning: {flag or field}: {folder} has a PEFT adapter too, which is not used, while "
            "transformers loads it. Set it as the adapter too, or merge it with peft"
        )
    tokenizer = load_tokenizer(folder)
    return ModelFiles(
        folder=folder, arch=arch, tokenizer=tokenizer, adapter=loaded, folders=folders
    )


def own_teacher(student: ModelFiles) -> ModelFiles:
    """Returns the student without its adapter, as the teacher of self-distillation."""
    return replace(student, adapter=None, folders={"teacher.path": student.folder})


def start_hashing(*models: ModelFiles | None) -> Future[dict[str, str]]:
    """Returns a future of the models' content hashes, computed in a thread."""
    pool = ThreadPoolExecutor(1)
    folders = {k: v for files in models if files is not None for k, v in files.folders.items()}

    def compute() -> dict[str, str]:
        found = {folder: fingerprint(folder) for folder in {*folders.values()}}
        return {field: found[folder] for field, folder in folders.items()}

    future = pool.submit(compute)
    pool.shutdown(wait=False)
    return future


def without_tokenizer(files: ModelFiles) -> ModelFiles:
    """Returns a model without its tokenizer, which can use more memory than a small model."""
    return replace(files, tokenizer=None)


def compare_tokenizers(ours: ModelFiles, theirs: ModelFiles, fields: str) -> SharedVocab:
    """Returns the ids that two models' tokenizers share; raises if other than added tokens differ.

    Args:
      fields: names both models in messages.
    """
    return share_vocab(ours.tokenizer, theirs.tokenizer, ours.folder, theirs.folder, fields)


def shared_vocab(student: ModelFiles, teacher: ModelFiles | None) -> SharedVocab:
    """Returns the vocabulary entries to compare; raises if tokenizers differ.

    Heads of equal size are compared whole, others up to the tokenizer's size. Tokens that only one
    of two tokenizers has are said.
    """
    fields = "student.path" if teacher is None else "student.path, teacher.path"
    models = [student] if teacher is None else [student, teacher]
    if teacher is None:
        shared = SharedVocab(num_entries(student.tokenizer), {})
    else:
        shared = compare_tokenizers(student, teacher, fields)
    if shared.differ:
        say(f"warning: {fields}: the models do not share these tokens: {shared.describe()}")
    sizes = [files.arch.vocab_size for files in models]
    if min(sizes) < shared.size:
        raise UserError(
            f"{fields}: expected at least {shared.size} vocabulary entries (the tokenizer's), got "
            + " and ".join(map(str, sizes))
        )
    true_sizes = {num_entries(files.tokenizer) for files in models}
    whole = len(set(sizes)) == len(true_sizes) == 1
    return replace(shared, size=sizes[0]) if whole else shared


def check_shared(
    shared: SharedVocab,
    student: ModelFiles,
    teacher: ModelFiles | None,
    rows: Rows | None,
    field: str,
) -> None:
    """Raises UserError if targets of the rows are tokens that the models do not share.

    Warns of prompt tokens that they do not share, and of the teacher's own rows that exceed its
    context.
    """
    if teacher is None or rows is None:
        return
    least = min(student.arch.vocab_size, teacher.arch.vocab_size)
    for side in filter(None, (rows, rows.teacher)):
        if warning := check_tokens(shared, side.tokens, side.loss_mask, least, field):
            say(f"warning: {warning}")
    if rows.teacher is not None:
        own = (rows.teacher.tokens.shape[1], "teacher", "teacher.seq-len")
        if warning := describe_context(teacher.arch, *own):
            say(warning)


def check_adapter(files: ModelFiles, config: LoraConfig) -> None:
    """Raises UserError if the student's adapter does not match the LoRA configuration."""
    assert files.adapter is not None
    stored = files.adapter.config
    pairs = {
        "rank": (config.rank, stored.rank),
        "alpha": (config.alpha, stored.alpha),
        "target-modules": (set(config.target_modules), set(stored.target_modules)),
    }
    wrong = [
        f"lora.{name}: expected {theirs} as in student.adapter, got {ours}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if wrong:
        raise UserError("\n".join(wrong))
