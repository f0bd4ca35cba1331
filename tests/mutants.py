"""Seeded mutants of input files, and what the commands' functions make of them."""

import json
import math
import os
import random
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kd_jax.config import DataConfig, UserError
from kd_jax.data.chat import chat_template_of, load_tokenizer
from kd_jax.data.rows import make_rows
from kd_jax.models.architecture import read_architecture
from kd_jax.weights.adapters import load_adapter, peft_name
from kd_jax.weights.folder import load_architecture, resolve
from kd_jax.weights.load import open_tensors
from kd_jax.weights.safetensors import INDEX

SECONDS = 10  # of one mutant
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 2**63, 10**30, 10**400, 0.5, 1.0, -0.0, 1e-30,
    1e300, math.inf, -math.inf, math.nan, "", "a", "nope", "x" * 5000, "\ud800", "\0",
    "../../etc/passwd", "/dev/zero", "{% for i in range(9) %}x{% endfor %}", "(.*)*(.*)*x$", [],
    [None], [1, 2], ["q"], [[[[[]]]]], {}, {"a": 1}, {"type": "linear", "factor": 2.0}, [1] * 1000,
]  # fmt: skip


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER]},
    {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    {"prompt": "Why?", "completion": " So."},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
    {"text": "The cat sat on the mat."},
]


def places(tree: Any, at: tuple = ()) -> list[tuple]:
    """Returns the paths of all values below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in items:
        found.append((*at, key))
        if isinstance(value, dict | list):
            found += places(value, (*at, key))
    return found


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """Changes one to three values of a JSON tree in place: other values, keys, or none."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        paths = places(tree)
        if not paths:
            return tree
        *way, key = rng.choice(paths)
        holder = tree
        for step in way:
            holder = holder[step]
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(["", "x", "rope_scaling", str(key).upper()])] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], int | float) and abs(holder[key]) < 2**64:
            holder[key] = holder[key] * rng.choice([2, -1, 0.5, 1.0]) + rng.choice([0, 1, -1])
        elif kind == 3:
            other = holder
            for step in rng.choice(paths):
                if not isinstance(other, dict | list) or step not in (
                    other if isinstance(other, dict) else range(len(other))
                ):
                    break
                other = other[step]
            holder[key] = json.loads(json.dumps(other))
        else:
            holder[key] = rng.choice(ODD)
    return tree


def mutate_bytes(rng: random.Random, data: bytes, first: int) -> bytes:
    """Flips, drops, doubles or adds bytes, most of them among the first ones."""
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(max(1, min(len(raw), rng.choice([8, first, len(raw) or 1]))))
        kind = rng.randrange(6)
        if kind == 0:
            del raw[at:]
        elif kind == 1:
            del raw[at : at + rng.randrange(1, 20)]
        elif kind == 2:
            raw[at:at] = rng.choice(
                [b"\0", b"\xff\xfe", b"[" * 5000, b'"', b"9" * 5000, b"\r", b"{"]
            )
        elif kind == 3:
            raw[at:at] = raw[at : at + rng.randrange(1, 50)]
        elif at < len(raw):
            raw[at] = rng.choice([0, 255, raw[at] ^ 1, rng.randrange(256)])
    return bytes(raw)


