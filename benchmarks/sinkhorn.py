"""The Sinkhorn part by itself, from given scores (M, N) or from embeddings to the potentials of all rows and columns.

    python benchmarks/sinkhorn.py --shapes 2048x2048x256 --iterations 3 --json benchmarks/results/cpu_sinkhorn.json

Ours: the first column step, then one read of the scores per iteration. From embeddings there is no mask, which others
do not have, and flash-sinkhorn is compared where it is installed on a GPU. Rows that fail the check against float64
are printed as failing and not timed.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from command_line import options_of
from common import BenchmarkOptions, Report
from competitors import sinkhorn_competitors
from hardware import Machine
from potentials import potentials_competitors, truth_of_potentials
from problem import Problem, truth_of_sinkhorn


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
    machine = Machine.found(options.device, options.threads)
    report = Report("sinkhorn", machine, options, unused=("L", "R", "temperature", "top_k"))
    for part, table in (("from-scores", from_scores), ("from-embeddings", from_embeddings)):
        if part in options.parts:
            for problem in options.problems(machine, L=1):
                table(options, problem, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(options_of(SinkhornOptions, __doc__)))
