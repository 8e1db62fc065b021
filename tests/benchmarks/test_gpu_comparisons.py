"""The problems and rows that are measured on a GPU: what they take, what is compiled before, what is replayed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bam_kernels.backends import cpu

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "benchmarks" / "gpu"
sys.path.append(str(SCRIPTS))

import comparisons  # noqa: E402
import measurement  # noqa: E402
from hardware import Machine  # noqa: E402
from measure import Measure  # noqa: E402

needs_kernels = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the extension")


def test_the_plan_of_a_real_run_fits_its_time() -> None:
    listed = comparisons.comparisons(toy=False)
    assert comparisons.FIRST_S + sum(comparison.seconds for comparison in listed) < 200
    assert all(measurement.layout_of(comparison).M in (512, 2048) for comparison in listed)
    assert len({comparison.name for comparison in listed}) == len(listed)


def test_rows_that_compile_share_no_process_with_flash_sinkhorn() -> None:
    """It tries 44 tiles; and all slow kinds of a problem are compiled, graphs by the row that they replay."""
    listed = {step.name: step.command for step in Measure(Path("out"), None, False, None).compile_steps()}
    name = "compile-potentials-2048x8192x256"
    assert [listed[n][-1] for n in (name, f"{name}-flash-sinkhorn", f"{name}-flash-sinkhorn-tf32")] == [
        *("compile", "flash-sinkhorn", "flash-sinkhorn-tf32")
    ]
    assert listed["compile-2048x8192x256"][-3:] == ["triton-int16", "triton-flash-int16", "compile-autocast"]
    assert not [step for step in listed if "524288" in step]  # the memory of the largest is for one process


@needs_kernels
def test_a_graph_of_sinkhorn_replays_the_row_without() -> None:
    comparison = comparisons.comparisons(True)[3]
    options = SimpleNamespace(toy=True, authors=None)
    here = Machine(torch.device("cpu"), "a test", "none", 1, "none", gemm_gflops=1.0, half_gemm_gflops=1.0)
    made = measurement.ProblemCompetitors(comparison, here, options)
    graph, eager = made.competitor("cpu-graph"), made.competitor("cpu")
    assert (graph.kind, graph.name) == ("cpu-graph", f"{eager.name}, graph") and graph.outputs is eager.outputs
    assert (graph.run.step, graph.run.fresh) == (eager.run, eager.fresh)
    assert made.missing("cpu-graph") is None and made.missing("flash-sinkhorn-graph") == "cannot run here"