def mutate_json(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    if rng.random() < 0.3:
        path.write_bytes(mutate_bytes(rng, data, 2000))
    else:
        tree = mutate_tree(rng, json.loads(data))
        path.write_bytes(json.dumps(tree).encode("utf-8", "surrogatepass"))


def mutate_safetensors(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.4:
        path.write_bytes(mutate_bytes(rng, data, 8 + length))
        return
    header = json.dumps(mutate_tree(rng, json.loads(data[8 : 8 + length]))).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


class Base:
    """Whole files of each kind in a folder, and one function a kind: mutates, reads, judges."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.adapter = root / "model", root / "adapter"
        tiny.write_plain_model(self.model, **SMALL)
        self.config = json.loads((self.model / "config.json").read_text())
        self.arch = read_architecture(self.config, "base")
        self.tensors = load_file(self.model / "model.safetensors")
        self.shards = root / "shards"
        shutil.copytree(self.model, self.shards)
        (self.shards / "model.safetensors").unlink()
        names = sorted(self.tensors)
        files = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            some = {name: self.tensors[name] for name in names if files[name] == file}
            save_file(some, self.shards / file)
        (self.shards / INDEX).write_text(json.dumps({"weight_map": files}))
        self.write_adapter()
        tiny.write_data(root / "data.jsonl", 6)
        with open(root / "data.jsonl", "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in RECORDS)
        self.tokenizer = load_tokenizer(self.model)
        self.whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def write_adapter(self) -> None:
        tensors = {}
        for i in range(2):
            for name, out in (("q_proj", 16), ("v_proj", 8)):
                stem = f"model.layers.{i}.self_attn.{name}."
                tensors[peft_name(f"{stem}lora_A")] = np.full((2, 16), i + 1, np.float32)
                tensors[peft_name(f"{stem}lora_B")] = np.full((out, 2), i + 1, np.float32)
        self.adapter.mkdir()
        save_file(tensors, self.adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
        config |= {"target_modules": ["q_proj", "v_proj"], "use_rslora": False}
        (self.adapter / "adapter_config.json").write_text(json.dumps(config))

    def restore(self) -> None:
        for path, data in self.whole.items():
            path.write_bytes(data)

    def safetensors(self, rng: random.Random) -> None:
        path = self.model / "model.safetensors"
        mutate_safetensors(rng, path)
        try:
            theirs = load_file(path)
        except (SafetensorError, OSError, ValueError, TypeError):
            theirs = None
        ours = open_tensors(resolve(str(self.model), "student.path"), self.arch)
        assert theirs is not None, "accepted what the safetensors library refuses"
        for name, tensor in ours.items():
            assert tensor.read().tobytes() == theirs[name].tobytes(), name

    def index(self, rng: random.Random) -> None:
        mutate_json(rng, self.shards / INDEX)
        ours = open_tensors(resolve(str(self.shards), "student.path"), self.arch)
        for name, tensor in ours.items():
            assert tensor.read().tobytes() == self.tensors[name].tobytes(), name

    def config_json(self, rng: random.Random) -> None:
        path = self.model / "config.json"
        mutate_json(rng, path)
        folder = resolve(str(self.model), "student.path")
        arch = load_architecture(folder)
        open_tensors(folder, arch)
        arch.rope.inverse_frequencies(arch.head_dim)
        given = json.loads(path.read_text())
        for key in SMALL.keys() & given.keys():
            assert getattr(arch, key) == given[key] or given[key] is None, key
        assert given.get("rms_norm_eps", 1e-6) == arch.rms_norm_eps

    def tokenizer_files(self, rng: random.Random) -> None:
        name = rng.choice(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
        path = self.model / name
        if path.suffix == ".json":
            mutate_json(rng, path)
        else:
            path.write_bytes(mutate_bytes(rng, path.read_bytes(), 300))
        tokenizer = load_tokenizer(resolve(str(self.model), "student.path"))
        self.rows(tokenizer)

    def adapter_files(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            mutate_safetensors(rng, self.adapter / "adapter_model.safetensors")
        else:
            mutate_json(rng, self.adapter / "adapter_config.json")
        folder = resolve(str(self.adapter), "student.adapter")
        adapter = load_adapter(folder, self.arch)
        given = json.loads((folder / "adapter_config.json").read_text())
        root = given["r"] if not given.get("use_rslora") else math.sqrt(given["r"])
        assert math.isclose(adapter.scale, given["lora_alpha"] / root, rel_tol=1e-15)
        theirs = load_file(folder / "adapter_model.safetensors")
        for key, factor in adapter.factors.items():
            np.testing.assert_array_equal(factor, theirs[peft_name(key)].astype(np.float32))

    def records(self, rng: random.Random) -> None:
        path = self.root / "data.jsonl"
        lines = path.read_bytes().splitlines()
        at = rng.randrange(len(lines))
        if rng.random() < 0.4:
            lines[at] = mutate_bytes(rng, lines[at], 200)
        else:
            tree = mutate_tree(rng, json.loads(lines[at]))
            lines[at] = json.dumps(tree).encode("utf-8", "surrogatepass")
        path.write_bytes(b"\n".join(lines))
        self.rows(self.tokenizer)

    def rows(self, tokenizer: Any) -> None:
        """Makes rows; whole records beside a bad one are none the worse for it."""
        cache = self.root / "rows"
        data = DataConfig(
            path=str(self.root / "data.jsonl"), seq_len=256, batch_size=1, cache_dir=str(cache)
        )
        rows = make_rows(data, tokenizer, chat_template_of(data, tokenizer))
        shutil.rmtree(cache)
        assert 0 < np.sum(rows.loss_mask) < np.sum(np.array(rows.segment_ids) > 0)


KINDS: dict[str, Callable[[Base, random.Random], None]] = {
    "safetensors": Base.safetensors,
    "index": Base.index,
    "config": Base.config_json,
    "tokenizer": Base.tokenizer_files,
    "adapter": Base.adapter_files,
    "records": Base.records,
}


def campaign(root: Path, kind: str, seed: int, count: int) -> tuple[list[str], int]:
    """Returns what ended neither right nor in one UserError, and the number of UserErrors."""
    base = Base(root)
    bad, refused = [], 0

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for number in range(count):
            rng = random.Random(f"{kind} {seed} {number}")
            signal.alarm(SECONDS)
            try:
                KINDS[kind](base, rng)
            except UserError as error:
                refused += 1
                if len(str(error)) > 6000 or not str(error).strip():
                    bad.append(f"{kind} {seed} {number}: a message of {len(str(error))} characters")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                last = traceback.extract_tb(error.__traceback__)[-1]
                here = f"{os.path.basename(last.filename)}:{last.lineno}"
                bad.append(
                    f"{kind} {seed} {number}: {type(error).__name__} {error!s:.200} ({here})"
                )
            finally:
                signal.alarm(0)
                base.restore()
    finally:
        signal.signal(signal.SIGALRM, before)
    return bad, refused


if __name__ == "__main__":  # python tests/mutants.py KIND SEED COUNT
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        bad, refused = campaign(Path(folder) / "base", sys.argv[1], *map(int, sys.argv[2:4]))
    print("\n".join(bad))
    print(f"{sys.argv[1]}: {len(bad)} bad, {refused} refused, {time.time() - begin:.1f} s")
