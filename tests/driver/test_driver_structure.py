"""Structure of the driver and the library: imports without circles, layers, few files at the top."""

from graphlib import TopologicalSorter

import pytest
from imports import ROOT, imported_names, module_name

DOORS = {f"driver.{name}" for name in "pretrain knn linear segment_video export report verify_resume".split()}


PATHS = {module_name(path): path for top in ("driver", "bam_kernels") for path in (ROOT / top).rglob("*.py")}


def imports(module: str) -> set[str]:
    """Modules of the driver and the library that a module imports; `from package import name` may be either."""
    names = set(imported_names(PATHS[module]))
    return {name if name in PATHS else name.rpartition(".")[0] for name in names} & PATHS.keys()


GRAPH = {module: imports(module) for module in PATHS}


def importers_of(*prefixes: str) -> set[str]:
    """Modules that import a module whose name is a prefix, or is within it."""
    return {m for m, found in GRAPH.items() if any(f"{name}.".startswith(f"{p}.") for name in found for p in prefixes)}


def test_the_graph_is_seen():
    """An empty graph would pass every test below."""
    assert {"driver.cli", "driver.train"} <= GRAPH["driver.pretrain"]
    assert {"driver.checkpoint", "driver.data", "driver.data.images", "bam_kernels"} <= GRAPH["driver.train"]


def test_imports_have_no_circle():
    tuple(TopologicalSorter(GRAPH).static_order())


def test_only_doors_import_doors_and_the_loop():
    assert importers_of(*DOORS, "driver.train") <= DOORS


@pytest.mark.parametrize(
    "package, forbidden",
    [
        ("bam_kernels", ["driver"]),
        ("driver.data", ["driver.evaluation", "driver.reporting"]),
        ("driver.evaluation", ["driver.reporting"]),
    ],
)
def test_layers(package, forbidden):
    assert not {m for m in importers_of(*forbidden) if f"{m}.".startswith(f"{package}.")}


def test_few_files_at_the_top_of_the_driver():
    assert len(list((ROOT / "driver").glob("*.py"))) <= 24
