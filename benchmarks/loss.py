"""The loss and its gradient: from given scores, and whole, from embeddings, forward and backward.

    python benchmarks/loss.py --authors CHECKOUT --json benchmarks/results/cpu_loss.json

"whole" is one process, so it has N = key_views*B keys whatever N the shape says. Rows that fail the check against
float64 are printed as failing and not timed.
"""

import sys
from dataclasses import dataclass, replace
from typing import Literal

import tyro
from common import BenchmarkOptions, Report
from competitors import from_scores_competitors, whole_competitors
from hardware import Machine
from problem import Problem, parse_shape, truth_of_embeddings, truth_of_scores


@dataclass
class LossOptions(BenchmarkOptions):
    target_views: int = 2
    """L, the first L views give targets."""
    temperature: float = 0.1
    top_k: int = 0
    teacher: bool = False
    """Keys and target rows from a teacher."""
    parts: tuple[Literal["from-scores", "whole"], ...] = ("from-scores", "whole")


def from_scores(options: LossOptions, problem: Problem, report: Report) -> None:
    source, target = problem.scores()
    truth = truth_of_scores(source, target, problem.layout, problem.options)
    competitors = from_scores_competitors(problem, source, target, options.choice(report.machine))
    report.table("from-scores", problem, competitors, truth)


def whole(options: LossOptions, problem: Problem, report: Report) -> None:
    competitors = whole_competitors(problem, options.choice(report.machine))
    report.table("whole", problem, competitors, truth_of_embeddings(problem))


def one_process(options: LossOptions) -> LossOptions:
    """The same options with N = key_views*B in every shape, each shape once."""
    sizes = [parse_shape(text) for text in options.shapes]
    shapes = [f"{M}x{M // options.views * options.key_views}x{D}" for M, _, D in sizes]
    return replace(options, shapes=tuple(dict.fromkeys(shapes)))


def main(options: LossOptions) -> int:
    machine = Machine.found(options.device, options.threads)
    report = Report("loss", machine, options)
    given = {
        "L": options.target_views,
        "teacher": options.teacher,
        "temperature": options.temperature,
        "top_k": options.top_k,
    }
    if "from-scores" in options.parts:
        for problem in options.problems(machine, **given):
            from_scores(options, problem, report)
    if "whole" in options.parts:
        for problem in one_process(options).problems(machine, **given):
            whole(options, problem, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(LossOptions, description=__doc__)))
