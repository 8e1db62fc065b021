"""Every tensor that the library makes has a dtype and a device that the source names: none follows torch's defaults."""

import ast
from pathlib import Path

import pytest
import torch

import bam_kernels

SOURCES = sorted(Path(bam_kernels.__file__).parent.rglob("*.py"))
# Functions of torch that make a tensor from numbers or sizes; frombuffer's are on the CPU always.
FACTORIES = {"arange", "asarray", "as_tensor", "empty", "empty_permuted", "empty_strided", "eye", "frombuffer", "full"}
FACTORIES |= {
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "scalar_tensor",
}
FACTORIES |= {"sparse_coo_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}
FACTORIES |= {name for name in dir(torch) if name.endswith("_window")}
# The legacy constructors, whose dtype or device cannot be named, and what reads a default or sets it.
REFUSED = {"get_default_device", "get_default_dtype", "set_default_device", "set_default_dtype"}
REFUSED |= {"set_default_tensor_type", "Tensor"} | {name for name in dir(torch) if name.endswith("Tensor")}


def of_torch(node: ast.expr) -> str | None:
    """The name of a function of torch that is called, or handed on."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr
    return None


def followers(source: str) -> list[str]:
    """Line and text of what follows a default in a module."""
    tree = ast.parse(source)
    named = set()
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        callee, given = node.func, node.keywords
        # functools.partial(torch.randn, dtype=..., device=...) names them for all its calls.
        if isinstance(callee, ast.Name) and callee.id == "partial" and node.args:
            callee = node.args[0]
        name = of_torch(callee)
        if name in FACTORIES:
            named.add(callee)
            missing = (
                {"dtype", "device"} - {word.arg for word in given} - ({"device"} if name == "frombuffer" else set())
            )
            found += [f"{node.lineno}: torch.{name} without {word}" for word in sorted(missing)]
        elif name in REFUSED:
            found.append(f"{node.lineno}: torch.{name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and of_torch(node) in FACTORIES and node not in named:
            found.append(f"{node.lineno}: torch.{of_torch(node)} handed on, its dtype and device unknown")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_every_factory_names_dtype_and_device(path):
    source = path.read_text()
    assert not followers(source)
    assert "from torch import" not in source or not FACTORIES & imported(source)


def imported(source: str) -> set[str]:
    """What a module takes from torch by name, which `followers` would not see."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in statements if node.module == "torch" for alias in node.names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_addresses_are_taken_in_one_place(path):
    """Where dtype and device are checked."""
    assert path.name == "addresses.py" or "data_ptr" not in path.read_text()


@pytest.mark.parametrize(
    "source,words",
    [
        ("torch.empty(3)", ["without device", "without dtype"]),
        ("torch.zeros(3, dtype=torch.float32)", ["without device"]),
        ("torch.tensor(1.5, device=x.device)", ["without dtype"]),
        ("torch.randn(3, generator=g)", ["without device", "without dtype"]),
        ("make = torch.ones if a else torch.zeros", ["torch.ones handed on", "torch.zeros handed on"]),
        ("partial(torch.randn, dtype=d)", ["without device"]),
        ("torch.frombuffer(b)", ["without dtype"]),
        ("torch.FloatTensor(3)", ["torch.FloatTensor"]),
        ("torch.set_default_dtype(d)", ["set_default_dtype"]),
        ("torch.empty(3, dtype=d, device=e)", []),
        ("x.new_empty(3), torch.empty_like(x), torch.frombuffer(b, dtype=d)", []),
    ],
)
def test_what_counts_as_a_factory(source, words):
    found = followers(source)
    assert len(found) == len(words)
    for text, word in zip(found, words, strict=True):
        assert word in text
