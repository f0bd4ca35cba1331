"""Paths to raw records: files, globs, folders, object stores and the hub, and splits of them."""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from kd_jax.config import UserError
from kd_jax.config.errors import first_line
from kd_jax.data.readers import Raw, from_table, is_data, kind_of, read_file, suffixes

# org/name:subset@revision; all but the name may be missing.
_HUB_ID = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)
# Words of file and folder names that tell the split, as in `datasets`.
_SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
# Files of the hub name their split: data/train_sft-00000-of-00003.parquet.
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
# JSON files beside data that say something about them, or about a model.
_NO_RECORDS = {
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listing:
    """The files behind a path."""

    files: tuple[str, ...] = ()
    """In the order in which they are read; () where `datasets` reads the path."""
    unread: tuple[str, ...] = ()
    """Files of a folder that are of another split, or no data."""
    missing: tuple[str, ...] = ()
    """Lines about sets of numbered files that are not whole."""


def list_sources(path: str) -> list[tuple[str, float | None]]:
    """Returns (path, weight) of each source of `a.jsonl:0.7,b.jsonl:0.3`; None without weights.

    Raises:
      UserError: some of the sources have a weight and others none, or one that is not above 0.
    """
    if "," not in path or os.path.exists(os.path.expanduser(path)):
        if (stem := re.sub(r":\d*\.?\d+$", "", path)) != path and is_data(stem):
            raise UserError(f"data.path: expected no weight of a single source, got {path!r}")
        return [(path, None)]
    pairs = [re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", part.strip()) for part in path.split(",")]
    sources = [(x[1], None if x[2] is None else float(x[2])) for x in pairs if x is not None]
    weights = [weight for _, weight in sources if weight is not None]
    whole = all(name for name, _ in sources) and len(weights) in (0, len(sources))
    if not whole or 0 in weights:
        raise UserError(
            "data.path: expected sources such as a.jsonl,b.jsonl, or each with a weight above 0 "
            f"such as a.jsonl:0.7,b.jsonl:0.3, got {path!r}"
        )
    return sources


def check_source(path: str, split: str, field: str = "data.path") -> None:
    """Raises UserError if a source of `path` is missing; hub ids are not looked up."""
    for source, _ in list_sources(path):
        list_files(source, split, field)


def list_files(path: str, split: str, field: str = "data.path") -> Listing:
    """Returns the files behind a path; hub ids are not looked up.

    Args:
      split: name of a split, or a slice of it; files that are not in a folder have only `train`.

    Raises:
      UserError: nothing is there, a suffix is unknown, or there is no such split.
    """
    place = Path(os.path.expanduser(path))  # os.path's checks are False for names too long
    split_field = "--split" if field == "--data" else field.replace("path", "split")
    if _dataset_folder(path):
        return Listing()
    if "://" in path:
        files = _remote_files(path, field)
    elif os.path.isdir(place):
        return _list_folder(place, split, field, split_field)
    elif os.path.lexists(place):
        files = [str(place)]
    elif glob.has_magic(path):
        found = sorted(glob.glob(str(place), recursive=True))
        files = [file for file in found if not os.path.isdir(file)]
    elif is_data(path) or not _HUB_ID.fullmatch(path):
        raise UserError(f"{field}: expected a file, got {path}, which is not there")
    else:
        return Listing()
    if not files:
        raise UserError(f"{field}: expected a file, got {path}, which is not there")
    for file in files:
        if not is_data(file):
            raise UserError(f"{field}: expected a file ending in {suffixes()}, got {file}")
        _check_regular(file, field)
    if _name_of(split) != "train":
        raise UserError(
            f"{split_field}: expected train or a slice of it, such as train[98%:], got {split!r}. "
            f"{path} has no other split"
        )
    return Listing(tuple(files))


def _check_regular(file: str, field: str) -> None:
    """Raises UserError for a pipe, which would be read for ever, and a link to nothing."""
    if "://" in file or os.path.isfile(file):
        return
    what = "a pipe or device"
    if os.path.islink(file) and not os.path.exists(file):
        what = f"a link to {os.readlink(file)}, which is not there. Download it again"
    raise UserError(f"{field}: expected a file, got {file}, {what}")


def _name_of(split: str) -> str:
    return split.partition("[")[0].strip()


def _remote_files(path: str, field: str) -> list[str]:
    import fsspec

    with _asking(f"{field}: {path}"):
        system, root = fsspec.url_to_fs(path)
        if glob.has_magic(root):
            found = system.glob(root)
        elif system.isdir(root):
            found = [file for file in system.find(root) if is_data(file)]
        else:
            found = [root] if system.exists(root) else []
        return [system.unstrip_protocol(file) for file in sorted(found)]


@contextmanager
def _asking(place: str) -> Iterator[None]:
    """Turns the errors of any library of an object store into one message."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{place} cannot be read ({reason})") from None


def _list_folder(folder: Path, split: str, field: str, split_field: str) -> Listing:
    """Returns the files of a split, which names of files and folders tell, as in `datasets`."""
    if len(snapshots := sorted(map(str, folder.glob("snapshots/*")))) > 1:
        raise UserError(f"{field}: expected one snapshot of {folder}, got {', '.join(snapshots)}")
    # A link to a folder is not followed, but said.
    found = [file for file in sorted(folder.rglob("*")) if file.is_symlink() or not file.is_dir()]
    names = [file.relative_to(folder) for file in found]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    data = [name for name in names if is_data(name.name) and name.name not in _NO_RECORDS]
    records = [name for name in data if kind_of(name.name)[0] != ".txt"]
    splits = {name: split_of(name) for name in records or data}
    there = {split for split in splits.values() if split} or {"train"}
    if not splits:
        raise UserError(f"{field}: expected files ending in {suffixes()} in {folder}, got none")
    if _name_of(split) not in there:
        expected = " or ".join(sorted(there))
        raise UserError(
            f"{split_field}: expected {expected}, the splits of {folder}, got {split!r}"
        )
    named = any(splits.values())
    chosen = [name for name in splits if not named or splits[name] == _name_of(split)]
    unread = tuple(str(name) for name in names if name not in chosen)
    files = tuple(str(folder / name) for name in chosen)
    for file in files:
        _check_regular(file, field)
    return Listing(files, unread, tuple(_describe_missing(chosen)))


def _describe_missing(files: list[Path]) -> list[str]:
    """Returns a line for each set such as train-00000-of-00002.parquet that lacks files."""
    sets = Counter(re.sub(r"-\d+(?=-of-\d+\.)", "-*", str(file)) for file in files)
    totals = {name: re.search(r"-\*-of-(\d+)\.", name) for name in sets}
    return [
        f"{sets[name]:,} of {int(total[1]):,} files {name} are there"
        for name, total in totals.items()
        if total and sets[name] < int(total[1])
    ]


def split_of(name: Path) -> str | None:
    """Returns the split of a file of a folder; names of folders come before those of files."""
    if shard := _SHARD.fullmatch(name.as_posix()):
        return shard[1]
    for part in (name.parent, name.name):
        for split, words in _SPLIT_WORDS.items():
            if re.search(rf"(?<![a-z])({words})(?![a-z])", str(part).lower()):
                return split
    return None


def _dataset_folder(path: str) -> tuple[Path, str | None] | None:
    """Returns a folder that `datasets` reads, and NAME of FOLDER:NAME; None for other paths."""
    stem, _, subset = path.rpartition(":")
    for name, chosen in ((path, None), (stem, subset)):
        folder = Path(os.path.expanduser(name))
        if name and os.path.isdir(folder) and is_dataset_folder(folder):
            return folder, chosen
    return None


def is_dataset_folder(folder: Path) -> bool:
    """Returns True for a folder of `save_to_disk`, or one whose card lists its files."""
    if _is_saved(folder):
        return True
    card = folder / "README.md"
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def choose_split(path: str, wanted: str | None) -> str:
    """Returns `wanted`, or where it is None the split of held-out data: test, or all of files."""
    if wanted is not None:
        return wanted
    path = list_sources(path)[0][0]
    if os.path.isdir(os.path.expanduser(path)) or _dataset_folder(path):
        return "test"
    return "train" if "://" in path or glob.has_magic(path) or is_data(path) else "test"


def hash_source(path: str, split: str) -> str:
    """Returns the content hash of the files behind a path, or the name of a hub dataset."""
    files = list_files(path, split).files
    if (found := _dataset_folder(path)) is not None:
        folder, subset = found
        files = tuple(str(file) for file in sorted(folder.rglob("*")) if file.is_file())
        split += f" of {subset}" * (subset is not None)
    return " ".join([split, *(map(_hash_file, files) if files else [path])])


def _hash_file(file: str) -> str:
    if "://" in file:
        import fsspec

        with _asking(f"data: {file}"):
            system, root = fsspec.url_to_fs(file)
            # HTTP's own key is that of the address; the general one has size, ETag and time.
            kind = fsspec.AbstractFileSystem if "https" in system.protocol else type(system)
            return f"{file} {kind.ukey(system, root)}"
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, xxhash.xxh3_128)
    return f"{''.join(kind_of(file))} {digest.hexdigest()}"


def read_raw(path: str, split: str, begin: int, end: int | None) -> Iterator[tuple[str, Raw]]:
    """Yields (place, raw record) of the records [begin, end) of a path.

    Args:
      split: a slice is of use for hub datasets alone; `slice_of` returns that of files.

    Raises:
      UserError: a file cannot be read.
    """
    files = list_files(path, split).files
    if files:
        yield from islice(_read_files(files), begin, end)
        return
    for number, record in enumerate(islice(_load_dataset(path, split), begin, end), start=1):
        yield f"{path}, record {number}", from_table(record)


def _read_files(files: tuple[str, ...]) -> Iterator[tuple[str, Raw]]:
    for file in files:
        yield from read_file(file)


def slice_of(path: str, split: str) -> tuple[int, int | None]:
    """Returns [begin, end) of the records of files that a split names; end None: all.

    Raises:
      UserError: the slice is none of `datasets`' forms, or begins after the last record.
    """
    files = list_files(path, split).files
    if not files or "[" not in split:
        return 0, None
    count = sum(1 for _ in _read_files(files))
    begin, end = to_range(split, count)
    if begin >= end:
        raise UserError(f"data.split: {split!r} of {path} is empty ({count:,} records)")
    return begin, end


def to_range(split: str, count: int) -> tuple[int, int]:
    """Returns [begin, end) of a slice of `count` records, as `datasets` rounds it."""
    import datasets  # takes seconds to import

    try:
        name = _name_of(split)
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: count})
    except Exception as error:
        raise UserError(
            "data.split: expected one slice such as train[98%:] or train[:1000], got "
            f"{split!r} of {count:,} records ({first_line(error)})"
        ) from None
    return part.from_ or 0, count if part.to is None else part.to


def _load_dataset(path: str, split: str) -> Any:
    import datasets  # takes seconds to import

    folder, subset = _dataset_folder(path) or (None, None)
    name = _name_of(split)
    try:
        if folder and subset is None and _is_saved(folder):
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.Dataset):
                saved = {"train": saved}
            if name not in saved:
                expected = " or ".join(saved)
                raise UserError(f"data.split: expected {expected}, got {split!r} of {path}")
            dataset = saved[name]
            return dataset.select(range(*to_range(split, len(dataset))))
        if folder:
            return datasets.load_dataset(str(folder), subset, split=split)
        hub = _HUB_ID.fullmatch(path)
        assert hub is not None
        return datasets.load_dataset(
            hub["name"], hub["subset"], split=split, revision=hub["revision"]
        )
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"data: expected a file ending in {suffixes()}, a folder or glob of such files, or a "
            f"hub dataset, got {path}, which cannot be read ({reason})"
        ) from None
