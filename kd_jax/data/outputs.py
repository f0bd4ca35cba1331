"""Files and folders that a command writes, which must not be among the data that it reads."""

import glob
from collections.abc import Mapping
from pathlib import Path

from kd_jax.config.errors import raise_all
from kd_jax.data.files import is_dataset_folder, list_files, list_sources, split_of
from kd_jax.data.readers import is_data


def check_apart(
    path: str, split: str, places: Mapping[str, str | None], field: str = "data.path"
) -> None:
    """Raises UserError for a place in a folder, or of a glob, whose files are read as data.

    The same command would read at its next start what it wrote there.

    Args:
      places: files and folders that are written, by flag.
    """
    raise_all(
        [
            f"{flag}: expected a place that {field} does not read, got {place} in {source}, where "
            "its files would be read as data. Give another"
            for source, _ in list_sources(path)
            for flag, place in places.items()
            if place is not None and "://" not in place and _reads(source, split, place)
        ]
    )


def _reads(source: str, split: str, place: str) -> bool:
    """Returns True if files at a place are among those of a source."""
    folder, own = (Path(x).expanduser().resolve() for x in (source, place))
    if not folder.is_dir():
        return glob.has_magic(source) and is_data(place) and own.match(str(folder))
    if folder not in own.parents:
        return False
    if is_dataset_folder(folder):
        return True  # the content of all its files counts
    name = own.relative_to(folder)
    if any(part.startswith(".") for part in name.parts):
        return False
    files = [Path(file) for file in list_files(source, split).files]
    named = any(split_of(file.relative_to(Path(source).expanduser())) for file in files)
    return not named or split_of(name) == split.partition("[")[0].strip()
