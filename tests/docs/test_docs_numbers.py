"""Every number in the tables of measurements in docs/ is the number of a result file, rounded."""

import json
import re
from collections.abc import Sequence

import pytest
from pages import ROOT, text

OTHERS = ["compile", "authors", "eager"]
MB, GB = 1e6, 1e9


def table(page: str, head: str) -> list[list[str]]:
    """Cells of the rows of the one table with this first line."""
    (lines,) = re.findall(rf"^{re.escape(head)}\n\|[-|]+\|\n((?:\|.*\n)+)", text(page), re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]


def numbers(cell: str) -> list[str]:
    """Numbers as they are written, without the commas between thousands."""
    return re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", cell))


def is_rounded(written: str, value: float) -> bool:
    """Whether `written` is `value` rounded to the digits that are written."""
    if "e" in written:
        return float(written) == float(f"{value:.0e}")
    return abs(float(written) - value) <= 0.5001 * 10.0 ** -len(written.partition(".")[2])


def assert_rounded(cells: Sequence[str], values: Sequence[float]) -> None:
    written = numbers(" ".join(cells))
    assert len(written) == len(values), cells
    assert [pair for pair in zip(written, values, strict=True) if not is_rounded(*pair)] == []


def results(file: str, **problem: object) -> list[dict]:
    """Rows of a result file for one problem."""
    rows = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
    return [row for row in rows if all(row[key] == value for key, value in problem.items())]


@pytest.mark.parametrize(
    "head, file, part, kinds, peaks",
    [
        (
            "| M x N | cpu | cpu, int16 scores | compile | authors | eager | share of floor | "
            "peak MB: cpu, compile, authors, eager |",
            "cpu_loss.json",
            "from-scores",
            ["cpu-int16", *OTHERS],
            ["cpu", *OTHERS],
        ),
        (
            "| M x N | cpu | cpu, split products | products | compile | authors | eager | "
            "peak MB: cpu, compile, authors, eager |",
            "cpu_loss.json",
            "whole",
            ["cpu-split", "gemms", *OTHERS],
            ["cpu", *OTHERS],
        ),
        (
            "| M x N | cpu | cpu, int16 scores | compile | authors | eager | share of floor |",
            "cpu_sinkhorn.json",
            "sinkhorn",
            ["cpu-int16", *OTHERS],
            [],
        ),
        (
            "| M x N | cpu | compile | eager | share of floor | peak MB: cpu, compile, eager |",
            "cpu_sinkhorn.json",
            "potentials",
            ["compile", "eager"],
            ["cpu", "compile", "eager"],
        ),
    ],
    ids=["loss-from-scores", "loss", "sinkhorn", "potentials"],
)
def test_times_on_a_cpu(head, file, part, kinds, peaks):
    """Times are followed by their ratio to ours, but for our own int16 scores."""
    rows = table("docs/benchmarks.md", head)
    assert len(rows) == 3
    for first, *cells in rows:
        M, N = map(int, numbers(first))
        found = {row["kind"]: row for row in results(file, part=part, M=M, N=N)}
        ours = found["cpu"]["median_ms"]
        values = [ours]
        for kind in kinds:
            ms = found[kind]["median_ms"]
            values += [ms] if kind == "cpu-int16" else [ms, ms / ours]
        values += [100 * found["cpu"]["share_of_floor"]] if "share of floor" in head else []
        assert_rounded(cells, values + [found[kind]["peak_bytes"] / MB for kind in peaks])


def test_times_before_on_a_cpu():
    rows = table("docs/benchmarks.md", "| M x N x D | from scores | share of floor | whole | products |")
    assert len(rows) == 4
    for first, *cells in rows:
        M, N, D = map(int, numbers(first)[:3])
        file = "cpu_views_before.json" if "views" in first else "cpu_loss_before.json"
        found = {(r["part"], r["kind"]): r for r in results(file, M=M, N=N, D=D)}
        whole, products = (found["whole", kind]["median_ms"] for kind in ("cpu", "gemms"))
        values = [whole, products, products / whole]
        if given := found.get(("from-scores", "cpu")):
            values = [given["median_ms"], 100 * given["share_of_floor"], *values]
        assert_rounded([cell for cell in cells if cell != "-"], values)


def test_times_of_small_problems_on_a_cpu():
    rows = table("docs/benchmarks.md", "| M x N x D | views | cpu | cpu, split products | products | compile | eager |")
    assert len(rows) == 5
    for first, views, *cells in rows:
        M, N, D = map(int, numbers(first))
        file = "cpu_small.json" if views == "2" else "cpu_views.json"
        found = {row["kind"]: row["median_ms"] for row in results(file, M=M, N=N, D=D, V=int(views))}
        ours = found["cpu"]
        ratios = [
            number
            for kind in ("cpu-split", "gemms", "compile", "eager")
            for number in (found[kind], found[kind] / ours)
        ]
        assert_rounded(cells, [ours, *ratios])


