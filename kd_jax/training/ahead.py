"""A run's train step, compiled for local or absent devices."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

from kd_jax.parallel.rules import axes_size, token_axes
from kd_jax.planning.chips import GIB
from kd_jax.planning.cost import Case
from kd_jax.planning.estimate import Report, estimate, memory_fields, time_fields
from kd_jax.planning.memory import beside_steps, estimate_memory

LARGEST = 8  # arrays that a report names


def compile_ahead(case: Case, devices: Sequence[Any]) -> Report:
    """Returns `estimate` with the compiler's figures in place of those from shapes.

    The program is that of kd_jax.train, with shapes for weights. A TPU's compiler refuses a
    program that is too large, and says how large.
    """
    import jax

    from kd_jax.parallel.mesh import make_mesh
    from kd_jax.training import hlo
    from kd_jax.training.abstract import abstract_run

    config, report = case.config, estimate(case)
    mesh_config = dataclasses.replace(config.mesh, **case.sizes)
    rows = config.data.batch_size // config.optim.accumulation_steps
    mesh = make_mesh(mesh_config, rows, devices)
    run = abstract_run(config, case.student, case.teacher, mesh)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells kernels the absent device
        lowered = run.trace().lower()
    traced = time.perf_counter()
    report |= {"method": "compiled", "trace_seconds": traced - start}
    try:
        compiled = lowered.compile()
    except Exception as error:
        compiled, report = None, report | _too_large(case, error)
    report["compile_seconds"] = time.perf_counter() - traced
    if compiled is None:
        return report
    used = compiled.memory_analysis()
    temporaries = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    arguments = used.argument_size_in_bytes
    temporaries = max(temporaries, beside_steps(case, arguments))
    report |= memory_fields(case.topology, arguments, temporaries)
    module = hlo.read_module(compiled.as_text())
    shards = axes_size(case.sizes, token_axes(case.sizes, config.data.seq_len))
    tokens = rows * config.data.seq_len / shards * case.target_share
    found = hlo.collectives(module, math.ceil(tokens / run.program.head.chunk_tokens))
    report |= time_fields(case, [one.transfer for one in found])
    largest = hlo.largest_arrays(module, LARGEST)
    return report | {"largest_temporaries": [array._asdict() for array in largest]}


def _too_large(case: Case, error: Exception) -> Report:
    """Returns the memory fields of a program that a TPU's compiler refused for its size.

    Raises:
      error: it is about something else.
    """
    if found := re.search(r"required for HLO temporaries \(([\d.]+)G\)", str(error)):
        arguments = sum(estimate_memory(case).arguments.values())
        return memory_fields(case.topology, arguments, int(float(found[1]) * GIB))
    raise error
