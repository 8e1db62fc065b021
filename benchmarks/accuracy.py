"""Errors of P and dz = dloss/dz against float64, for embeddings from spread out to nearly collapsed.

    python benchmarks/accuracy.py --json benchmarks/results/cpu_accuracy.json
    TRITON_INTERPRET=1 python benchmarks/accuracy.py --images 128      # Triton's kernels too, without a GPU

Errors are relative Frobenius norms, one for each mean cosine between images and each epsilon. One process holds all
N = views*B keys. Rows named int16 have fp16 embeddings and int16 scores; all others are float32. Nothing is timed.
A star marks an error with which the other benchmarks do not time a row: above 1e-5, or 1e-3 in 16 bit (ten times as
much for epsilon up to 0.005), or NaN.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import options_of
from competitor import WHOLE, Choice, RowName
from competitors import whole_competitors
from hardware import Machine
from problem import Problem, layout_of, truth_of_embeddings
from report import Row, align_columns, compare_with_truth, error_text, problem_fields, write

from bam_kernels.options import Options


@dataclass
class AccuracyOptions:
    images: int = 256
    views: int = 2
    D: int = 256
    cosines: tuple[float, ...] = (0.0, 0.9, 0.99, 0.999)
    """Mean cosines between two images, one column of the table each."""
    epsilons: tuple[float, ...] = (0.05, 0.005, 0.001)
    temperature: float = 0.1
    iterations: int = 3
    top_k: int = 0
    rows: tuple[RowName, ...] = (*WHOLE, "eager", "authors")
    authors: Path | None = None
    """Path of a checkout of the authors' published code; without it their rows are left out."""
    device: str = "auto"
    threads: int | None = None
    json: Path | None = None
    csv: Path | None = None


def error_rows(options: AccuracyOptions, machine: Machine, cosine: float, epsilon: float) -> list[dict[str, Any]]:
    M = options.views * options.images
    layout = layout_of(M, M, options.D, V=options.views, L=options.views, T=options.views)
    named = Options(
        epsilon=epsilon, temperature=options.temperature, iterations=options.iterations, top_k=options.top_k
    ).checked("accuracy")
    torch.compiler.reset()
    problem = Problem.generate(layout, named, machine.device, cosine=cosine)
    truth = truth_of_embeddings(problem)
    head = {"benchmark": "accuracy", "part": "whole", "cosine": cosine} | problem_fields(problem)
    competitors = whole_competitors(problem, Choice(options.rows, ("auto",), options.authors, 0))
    rows = [compare_with_truth(c, truth, named) for c in competitors if c.outputs is not None]
    return [head | fields(row) | machine.fields() for row in rows]


def fields(row: Row) -> dict[str, Any]:
    keys = ("kind", "competitor", "precision", "status", "reason", "error_P", "error_gradient", "threshold")
    return {key: value for key, value in row.fields().items() if key in keys}


def table(rows: list[dict[str, Any]], cosines: tuple[float, ...]) -> str:
    """Table of errors of P and dz: one line per epsilon and competitor, one column per mean cosine."""
    cells = [["epsilon", "scores", *(f"cosine {c}: P / dz" for c in cosines), ""]]
    for epsilon, name in dict.fromkeys((row["epsilon"], row["competitor"]) for row in rows):
        line = [f"{epsilon:g}", name]
        for row in rows:
            if (row["epsilon"], row["competitor"]) == (epsilon, name):
                errors = f"{error_text(row['error_P'])} / {error_text(row['error_gradient'])}"
                line.append(errors + ("      " if row["status"] == "ok" else " *    "))
        cells.append([*line, ""])
    return align_columns(cells)


def main(options: AccuracyOptions) -> int:
    machine = Machine.detect(options.device, options.threads)
    print(machine.line(), flush=True)
    rows = []
    for epsilon in options.epsilons:
        for cosine in options.cosines:
            rows += error_rows(options, machine, cosine, epsilon)
    M = options.views * options.images
    print(f"\nM=N={M} D={options.D} V=L=T={options.views} iterations={options.iterations} top_k={options.top_k}")
    print(table(rows, options.cosines))
    write(rows, options.json, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main(options_of(AccuracyOptions, __doc__)))
