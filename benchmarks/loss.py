"""Benchmark of the loss and its gradient, from given scores and from embeddings (forward and backward).

    python benchmarks/loss.py --authors CHECKOUT --json benchmarks/results/cpu_loss.json

A problem with more than key_views*B keys is one rank's share of several ranks. Every competitor then gets the other
ranks' keys ready-made and reduces locally. Each row is compared with float64 first; a row that fails is not timed.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from command_line import options_of
from competitors import from_scores_competitors, whole_competitors
from hardware import Machine
from problem import Problem, truth_of_embeddings, truth_of_scores
from report import BenchmarkOptions, Report


@dataclass
class LossOptions(BenchmarkOptions):
    target_views: int = 2
    """L: the first L views give targets."""
    temperature: float = 0.1
    top_k: int = 0
    teacher: bool = False
    """Take keys and target rows from a teacher's embeddings."""
    teacher_views: int | None = None
    """R: the teacher embeds the first R views. None: the larger of target_views and key_views."""
    parts: tuple[Literal["from-scores", "whole"], ...] = ("from-scores", "whole")


def from_scores(options: LossOptions, problem: Problem, report: Report) -> None:
    source, target = problem.scores()
    truth = truth_of_scores(source, target, problem.layout, problem.options)
    competitors = from_scores_competitors(problem, source, target, options.choice(report.machine))
    report.table("from-scores", problem, competitors, truth)


def whole(options: LossOptions, problem: Problem, report: Report) -> None:
    competitors = whole_competitors(problem, options.choice(report.machine))
    report.table("whole", problem, competitors, truth_of_embeddings(problem))


def main(options: LossOptions) -> int:
    machine = Machine.detect(options.device, options.threads)
    report = Report("loss", machine, options)
    least = max(options.target_views, options.key_views)
    given = {
        "L": options.target_views,
        "R": (options.teacher_views or least) if options.teacher else 0,
        "temperature": options.temperature,
        "top_k": options.top_k,
    }
    for part, table in (("from-scores", from_scores), ("whole", whole)):
        if part in options.parts:
            for problem in options.problems(machine, **given):
                table(options, problem, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(options_of(LossOptions, __doc__)))
