"""metrics.jsonl of a resumed run: the steps until its checkpoint, without damaged lines."""

import json
from contextlib import suppress

import pytest

from kd_jax.config import LogConfig
from kd_jax.workdir.metrics import SampleWriter, Writer

DAMAGED = ["5", "[1]", "null", '{"loss": 1.0}', '{"step": "3"}', '{"step": 3, "lo', "\0" * 40]


def resume(workdir, step):
    writer = Writer(workdir, LogConfig(tensorboard=False), step, 9)
    writer.write(step + 1, {"loss": 1.0})
    writer.close()
    return [json.loads(x)["step"] for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_missing_steps_are_said(tmp_path, capsys):
    assert resume(tmp_path, 0) == [1] and not capsys.readouterr().err
    assert resume(tmp_path, 4) == [1, 5]
    assert "metrics.jsonl: lines of steps until 4 are missing" in capsys.readouterr().err


def test_a_full_disk_is_an_error_with_the_files_name(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = Writer(tmp_path, LogConfig(tensorboard=False), 0, 9)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        writer.write(1, {"loss": 1.0})
    with suppress(OSError):
        writer.close()
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*samples\.jsonl"):
        SampleWriter(tmp_path, 0).write(1, [{"text": "four"}])


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("place", [1, 4])
def test_a_damaged_line_is_dropped_and_said(damaged, place, tmp_path, capsys):
    lines = [json.dumps({"step": step, "loss": 0.0}) for step in (1, 2, 3, 4)]
    lines.insert(place, damaged)
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert resume(tmp_path, 3) == [1, 2, 3, 4]
    assert "metrics.jsonl: 1 damaged lines were dropped" in capsys.readouterr().err
    assert resume(tmp_path, 2) == [1, 2, 3]
    assert "damaged" not in capsys.readouterr().err
