"""Packages that pyproject.toml names are those that the library and the driver import."""

import re
import sys
import tomllib

from imports import ROOT, imported_names

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"scikit-learn": "sklearn", "pyyaml": "yaml", "pillow": "PIL", "docstring-parser": "docstring_parser"}
OURS = {"bam_kernels", "driver"}


def imported(folder: str) -> set[str]:
    """Names of third-party packages that some file of a folder imports, in a function or at module level."""
    names = {name for path in (ROOT / folder).rglob("*.py") for name in imported_names(path)}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OURS


def named(requirements: list[str]) -> set[str]:
    """Import names of requirements such as `torch>=2.11`; an extra that names other extras of ours adds nothing."""
    packages = {re.match(r"[\w.-]+", requirement).group().lower() for requirement in requirements}
    return {IMPORT_NAMES.get(package, package) for package in packages} - OURS


BASE = named(PROJECT["dependencies"])
EXTRAS = {extra: named(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}


def test_library_needs_few_packages():
    assert imported("bam_kernels") == {"torch", "numpy", "triton", "nvtx"}


def test_every_import_is_a_named_requirement():
    found = imported("bam_kernels") | imported("driver")
    assert {"torch", "yaml", "kornia", "wandb", "onnxscript"} <= found
    missing = found - BASE - EXTRAS["driver"] - EXTRAS["wandb"] - EXTRAS["onnx"]
    assert not missing, f"pyproject.toml does not name {sorted(missing)}"


def test_every_requirement_is_imported():
    """Named requirements are imported; tensorboard is imported by torch.utils.tensorboard."""
    found = imported("bam_kernels") | imported("driver")
    assert BASE - found == set()
    assert EXTRAS["driver"] - found == {"tensorboard"}
    assert not BASE & EXTRAS["driver"]
