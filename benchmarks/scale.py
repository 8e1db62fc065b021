"""Forecasts of `bam_kernels.plan` for a step on W ranks, compared with the measured share of one rank.

    python benchmarks/scale.py --json benchmarks/results/cpu_scale.json

The first table measures `bam_loss` and its gradient on one rank of W. The other ranks' keys are already there, so
nothing is sent. Its forecast takes the products and passes at the rates measured on this machine. The second table is a
forecast, with messages, at the rates of an H200 for the published batch: 8 views of 256 images, 4096 features, a
teacher of 2 views.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import options_of
from hardware import Machine
from report import plain_table, write

from bam_kernels import bam_loss, plan
from bam_kernels.engine.cost import H200, Rates
from bam_kernels.forecast import Forecast
from bam_kernels.simulated import SimulatedRanks


@dataclass
class ScaleOptions:
    views: int = 2
    images: int = 512
    """Number of images on each rank."""
    features: int = 256
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    teacher: tuple[bool, ...] = (False, True)
    """Whether there is a teacher, of as many views as the student; one set of rows for each value."""
    forecast_ranks: tuple[int, ...] = (1, 8, 16, 64, 256, 1024, 4096)
    repetitions: int = 10
    device: str = "auto"
    threads: int | None = None
    json: Path | None = None
    csv: Path | None = None


def measured_row(options: ScaleOptions, machine: Machine, W: int, teacher: bool) -> dict[str, Any]:
    V, B, D = options.views, options.images, options.features
    generator = torch.Generator().manual_seed(0)

    def embeddings() -> torch.Tensor:
        return torch.randn(V, B, D, generator=generator).to(machine.device)

    student, y = embeddings().requires_grad_(), embeddings() if teacher else None
    keys = torch.nn.functional.normalize(torch.randn(W * V * B, D, generator=generator), dim=1).to(machine.device)
    group = SimulatedRanks(W, 0, keys) if W > 1 else None

    def step() -> None:
        student.grad = None
        bam_loss(student, y, key_views=V, target_views=V, group=group, precision="exact").backward()

    step()
    peak = machine.peak_bytes(step)
    times = sorted(machine.time_ms(step) for _ in range(options.repetitions))
    gemm = machine.gemm_gflops * 1e9
    rates = Rates(gemm, gemm, machine.copy_gbs * 1e9, machine.exp_per_s, float("inf"), 0.0)
    forecast = plan(
        views=V,
        images=B,
        features=D,
        ranks=W,
        teacher_views=V if teacher else 0,
        target_views=V,
        key_views=V,
        rates=rates,
    )
    median = times[len(times) // 2]
    return {
        **shape(forecast),
        "teacher": teacher,
        "median_ms": median,
        "forecast_ms": 1e3 * forecast.step_s,
        "ratio": median / (1e3 * forecast.step_s),
        "peak_bytes": peak,
        "forecast_bytes": forecast.total_bytes,
        "rates": "measured here",
    }


def forecast_row(W: int) -> dict[str, Any]:
    forecast = plan(views=8, images=256, features=4096, ranks=W, teacher_views=2, sixteen_bit=True, rates=H200)
    parts = {f"{name.replace(' ', '_')}_ms": 1e3 * seconds for name, seconds in forecast.seconds.items()}
    return {
        **shape(forecast),
        "teacher": True,
        **parts,
        "forecast_ms": 1e3 * forecast.step_s,
        "forecast_bytes": forecast.total_bytes,
        "sent_bytes": sum(message.bytes for message in forecast.messages),
        "rates": "measured on an H200",
    }


def shape(forecast: Forecast) -> dict[str, int]:
    return {letter: getattr(forecast.layout, letter) for letter in "WMND"}


def main(options: ScaleOptions) -> int:
    machine = Machine.detect(options.device, options.threads)
    print(machine.line(), flush=True)
    here = []
    for teacher, W in itertools.product(options.teacher, options.ranks):
        machine.measure()
        here.append(measured_row(options, machine, W, teacher))
    print(f"\none rank's share, measured and forecast\n{plain_table(here)}")
    anywhere = [forecast_row(W) for W in options.forecast_ranks]
    print(f"\nforecast at the rates of an H200: nothing of this has been run\n{plain_table(anywhere)}")
    keys = dict.fromkeys(key for row in here + anywhere for key in row)
    rows = [dict.fromkeys(keys) | row | machine.fields() for row in here + anywhere]
    rows = [{"benchmark": "scale"} | row for row in rows]
    write(rows, options.json, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main(options_of(ScaleOptions, __doc__)))
