"""What a verdict is about: equal in every process of this software, and another after a change of any part."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bam_kernels.verification import identity as module
from bam_kernels.verification import verified
from bam_kernels.verification.identity import identity, python_hash, software, triton_version

BUILT = "8.0+PTX 9.0a 10.0a"  # by default
HERE = {
    "gpu": "NVIDIA H100",
    "capability": "9.0",
    "multiprocessors": "132",
    "driver": "580.1 (13000)",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "library": "0.1",
    "sources": "aaaa",
    "extension": f"bbbb nvcc 13.0 for {BUILT}",
    "python": "cpython-312",
}


@pytest.mark.parametrize(
    ("capability", "architectures", "code"),
    [
        ("8.0", BUILT, "8.0"),
        ("8.6", BUILT, "8.0"),
        ("8.9", BUILT, "8.0"),
        ("9.0", BUILT, "9.0a"),
        ("10.0", BUILT, "10.0a"),
        ("10.3", BUILT, "8.0+PTX"),
        ("12.0", BUILT, "8.0+PTX"),
        ("7.5", BUILT, ""),
        ("9.0", "8.0+PTX", "8.0+PTX"),
        ("9.0", "9.0 9.0a", "9.0a"),
        ("9.0", "", ""),
        ("8.6", "8.6 8.0", "8.6"),
        ("8.9", "8.0 8.6", "8.6"),
        ("8.0", "8.6+PTX", ""),
        # Neither code nor PTX with "a" runs on another architecture; with "f" it does on the same major version.
        ("10.0", "9.0a+PTX", ""),
        ("12.1", "12.0a+PTX 8.0+PTX", "8.0+PTX"),
        ("10.3", "10.0f", "10.0f"),
        ("12.0", "10.0f+PTX", ""),
        ("10.0", "8.0+PTX 9.0+PTX", "9.0+PTX"),
    ],
)
def test_the_code_that_a_gpu_runs(capability, architectures, code):
    assert verified.code_for(capability, architectures.split()) == code


def test_the_entries_of_a_gpu():
    common = {"capability": "9.0", "torch": "2.11"}
    triton = {**common, "code": "9.0", "compiler": "triton 3.6", "sources": "aaaa"}
    assert verified.entry("triton", HERE) == {**triton, "way": "triton"}
    assert verified.entry("flash", HERE) == {**triton, "way": "flash"}
    cuda = {**common, "way": "cuda", "code": "9.0a", "compiler": "nvcc 13.0", "sources": "aaaa bbbb"}
    assert verified.entry("cuda", HERE) == cuda


@pytest.mark.parametrize(
    ("way", "changed"),
    [
        ("cuda", {"extension": ""}),
        ("cuda", {"capability": "7.5"}),
        ("cuda", {"capability": "gfx942:sramecc+:xnack-"}),
        ("triton", {"triton": ""}),
    ],
)
def test_a_way_that_cannot_run_has_no_entry(way, changed):
    assert verified.entry(way, HERE | changed) is None


def test_the_switches_of_an_amd_gpu_do_not_matter():
    entry = verified.entry("triton", HERE | {"capability": "gfx942:sramecc+:xnack-"})
    assert entry["capability"] == entry["code"] == "gfx942"


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ({"driver": "1", "gpu": "other", "torch": "2.11.3", "triton": "3.6.1"}, ("cuda", "triton")),
        ({"sources": "cccc"}, ()),
        ({"extension": f"cccc nvcc 13.0 for {BUILT}"}, ("triton",)),
        ({"extension": f"bbbb nvcc 12.9 for {BUILT}"}, ("triton",)),
        ({"extension": "bbbb nvcc 13.0 for 8.0+PTX"}, ("triton",)),
        ({"triton": "3.7.0"}, ("cuda",)),
        ({"torch": "2.12.0"}, ()),
        ({"capability": "9.1"}, ()),
    ],
    ids=str,
)
def test_entries_hold_for_the_same_code_and_sources_alone(changed, left, monkeypatch):
    entries = [verified.entry(way, HERE) for way in ("cuda", "triton")]
    monkeypatch.setattr(verified, "entries", lambda: entries)
    assert verified.ways(HERE) == ("cuda", "triton")
    assert verified.ways(HERE | changed) == left


@pytest.mark.parametrize("file", ["backends/triton/row.py", "engine/slab.py", "layout.py", "precision.py"])
def test_a_changed_source_changes_the_hash(file, tmp_path, monkeypatch):
    for source in module.SOURCES:
        for original in [*(module.PACKAGE / source).rglob("*.py")] or [module.PACKAGE / source]:
            copy = tmp_path / original.relative_to(module.PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(original.read_bytes())
    before = python_hash()
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    assert python_hash.__wrapped__() == before
    (tmp_path / file).write_text((tmp_path / file).read_text() + "\n")
    assert python_hash.__wrapped__() != before


def test_a_new_process_sees_the_same_software():
    """Whether it has imported Triton or not, and though sources may change once they are imported."""
    program = """import json, sys
from bam_kernels.verification import identity
identity.PACKAGE = None
found = identity.software()
assert "triton" not in sys.modules
print(json.dumps(found))"""
    root = str(module.PACKAGE.parent)
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == software()


def test_the_version_of_triton_is_that_of_its_module(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.delitem(sys.modules, "triton")
    assert triton_version.__wrapped__() == triton.__version__


def test_no_triton_has_no_version(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert triton_version.__wrapped__() == ""


def test_an_imported_triton_counts_whatever_is_installed_meanwhile(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="1.2.3"))
    assert triton_version.__wrapped__() == "1.2.3"


def test_a_program_in_one_file_has_no_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "program" / "bam_kernels")
    assert len(python_hash.__wrapped__()) == 16


def test_a_device_adds_its_own(monkeypatch):
    part = SimpleNamespace(name="NVIDIA H100 MIG 1g.10gb", major=9, minor=0, multi_processor_count=16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: part)
    found = identity(0)
    assert found == {"gpu": part.name, "capability": "9.0", "multiprocessors": "16", **software()}
    assert set(found) == set(HERE)
    assert all(isinstance(value, str) for value in found.values())


def test_the_driver_is_the_first_line_of_the_kernel_module_and_its_version_of_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_cuda_of_driver", lambda: 13000)
    version = tmp_path / "version"
    version.write_text("NVRM version: 580.1\nGCC version: 1\n")
    monkeypatch.setattr(module, "DRIVERS", (Path(tmp_path / "missing"), version))
    assert module._driver() == "NVRM version: 580.1; CUDA 13000"
    version.write_text("")
    assert module._driver() == "CUDA 13000"


def test_torch_for_another_cuda_is_another_torch(monkeypatch):
    """A conda build's version does not name it."""
    found = []
    for cuda in ("12.9", "13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        found.append(module.software.__wrapped__()["torch"])
    assert found == [f"{torch.__version__} for CUDA 12.9", f"{torch.__version__} for CUDA 13.0"]
    assert verified.entry("triton", HERE | {"torch": found[0]})["torch"] == ".".join(torch.__version__.split(".")[:2])


def test_the_version_of_cuda_comes_from_the_driver_if_there_is_one(tmp_path, monkeypatch):
    class Driver:
        @staticmethod
        def cuDriverGetVersion(version) -> int:
            version._obj.value = 12080
            return 0

    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: Driver)
    assert module._cuda_of_driver() == 12080
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: object())
    assert module._cuda_of_driver() == 0
