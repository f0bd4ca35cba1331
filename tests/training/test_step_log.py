"""Times of steps in the log."""

import time
from types import SimpleNamespace

import pytest

from kd_jax.config import LogConfig
from kd_jax.training.step_log import StepLog


def test_a_step_ends_when_its_metrics_are_there_and_not_when_they_are_logged():
    """Starting the next step may take the host most of that step's time."""
    written = {}
    writer = SimpleNamespace(num_steps=2, write=written.__setitem__)
    log = StepLog(SimpleNamespace(log=LogConfig(every_steps=1)), writer, None)
    for step in (1, 2):
        time.sleep(0.1)
        log.add(step, {"tokens": 100, "target_tokens": 50}, {})
        time.sleep(0.4)
    log.flush()
    log.close()
    seconds = [written[step]["step_seconds"] for step in (1, 2)]
    assert seconds[0] < 0.3 and seconds[1] > 0.35


def test_an_error_of_the_device_ends_the_run():
    class Broken:
        def __array__(self, *_):
            raise RuntimeError("the device is gone")

    log = StepLog(SimpleNamespace(log=LogConfig()), SimpleNamespace(num_steps=1), None)
    log.add(1, {"loss": Broken()}, {})
    with pytest.raises(RuntimeError, match="the device is gone"):
        log.flush()
    log.close()
