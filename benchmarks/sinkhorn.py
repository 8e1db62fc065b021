"""The Sinkhorn part by itself: from given scores (M, N) to the potentials of all rows and columns.

    python benchmarks/sinkhorn.py --shapes 2048x2048x256 --iterations 3 --json benchmarks/results/cpu_sinkhorn.json

Ours: the first column step, then one read of the scores per iteration. Rows that fail the check against float64 are
printed as failing and not timed.
"""

import sys

import tyro
from common import BenchmarkOptions, Report
from competitors import sinkhorn_competitors
from hardware import Machine
from problem import truth_of_sinkhorn


def main(options: BenchmarkOptions) -> int:
    machine = Machine.found(options.device, options.threads)
    report = Report("sinkhorn", machine, options, unused=("L", "R", "temperature", "top_k"))
    for problem in options.problems(machine, L=1, teacher=False):
        scores, _ = problem.scores()
        truth = truth_of_sinkhorn(scores, problem.layout, problem.options)
        competitors = sinkhorn_competitors(problem, scores, options.choice(machine))
        report.table("sinkhorn", problem, competitors, truth)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BenchmarkOptions, description=__doc__)))
