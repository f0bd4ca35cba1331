"""Tokens per second and peak memory of data preparation: python benchmarks/prepare.py --help.

Writes JSON lines of the wanted size, whose records are drawn from a file with their words shuffled,
so that no cache of texts helps, and prepares rows from them. Lines after the first 500 MB are
copies of these.
"""

import argparse
import dataclasses
import json
import random
import tempfile
import threading
import time
from pathlib import Path

from kd_jax.config import DataConfig
from kd_jax.data.chat import chat_template_of, load_tokenizer
from kd_jax.data.files import read_raw
from kd_jax.data.records import make_record
from kd_jax.data.rows import describe_rows, make_rows

VARIED_BYTES = 500 * 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with a template")
    parser.add_argument("--data", required=True, help="file whose records are varied")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--folder", help="folder for the file and the rows; else a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "data.jsonl"
        write_varied(Path(args.data), file, args.megabytes * 10**6)
        data = DataConfig(path=str(file), seq_len=args.seq_len, cache_dir=folder)
        data = dataclasses.replace(data, num_processes=args.processes)
        tokenizer = load_tokenizer(Path(args.tokenizer))
        template = chat_template_of(data, tokenizer)
        peaks: dict[str, int] = {}
        watching = threading.Thread(target=watch, args=(peaks,), daemon=True)
        watching.start()
        began = time.monotonic()
        rows = make_rows(data, tokenizer, template)
        seconds = time.monotonic() - began
        peaks["stop"] = 1
        watching.join()
        began = time.monotonic()
        make_rows(data, tokenizer, template)
        again = time.monotonic() - began
    print(describe_rows(rows))
    print(
        f"{rows.counts['tokens']:,} tokens in {seconds:.1f} s: "
        f"{rows.counts['tokens'] / seconds:,.0f} tokens/s; peak memory {peaks['own'] / 2**20:,.0f} "
        f"MiB, of all processes {peaks['all'] / 2**20:,.0f} MiB; verified in {again:.2f} s"
    )


def write_varied(source: Path, file: Path, num_bytes: int) -> None:
    """Writes records of `source` whose words are shuffled, until the file has the size."""
    draw = random.Random(0)
    chats = [make_record(*raw).messages for raw in read_raw(str(source), "train", 0, None)]
    with file.open("w") as stream:
        while stream.tell() < min(num_bytes, VARIED_BYTES):
            for messages in draw.sample(chats, len(chats)):
                turns = [{**turn, "content": shuffled(draw, turn["content"])} for turn in messages]
                stream.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    size = file.stat().st_size
    with file.open("rb") as lines, file.open("ab") as stream:
        for _ in range(size, num_bytes, size):
            lines.seek(0)
            for start in range(0, size, 2**20):
                stream.write(lines.read(min(2**20, size - start)))


def shuffled(draw: random.Random, text: str) -> str:
    words = text.split(" ")
    draw.shuffle(words)
    return " ".join(words)


def watch(peaks: dict[str, int]) -> None:
    """Records the highest resident memory of this process and of all its children, in bytes."""
    me = Path("/proc/self/task")
    while "stop" not in peaks:
        children = [c for task in me.iterdir() for c in (task / "children").read_text().split()]
        own = resident("self")
        peaks["own"] = max(peaks.get("own", 0), own)
        peaks["all"] = max(peaks.get("all", 0), own + sum(map(resident, children)))
        time.sleep(0.2)


def resident(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


if __name__ == "__main__":
    main()
