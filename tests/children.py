"""The environment of processes that tests start."""

import os

from paths import ROOT


def environment(num_devices: int) -> dict[str, str]:
    """Returns this process's environment with another number of fake CPU devices.

    The flags for cheap compilation and the cache of compiled programs stay.
    """
    return {**os.environ, "JAX_NUM_CPU_DEVICES": str(num_devices), "PYTHONPATH": str(ROOT)}
