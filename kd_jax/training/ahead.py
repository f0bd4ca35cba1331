"""A run's step compiled ahead for devices that need not be here."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

from kd_jax.parallel.rules import BATCH_AXES, axes_size
from kd_jax.planning import cost
from kd_jax.planning.chips import GIB
from kd_jax.planning.estimate import Case, Report, _memory_fields, _time_fields, estimate

LARGEST = 8  # temporaries that a report names


def compile_ahead(case: Case, devices: Sequence[Any]) -> Report:
    """Returns `estimate` with what the compiler makes of the train step in its place.

    The program is the one that kd_jax.train runs; weights are shapes alone. A TPU's compiler
    refuses what does not fit, and says how much it would have taken.
    """
    from kd_jax.parallel.mesh import make_mesh
    from kd_jax.setup.runtime import start_jax
    from kd_jax.training import hlo
    from kd_jax.training.abstract import abstract_run

    start_jax(None)
    config, report = case.config, estimate(case)
    mesh_config = dataclasses.replace(config.mesh, **case.sizes)
    rows = config.data.batch_size // config.optim.accumulation_steps
    mesh = make_mesh(mesh_config, rows, devices)
    run = abstract_run(config, case.student, case.teacher, mesh)
    start = time.perf_counter()
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
    report |= _memory_fields(case.topology, used.argument_size_in_bytes, temporaries)
    program = hlo.read_program(compiled.as_text())
    tokens = rows * config.data.seq_len / axes_size(case.sizes, BATCH_AXES) * case.target_share
    found = hlo.collectives(program, math.ceil(tokens / run.program.head.chunk_tokens))
    needs = cost.work(*case.models, case.target_share)
    report |= _time_fields(case, needs, [one.transfer for one in found])
    largest = hlo.largest_arrays(program, LARGEST)
    return report | {"largest_temporaries": [array._asdict() for array in largest]}


def _too_large(case: Case, error: Exception) -> Report:
    """Returns the memory fields of a program that a TPU's compiler refuses for its size.

    Raises:
      the error, where it is another.
    """
    if found := re.search(r"required for HLO temporaries \(([\d.]+)G\)", str(error)):
        arguments = cost.memory(*case.models, case.topology).arguments
        return _memory_fields(case.topology, arguments, int(float(found[1]) * GIB))
    raise error
