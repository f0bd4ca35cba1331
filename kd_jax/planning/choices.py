"""Choices for fields set to "auto", by devices and estimate. Needs no jax."""

import dataclasses

from kd_jax.config import Config, Remat
from kd_jax.parallel.platforms import PLATFORMS, choose_dtype
from kd_jax.planning.chips import GIB
from kd_jax.planning.cost import Case
from kd_jax.planning.estimate import estimate


def choose_dtypes(config: Config, platform: str) -> Config:
    """Returns the config with both models' dtypes chosen for a platform."""

    def chosen(part):
        return part and dataclasses.replace(part, dtype=choose_dtype(part.dtype, platform))

    teacher, student = config.teacher, chosen(config.student)
    if teacher is not None:
        own = student if teacher.is_student else chosen(teacher)
        teacher = dataclasses.replace(teacher, dtype=own.dtype)
    return dataclasses.replace(config, teacher=teacher, student=student)


def choose_remat(case: Case) -> Remat:
    """Returns the fastest policy of the platform that fits by its estimate, or the last of them."""
    if case.config.remat != "auto":
        return case.config.remat
    row, policy = PLATFORMS[case.topology.platform], case.config.remat_policy
    for policy in row.remat:
        report = estimate(with_remat(case, policy))
        room = row.remat_memory * report["limit_bytes_per_device"]
        if report["peak_bytes_per_device"] <= room:
            return policy
    return policy


def with_remat(case: Case, policy: Remat) -> Case:
    """Returns the case with another gradient checkpointing policy."""
    return dataclasses.replace(case, config=dataclasses.replace(case.config, remat=policy))


def describe_choices(config: Config, case: Case) -> str:
    """Returns a line about what was chosen; "" if the config left nothing open.

    Args:
      config: as given.
      case: the run with everything chosen.
    """
    found = []
    parts = {"teacher": config.teacher if config.distils else None, "student": config.student}
    for name, part in parts.items():
        if part is not None and part.dtype == "auto":
            found.append(f"{name}.dtype {getattr(case.config, name).dtype}")
    if config.remat == "auto":
        report = estimate(case)
        peak, limit = (report[f"{name}_bytes_per_device"] / GIB for name in ("peak", "limit"))
        found.append(f"remat {case.config.remat_policy} (about {peak:.2f} of {limit:.1f} GiB)")
    return f"chosen for these devices: {', '.join(found)}" if found else ""
