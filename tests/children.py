"""The environment of processes that tests start."""

import os
import re

from paths import ROOT


def environment(num_devices: int) -> dict[str, str]:
    """Returns this process's environment with another number of fake CPU devices.

    The flags for cheap compilation and the cache of compiled programs stay.
    """
    flag = "--xla_force_host_platform_device_count="
    flags = re.sub(rf"{flag}\d+", f"{flag}{num_devices}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
