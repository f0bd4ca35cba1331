"""A damaged checkpoint is never read: the whole one before it is, and that is said."""

import gc
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.config import Config, DataConfig, StudentConfig, UserError
from kd_jax.config.record import dump
from kd_jax.training.step import TrainState
from kd_jax.workdir import checkpoints, integrity, resume

CONFIG = Config(
    workdir="unused", teacher=None, student=StudentConfig(path="s"), data=DataConfig(path="d"),
    steps=4,
)  # fmt: skip


def state(step):
    weights = jnp.arange(4096, dtype=jnp.float32) + step
    return TrainState({"student": {"a": weights}}, {"mu": weights / 3}, jnp.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 2 and 4. Read only."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    resume.write_record(CONFIG, workdir, {"student.path": "a"}, num_steps=4)
    with checkpoints.open_checkpointer(workdir, 2) as checkpointer:
        for step in (2, 4):
            checkpoints.save(checkpointer, state(step), step, None)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restored_step(workdir):
    """Returns the step that training would resume from, after what it does first."""
    step, _ = integrity.choose_checkpoint(workdir)
    integrity.set_aside_damaged(workdir)
    with checkpoints.open_checkpointer(workdir, 2) as checkpointer:
        found, _ = checkpoints.restore(checkpointer, state(0))
        assert int(found.step) == step
        np.testing.assert_array_equal(found.trainable["student"]["a"], np.arange(4096.0) + step)
        checkpoints.save(checkpointer, state(4), 4, None)  # the step that was damaged
    return step


def zero_a_block(file):
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(min(512, size - size // 2)))


DAMAGES = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file: file.unlink(),
    "a zeroed block": zero_a_block,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_seen(damage, workdir):
    """Also what Orbax reads without an error, as other weights."""
    latest = workdir / "checkpoints" / "4"
    names = [x.relative_to(latest) for x in latest.rglob("*") if x.is_file()]
    assert len(names) >= 8
    for name in names:
        if str(name) == integrity.SEAL and damage == "missing":
            continue  # as after a kill before it was written
        copy = shutil.copytree(latest, workdir / "copy")
        assert integrity.damage(copy) == ""
        DAMAGES[damage](copy / name)
        assert integrity.damage(copy), name
        shutil.rmtree(copy)


def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damaged_one_kept(workdir, capsys):
    latest = workdir / "checkpoints" / "4"
    DAMAGES["truncated"](latest / "state" / "manifest.ocdbt")
    (workdir / "checkpoints" / "999").mkdir()
    (workdir / "checkpoints" / "1000").write_text("")
    assert checkpoints.open_trained(workdir).step == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all("is damaged" in x and "step 2 is used" in x for x in said)
    assert restored_step(workdir) == 2
    kept = {x.name for x in (workdir / "checkpoints").iterdir()}
    assert kept == {"2", "4", "4.damaged1", "999.damaged1", "1000.damaged1"}
    assert restored_step(workdir) == 4


def test_a_checkpoint_without_a_seal_is_valid(workdir):
    (workdir / "checkpoints" / "4" / integrity.SEAL).unlink()
    assert checkpoints.open_trained(workdir).step == 4 and restored_step(workdir) == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's
@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/d"])
def test_damage_without_a_seal_is_one_error(name, workdir):
    latest = workdir / "checkpoints" / "4"
    (latest / integrity.SEAL).unlink()
    place = latest / name
    shutil.rmtree(place) if place.is_dir() else DAMAGES["truncated"](place)
    with pytest.raises(UserError, match="checkpoints/4: cannot be read"):
        restored_step(workdir)
    with pytest.raises(UserError, match="checkpoints/4: cannot be read"):
        checkpoints.open_trained(workdir)
    gc.collect()


def test_damaged_checkpoints_alone_are_named(workdir):
    for step in (2, 4):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "state")
    with pytest.raises(UserError, match=r"got a damaged one: 4 \(.*\); 2 \("):
        integrity.choose_checkpoint(workdir)


def test_a_checkpoint_that_retention_deletes_meanwhile_is_not_damaged(workdir, monkeypatch, capsys):
    measure = integrity.damage

    def delete(checkpoint):
        if checkpoint.name == "4":
            shutil.rmtree(checkpoint)
        return measure(checkpoint)

    monkeypatch.setattr(integrity, "damage", delete)
    trained = checkpoints.open_trained(workdir)
    assert trained.step == 2 and not capsys.readouterr().err
    shutil.rmtree(trained.place)
    with pytest.raises(UserError, match="checkpoints/2: was deleted while it was read"):
        trained.read("a")


def test_a_step_that_is_asked_for_is_not_replaced_by_another(workdir):
    DAMAGES["zeroed"](workdir / "checkpoints" / "4" / "state" / "_sharding")
    assert checkpoints.open_trained(workdir, 2).step == 2
    with pytest.raises(UserError, match=r"4 \(state/_sharding is changed\).*another --step"):
        checkpoints.open_trained(workdir, 4)


def test_a_record_of_another_run_is_refused(workdir):
    file = workdir / "config.json"
    record = json.loads(file.read_text())
    record["config"]["eval"]["every_steps"] = 7  # a run may change it
    file.write_text(json.dumps(record))
    integrity.choose_checkpoint(workdir)
    record["config"]["lora"]["alpha"] = 3.0
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"config\.json: expected the record of the run that wrote"):
        integrity.choose_checkpoint(workdir)
    assert dump(CONFIG)["lora"]["alpha"] != 3.0
