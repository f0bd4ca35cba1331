"""A teacher's cache in an object store whose requests fail: one message, nothing torn is taken."""

import hashlib
import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from kd_jax.config import UserError
from kd_jax.data.documents import Documents
from kd_jax.data.rows import Rows
from kd_jax.inference.teacher_pass import finish
from kd_jax.teachers import storage
from kd_jax.teachers.manifest import find_places, new_cache, read_cache
from kd_jax.teachers.reading import CachedRows
from kd_jax.teachers.writing import PartWriter

PLACE = "s3://bucket/cache"
TOKENS, WIDTH = 1000, 4
FAULTS = ("error", "closed", "cut")  # without an answer, or with half of one
VALUES = np.arange(TOKENS * WIDTH, dtype=np.float32).reshape(TOKENS, WIDTH)


class Bucket(BaseHTTPRequestHandler):
    """The part of S3's interface that TensorStore uses, over objects in memory."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer waits 40 ms for the client's acknowledgement

    def do_GET(self):
        store, url = self.server, urlsplit(self.path)
        key = url.path.removeprefix("/bucket").lstrip("/")
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        store.requests.append((self.command, key))
        fails = store.fault if len(store.requests) > store.healthy else None
        if fails == "error":
            self._reply(500)
        elif fails == "closed":
            self._close()
        elif self.command in ("PUT", "DELETE"):
            self._change(key, body, fails == "cut")
        elif not key:
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            keys = [x for x in sorted(store.objects) if x.startswith(prefix)]
            entries = "".join(f"<Contents><Key>{x}</Key><Size>1</Size></Contents>" for x in keys)
            head = f"<KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>"
            tree = f"<ListBucketResult>{head}{entries}</ListBucketResult>"
            self._reply(200, tree.encode(), cut=fails == "cut")
        elif key in store.objects:
            self._reply_object(store.objects[key], fails == "cut")
        else:
            self._reply(404)

    do_PUT = do_DELETE = do_HEAD = do_GET

    def _change(self, key, body, cut):
        """Writes or deletes an object; `cut`: without an answer."""
        objects, status = self.server.objects, 204
        if self.command == "DELETE":
            objects.pop(key, None)
        elif key in objects and self.headers.get("If-None-Match") == "*":
            status = 412
        else:
            objects[key], status = body, 200
        self._close() if cut else self._reply(status, headers={"ETag": _etag(body)})

    def _reply_object(self, whole, cut):
        part, headers = whole, {"ETag": _etag(whole)}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = wanted.groups()
            start = int(first) if first else len(whole) - int(last)
            part = whole[start : int(last) + 1] if first and last else whole[start:]
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(whole)}"
        self._reply(206 if wanted else 200, part, headers, cut)

    def _reply(self, status, body=b"", headers=None, cut=False):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._close()

    def _close(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_):
        pass


def _etag(body):
    return f'"{hashlib.md5(body).hexdigest()}"'


@pytest.fixture
def store():
    """A server of one bucket, which fails with `fault` after the first `healthy` requests."""
    retries = {"max_retries": 1, "initial_delay": "1ms"}
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        server.objects, server.requests, server.healthy, server.fault = {}, [], 0, None
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        patch.setitem(storage._CONTEXT, "s3_request_retries", retries)
        patch.setattr(storage, "SHARD_BYTES", 2**13)
        patch.setattr(storage, "_CHUNK_BYTES", 2**11)
        storage._context.cache_clear()
        yield server
        storage._context.cache_clear()
        server.shutdown()


def fill():
    """Writes one document, or goes on with it, as kd_jax.cache does."""
    new = new_cache(PLACE, "hidden", {"hidden": storage.Field((WIDTH,), "float32")}, {})
    cache = read_cache(PLACE) or new
    if cache is new:
        with storage.storing(PLACE):
            writer = PartWriter(cache, [bytes(16)], np.array([TOKENS]))
            writer.go_on(writer.count_whole())
            if writer.done < TOKENS:
                writer.append({"hidden": VALUES[writer.done :]})
        finish(writer)


def read():
    """Returns the values of the document's target tokens, as kd_jax.train reads them."""
    cache = read_cache(PLACE)
    row = np.ones((1, TOKENS + 1), np.int32)
    places = np.arange(TOKENS + 1)[None]
    rows = Rows(row, row, places, places > 0, {}, "key")
    documents = Documents([bytes(16)], np.array([TOKENS]), np.array([0, 1]))
    cached = CachedRows(cache, rows, documents, find_places(cache, documents))
    return cached(np.array([0]), np.array([True]))["teacher_hidden"][0, :TOKENS]


def count_requests(store, run):
    store.requests.clear()
    run()
    return len(store.requests)


def runs_that_fail(store, run, objects, count):
    """Yields after runs from `objects`, in each of which the store fails after one request more."""
    for healthy in range(count):
        store.objects, store.requests[:] = dict(objects), []
        store.fault, store.healthy = FAULTS[healthy % len(FAULTS)], healthy
        with pytest.raises(UserError, match=r"s3://bucket/cache: cannot be (read|written) \("):
            run()
        store.fault = None
        yield


def test_a_store_that_fails_at_any_request_is_one_message_and_the_same_command_goes_on(
    store, capfd
):
    to_fill = count_requests(store, fill)
    whole = dict(store.objects)
    to_read = count_requests(store, lambda: np.testing.assert_array_equal(read(), VALUES))
    for _ in runs_that_fail(store, read, whole, to_read):
        assert store.objects == whole
    for _ in runs_that_fail(store, fill, {}, to_fill):
        fill()
        assert store.objects == whole
    assert "credentials" not in capfd.readouterr().err  # as TensorStore logs that files are missing