def test_host_time():
    rows = table(
        "docs/benchmarks.md",
        "| | cuda | triton | formula | floor | Python calls: cuda, triton | allocations | operators of torch |",
    )
    assert len(rows) == 6
    for first, *cells in rows:
        prefix = "" if "anew" in first else "cold_" if "cold" in first else "warm_"
        file = "host.json" if prefix else "host-before.json"
        found = {r["backend"]: r for r in results(file, part="total", teacher="no teacher" not in first)}
        median, share = f"{prefix}median_us", f"{prefix}x_formula"
        values = [number for name in ("cuda", "triton") for number in (found[name][median], found[name][share])]
        values += [found["reference"][median], *([found["floor"][median]] if prefix else [])]
        for count in ("calls", "allocations", "operators"):
            values += [found[name][count] for name in ("cuda", "triton")]
        assert_rounded([cell for cell in cells if cell != "-"], values)


@pytest.mark.parametrize(
    "head, file, kinds",
    [
        (
            "| mean cosine | epsilon | cpu | cpu, split products | reference in float32 | authors |",
            "cpu_accuracy.json",
            ["cpu", "cpu-split", "eager", "authors"],
        ),
        (
            "| mean cosine | epsilon | slab engine, 16 bit | flash engine, 16 bit | reference in float32 |",
            "interpreted_accuracy.json",
            ["triton-int16", "triton-flash-int16", "eager"],
        ),
    ],
    ids=["float32", "16-bit"],
)
def test_accuracy(head, file, kinds):
    rows = table("docs/benchmarks.md", head)
    assert len(rows) >= 8
    for cosine, epsilon, *cells in rows:
        found = {row["kind"]: row for row in results(file, cosine=float(cosine), epsilon=float(epsilon))}
        for kind, cell in zip(kinds, cells, strict=True):
            errors = [found[kind]["error_P"], found[kind]["error_gradient"]]
            if cell == "NaN, NaN":
                assert errors == [None, None]
            else:
                assert_rounded([cell], errors)


H200 = "h200-2026-11-27"
RESULTS_OF_H200 = f"benchmarks/results/{H200}/README.md"


def problems_of_a_gpu() -> dict[tuple, dict[str, dict]]:
    """Steps measured on the H200: by (part, M, N, D), and of each problem by kind."""
    problems: dict[tuple, dict[str, dict]] = {}
    for row in results(f"{H200}/loss.json"):
        problems.setdefault((row["part"], row["M"], row["N"], row["D"]), {})[row["kind"]] = row
    return problems


def gpu_table(page: str, head: str) -> list[tuple[list[str], dict[str, dict]]]:
    """Cells behind the first one of each row of a table of steps, and what was measured of that problem, by kind."""
    rows = table(page, head)
    assert len(rows) == len({first for first, *_ in rows})
    keys = [("whole, teacher" if row[0].endswith("teacher") else "whole", *map(int, numbers(row[0]))) for row in rows]
    return [(row[1:], problems_of_a_gpu()[key]) for row, key in zip(rows, keys, strict=True)]


def error(row: dict, what: str) -> str:
    return f"{row[what]:.1e}".replace("e-0", "e-")


OTHERS_ON_A_GPU = ("compile-autocast", "authors-autocast")


def test_speed_of_a_gpu():
    """Before a slash medians of CUDA graphs, behind it wall times of eager calls."""
    rows = gpu_table("docs/gpu.md", "| M x N x D | cuda | triton | compile | authors | three products alone |")
    assert len(rows) == len(problems_of_a_gpu())
    for (*cells, products), measured in rows:
        assert_rounded([products], [measured["gemms-half"]["median_ms"]])
        for cell, kind in zip(cells, ("cuda-int16", "triton-int16", *OTHERS_ON_A_GPU), strict=True):
            graph = [measured[f"{kind}-graph"]["median_ms"]] if f"{kind}-graph" in measured else []
            assert_rounded([cell], [*graph, measured[kind]["wall_ms"]] if kind in measured else [])
            assert graph or cell == "-" or cell.startswith("- / ")


def test_steps_of_a_gpu_beside_other_code():
    """Medians of CUDA graphs, of the authors' code of eager calls; how many times as long they take; and errors."""
    head = "| M x N x D | cuda | triton | compile | authors | three products alone | "
    rows = gpu_table(RESULTS_OF_H200, f"{head}compile | authors | error: cuda | compile |")
    assert len(rows) == sum("cuda-int16-graph" in measured for measured in problems_of_a_gpu().values())
    for cells, measured in rows:
        kinds = ("cuda-int16-graph", "triton-int16-graph", "compile-autocast-graph", "authors-autocast", "gemms-half")
        us = [1e3 * measured[kind]["median_ms"] for kind in kinds]
        assert_rounded(cells[:7], [*us, us[2] / us[0], us[3] / us[0]])
        assert cells[7:] == [error(measured[kind], "error_gradient") for kind in (kinds[0], kinds[2])]


