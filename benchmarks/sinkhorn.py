"""Benchmark of the Sinkhorn iterations alone: from scores (M, N) or embeddings to row and column potentials.

    python benchmarks/sinkhorn.py --shapes 2048x2048x256 --iterations 3 --json benchmarks/results/cpu_sinkhorn.json

Our kernels take a first column step, then read the scores once per iteration. Problems from embeddings have no
positive mask, because other packages have none; the flash-sinkhorn package is compared on GPUs where it is installed.
Each row is compared with float64 first; a row that fails is not timed.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from command_line import options_of
from competitors import sinkhorn_competitors
from hardware import Machine
from potentials import potentials_competitors, truth_of_potentials
from problem import Problem, truth_of_sinkhorn
from report import BenchmarkOptions, Report


@dataclass
class SinkhornOptions(BenchmarkOptions):
    parts: tuple[Literal["from-scores", "from-embeddings"], ...] = ("from-scores", "from-embeddings")


def from_scores(options: SinkhornOptions, problem: Problem, report: Report) -> None:
    scores, _ = problem.scores()
    truth = truth_of_sinkhorn(scores, problem.layout, problem.options)
    report.table("sinkhorn", problem, sinkhorn_competitors(problem, scores, options.choice(report.machine)), truth)


def from_embeddings(options: SinkhornOptions, problem: Problem, report: Report) -> None:
    competitors = potentials_competitors(problem, options.choice(report.machine))
    report.table("potentials", problem, competitors, truth_of_potentials(problem))


def main(options: SinkhornOptions) -> int:
    machine = Machine.detect(options.device, options.threads)
    report = Report("sinkhorn", machine, options, unused=("L", "R", "temperature", "top_k"))
    for part, table in (("from-scores", from_scores), ("from-embeddings", from_embeddings)):
        if part in options.parts:
            for problem in options.problems(machine, L=1):
                table(options, problem, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(options_of(SinkhornOptions, __doc__)))
