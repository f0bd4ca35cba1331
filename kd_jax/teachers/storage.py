"""Files and arrays of a teacher's cache: TensorStore, on a local disk or an object store."""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from kd_jax.config import UserError
from kd_jax.config.errors import first_line

SHARD_BYTES = 2**28
_CHUNK_BYTES = 2**17  # read at once, and checked by a CRC
_READ_CACHE_BYTES = 2**26  # indices of shards, and chunks that two documents share
_RETRIES = {"max_retries": 8}  # in about two minutes; by default 32, in a quarter of an hour
_SCHEMES = ("s3://", "gs://", "file://")
_SILENT_SECONDS = "30"
# A server that accepts requests and never answers, or cannot be reached, counts as failing.
_TIMEOUTS = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": _SILENT_SECONDS,
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": _SILENT_SECONDS,
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
_CONTEXT = {
    "cache_pool": {"total_bytes_limit": _READ_CACHE_BYTES},
    "s3_request_retries": _RETRIES,
    "gcs_request_retries": _RETRIES,
}


class Field(NamedTuple):
    """An array with one entry a token."""

    shape: tuple[int, ...]
    """Without the dimension of the tokens."""
    dtype: str

    @property
    def token_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


Fields = Mapping[str, Field]
"""The arrays of a cache by name."""


def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype of a name such as bfloat16, which NumPy alone does not know."""
    return ts.dtype(name).numpy_dtype


def token_bytes(fields: Fields) -> int:
    """Returns the bytes that a cache stores of one token."""
    return sum(field.token_bytes for field in fields.values())


def is_remote(path: str) -> bool:
    """Returns True for an address such as gs://bucket/folder, False for a local folder."""
    return "://" in path


def local_folder(path: str) -> Path:
    """Returns a local path without `..`, which TensorStore refuses."""
    return Path(path).expanduser().resolve()


def open_folder(path: str) -> ts.KvStore:
    """Returns the key-value store of a folder, or of an address such as gs://bucket/folder.

    Raises:
      UserError: the address is none of a store that can be written and listed.
    """
    if not is_remote(path):
        return ts.KvStore.open({"driver": "file", "path": f"{local_folder(path)}/"}).result()
    try:
        return ts.KvStore.open(_address(path), context=_context()).result()
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path}: expected a folder, or an address that begins with {' or '.join(_SCHEMES)} "
            f"({_reason(error)})"
        ) from None


def _address(path: str) -> str | dict[str, str]:
    """Returns an address for TensorStore, which does not read the AWS SDKs' AWS_ENDPOINT_URL."""
    scheme, _, rest = path.partition("://")
    if f"{scheme}://" not in _SCHEMES:
        raise ValueError(f"{scheme}:// is another")
    if not (rest := rest.rstrip("/")):
        raise ValueError("it names nothing")
    if scheme != "s3":
        return f"{scheme}://{rest}/"
    bucket, _, key = f"{rest}/".partition("/")
    place = {"driver": "s3", "bucket": bucket, "path": key}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        place |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return place


@functools.cache
def _context() -> ts.Context:
    """Returns the context of an object store, before its first request."""
    for name, value in _TIMEOUTS.items():
        os.environ.setdefault(name, value)
    return ts.Context(_context_spec())


def _context_spec() -> dict[str, Any]:
    """Returns the context's settings; by default each missing file of credentials is logged."""
    given = "AWS_ACCESS_KEY_ID" in os.environ
    return _CONTEXT | ({"aws_credentials": {"type": "environment"}} if given else {})


def storing(place: str) -> AbstractContextManager[None]:
    """Turns TensorStore's errors, such as a full disk, into one message."""
    advice = "Free some space or check the store; the same command then goes on"
    return _explaining(f"{place}: cannot be written", advice)


def reading(place: str) -> AbstractContextManager[None]:
    """Turns TensorStore's errors, of a store that fails or of damaged files, into one message."""
    advice = (
        "Check the store; the same command then goes on. Restore damaged files, or make the cache "
        "again in another folder"
    )
    return _explaining(f"{place}: cannot be read", advice)


@contextmanager
def _explaining(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{what} ({_reason(error)}). {advice}") from error


def _reason(error: BaseException) -> str:
    return f"{first_line(error):.300}"  # TensorStore adds a whole specification


def read_file(store: ts.KvStore, key: str) -> bytes | None:
    """Returns a file's bytes, None if it is absent."""
    found = store.read(key).result()
    return found.value if found.state == "value" else None


def list_files(store: ts.KvStore) -> list[str]:
    """Returns the files of a folder by their paths in it, without those of interrupted writes."""
    keys = [key.decode() for key in store.list().result()]
    return sorted(key for key in keys if not key.endswith(".__lock"))


def write_json(store: ts.KvStore, key: str, tree: Any) -> None:
    store.write(key, json.dumps(tree, indent=1, sort_keys=True) + "\n").result()


def tokens_per_shard(fields: Fields, num_tokens: int) -> tuple[int, int]:
    """Returns the tokens in a shard of each array, and in a chunk."""
    size = token_bytes(fields)
    chunk = max(1, min(_CHUNK_BYTES // size, num_tokens))
    shard = min(SHARD_BYTES // size, num_tokens + chunk - 1)
    return max(chunk, shard // chunk * chunk), chunk


def open_array(
    store: ts.KvStore, folder: str, field: Field, num_tokens: int, tokens: tuple[int, int] | None
) -> ts.TensorStore:
    """Returns an array [num_tokens, ...] on disk.

    Args:
      tokens: of a shard and of a chunk; creates the array. None: it is there.
    """
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": (store / folder).spec().to_json(),
        # A shard that is not there is an error, not zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "context": _context_spec(),
        "recheck_cached_data": False,
    }
    if tokens is None:
        return ts.open(spec, open=True, read=True, write=False).result()
    spec["metadata"] = _metadata(field, num_tokens, *tokens)
    return ts.open(spec, open=True, create=True).result()


def _metadata(field: Field, num_tokens: int, shard: int, chunk: int) -> dict[str, Any]:
    """Returns zarr's metadata: shards of chunks, each chunk with a CRC."""
    plain, little = {"name": "bytes"}, {"name": "bytes", "configuration": {"endian": "little"}}
    values = plain if numpy_dtype(field.dtype).itemsize == 1 else little
    inner = {
        "chunk_shape": [chunk, *field.shape],
        "codecs": [values, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    grid = {"chunk_shape": [shard, *field.shape]}
    return {
        "shape": [num_tokens, *field.shape],
        "data_type": field.dtype,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }


def metadata_key(name: str) -> str:
    """Returns the file of an array's metadata, below the folder of its part."""
    return f"{name}/zarr.json"


def shard_key(name: str, field: Field, number: int) -> str:
    """Returns the file of a shard, below the folder of its part."""
    return f"{name}/c/{number}" + "/0" * len(field.shape)