@pytest.mark.parametrize(
    "page, head, kinds",
    [
        (
            "docs/gpu.md",
            "| M x N x D | cuda | flash engine | compile | authors |",
            ["cuda-int16", "triton-flash-int16", *OTHERS_ON_A_GPU],
        ),
        (
            RESULTS_OF_H200,
            "| M x N x D | cuda | cuda, small budget | flash | compile | authors |",
            ["cuda-int16", "cuda-int16-again", "triton-flash-int16", *OTHERS_ON_A_GPU],
        ),
    ],
    ids=["docs", "results"],
)
def test_peaks_of_a_gpu(page, head, kinds):
    rows = gpu_table(page, head)
    assert len(rows) == 5
    for cells, measured in rows:
        for cell, kind in zip(cells, kinds, strict=True):
            assert_rounded([cell], [measured[kind]["peak_bytes"] / MB] if kind in measured else [])


@pytest.mark.parametrize(
    "part, head, kinds",
    [
        (
            "sinkhorn",
            "| from scores | us | error of P |",
            {
                "cuda, int16 scores, graph": "cuda-int16-graph",
                "cuda, float32 scores, graph": "cuda-graph",
                "triton, int16 scores, graph": "triton-int16-graph",
                "triton, float32 scores, graph": "triton-graph",
                "`torch.compile`, graph": "compile-graph",
                "authors' code, which makes P of all rows, called eagerly": "authors",
            },
        ),
        (
            "potentials",
            "| from embeddings | us | error of P |",
            {
                "cuda, graph": "cuda-graph",
                "triton, graph": "triton-graph",
                "`torch.compile`, graph": "compile-graph",
                "flash-sinkhorn 0.4.1, float32, graph": "flash-sinkhorn-graph",
                "flash-sinkhorn 0.4.1, TF32, graph": "flash-sinkhorn-tf32-graph",
            },
        ),
    ],
    ids=["scores", "embeddings"],
)
def test_sinkhorn_of_a_gpu(part, head, kinds):
    measured = {row["kind"]: row for row in results(f"{H200}/sinkhorn.json", part=part)}
    rows = table(RESULTS_OF_H200, head)
    assert [first for first, *_ in rows] == list(kinds)
    for (_, time, said), kind in zip(rows, kinds.values(), strict=True):
        assert_rounded([time], [1e3 * measured[kind]["median_ms"]])
        assert said == error(measured[kind], "error_P")


def test_memory_of_the_gradient_cache():
    head = "| images | micro-batches | peak MB | of which the loss alone | embeddings | the rest |"
    rows = table("docs/ranks.md", head)
    assert len(rows) == 3
    for images, *cells in rows:
        (row,) = results("cpu_virtual_batch.json", images=int(images))
        parts = ("peak_bytes", "peak_of_loss_bytes", "embeddings_bytes", "beyond_bytes")
        assert_rounded(cells, [row["micro_batches"], *(row[part] / MB for part in parts)])


def steps(file: str, how: str, what: str = "value") -> dict[tuple[str, bool], float]:
    """Microseconds, or another number, of steps with the CUDA kernels, by shape and whether there is a teacher."""
    lines = (ROOT / "benchmarks" / "results" / H200 / file).read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if (row["name"], row["how"]) == ("loss and gradient", how)]
    return {(row["shape"], row["teacher"]): row[what] for row in rows}


def test_steps_before_and_after_tuning():
    head = "| M x N x D | before | after | times faster |"
    rows = table(RESULTS_OF_H200, head)
    before, after = steps("before.jsonl", "graph"), steps("after.jsonl", "graph")
    assert len(rows) == len(before) == len(after)
    for first, *cells in rows:
        step = "x".join(numbers(first)), first.endswith("teacher")
        assert_rounded(cells, [before[step], after[step], before[step] / after[step]])


def test_walls_and_peaks_of_eager_steps():
    rows = table(
        RESULTS_OF_H200,
        "| M x N x D | before | b94970c | fe24b84 | after | peak before | peak after |",
    )
    walls = [steps(f"{name}.jsonl", "wall") for name in ("before", "b94970c", "fe24b84", "after")]
    peaks = [steps(f"{name}.jsonl", "wall", "peak_mb") for name in ("before", "after")]
    assert len(rows) == len(walls[0])
    for first, *cells in rows:
        step = "x".join(numbers(first)), first.endswith("teacher")
        assert_rounded(cells, [of[step] for of in (*walls, *peaks)])


def test_forecast():
    head = "| ranks | keys N | products ms | passes ms | keys sent ms | column sums ms | step ms | memory GB |"
    rows = table("docs/ranks.md", head)
    assert len(rows) == 7
    for W, *cells in rows:
        (row,) = results("cpu_scale.json", W=int(W), D=4096)
        products = sum(row[f"{name}_products_ms"] for name in ("target", "source", "gradient"))
        times = [row[name] for name in ("passes_ms", "gather_ms", "column_sums_ms", "forecast_ms")]
        assert_rounded(cells, [row["N"], products, *times, row["forecast_bytes"] / GB])
