"""setup.py in a copy of the sources: what it says when it fails, and the library without an extension."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("setuptools", "ninja", "pybind11"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sources(tmp_path) -> Path:
    copy = tmp_path / "sources"
    for folder in ("bam_kernels", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=sources,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_a_failed_compile_names_the_command_and_the_way_without(sources):
    (sources / "csrc" / "cpu" / "rows.cpp").write_text("this is no C++\n")
    result = build(sources, BAM_KERNELS_BUILD="cpu", MAX_JOBS="2")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "FAILED" in output and "rows.cpp -o rows." in output
    assert "BAM_KERNELS_BUILD=none pip install -e ." in output


def test_a_missing_compiler_is_named_with_the_way_without(sources):
    result = build(sources, BAM_KERNELS_BUILD="cpu", CXX="/missing/g++")
    assert result.returncode != 0
    assert "/missing/g++" in result.stdout + result.stderr
    assert "BAM_KERNELS_BUILD=none pip install -e ." in result.stdout + result.stderr


def test_an_unknown_mode_is_an_error(sources):
    result = build(sources, BAM_KERNELS_BUILD="gpu")
    assert result.returncode != 0 and "auto, cpu, cuda or none, got 'gpu'" in result.stderr


def test_without_the_extension_the_reference_works_and_says_so(sources):
    assert build(sources, BAM_KERNELS_BUILD="none").returncode == 0
    # An editable install of the library would lend its own extension to this copy.
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch, warnings
from bam_kernels import bam_loss
z = torch.randn(2, 6, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert torch.equal(bam_loss(z), bam_loss(z, backend="reference"))
assert len(caught) == 1 and "not built" in str(caught[0].message), caught
try:
    bam_loss(z, backend="cpu")
except ValueError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=sources,
        env=os.environ | {"PYTHONPATH": str(sources)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'backend="cpu" cannot run here: the extension is not built' in result.stdout
    assert "pip install -e ." in result.stdout


# Stands for g++ and nvcc: makes the file after -o, and notes that.
COMPILER = """#!/bin/sh
for argument; do
  if [ "$before" = -o ]; then echo made > "$argument"; echo "$argument" >> MADE; fi
  before=$argument
done
"""


@pytest.fixture
def compilers(tmp_path) -> dict[str, str]:
    """The environment in which compilers only seem to compile; what they make is noted in tmp_path / "made"."""
    for path in (tmp_path / "bin" / "nvcc", tmp_path / "bin" / "g++"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMPILER.replace("MADE", str(tmp_path / "made")))
        path.chmod(0o755)
    return {"CUDA_HOME": str(tmp_path), "CXX": str(tmp_path / "bin" / "g++"), "TORCH_CUDA_ARCH_LIST": "9.0a"}


@pytest.mark.parametrize(("name", "value"), [("BOUNDED_WAITS", "1"), ("DEFINES", "BAM_STAGES=6")])
@pytest.mark.parametrize("mode", ["cpu", "none", "auto"])
def test_options_of_cuda_kernels_are_errors_without_these(mode, name, value, sources, compilers):
    """auto: nvcc is not found."""
    setup = sources / "setup.py"
    setup.write_text(setup.read_text().replace("/usr/local/cuda/bin/nvcc", "/missing/nvcc"))
    hidden = {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": "/missing"}
    environment = compilers | hidden | {"BAM_KERNELS_BUILD": mode, f"BAM_KERNELS_{name}": value}
    result = build(sources, **environment)
    why = "no nvcc in CUDA_HOME" if mode == "auto" else f"BAM_KERNELS_BUILD={mode}"
    assert result.returncode != 0
    assert f"BAM_KERNELS_{name} is for CUDA kernels, and this build has none: {why}" in result.stderr


def test_a_build_with_bounded_waits_has_objects_of_its_own(sources, compilers):
    assert build(sources, **compilers).returncode == 0
    assert build(sources, BAM_KERNELS_BOUNDED_WAITS="1", **compilers).returncode == 0
    plain, bounded = sorted((sources / "build").glob("*/build.ninja"))
    assert bounded.parent.name == f"{plain.parent.name}-bounded"
    assert "BAM_BOUNDED_WAITS" not in plain.read_text()
    flags = [line for line in bounded.read_text().splitlines() if "BAM_BOUNDED_WAITS" in line]
    assert {line.split()[0] for line in flags} == {"nvflags", "more"}  # the kernels, and bindings that say so
    result = build(sources, BAM_KERNELS_BOUNDED_WAITS="yes")
    assert result.returncode != 0 and "must be 0 or 1, got 'yes'" in result.stderr


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="AMX needs Linux on x86-64")
@pytest.mark.parametrize("refused", [None, "-mamx-bf16"])
def test_split_products_are_built_where_the_compiler_knows_their_instructions(refused, sources, compilers, tmp_path):
    if refused:
        compiler = Path(compilers["CXX"])
        refusal = f'case "$*" in *{refused}*) exit 1;; esac\n'
        compiler.write_text(compiler.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{refusal}"))
    result = build(sources, BAM_KERNELS_BUILD="cpu", **compilers)
    assert result.returncode == 0, result.stderr
    made = (tmp_path / "made").read_text().splitlines()
    (ninja,) = (sources / "build").glob("*/build.ninja")
    assert ("product.amx.o" in made) == ("BAM_WITH_AMX" in ninja.read_text()) == (refused is None)
    assert "match.avx512.o" in made


def test_builds_for_a_gpu_machine_neither_touch_the_package_nor_compile_twice(sources, compilers, tmp_path):
    script = sources / "benchmarks" / "gpu" / "build.py"
    shutil.copytree(ROOT / "benchmarks" / "gpu", script.parent)
    out = tmp_path / "out"

    def run(*arguments: str) -> str:
        command = [sys.executable, str(script), "--out", str(out), *arguments]
        exported = {"BAM_KERNELS_DEFINES": "BAM_STAGES=6"}  # by a user who has tried it with setup.py
        environment = os.environ | compilers | exported
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    printed = run()
    made = (tmp_path / "made").read_text().splitlines()
    for variant, architecture, bounded in (("sm_90a", "9.0a", 0), ("sm_80", "8.0+PTX", 0), ("bounded", "9.0a", 1)):
        (extension,) = (out / variant).glob("_C.*.so")
        assert str(extension) in printed and extension.read_text() == "made\n"
        ninja = (tmp_path / "out-objects" / variant / "build.ninja").read_text()
        assert f"BAM_CUDA_ARCHITECTURES='\"{architecture}\"'" in ninja
        assert ("BAM_BOUNDED_WAITS" in ninja) == bounded and "BAM_STAGES" not in ninja
    assert not list(sources.glob("bam_kernels/*.so")) and not (sources / "build").exists()
    (sources / "csrc" / "cuda" / "stats.cu").touch()
    assert run("--variants", "sm_80", "bounded").count(" MB ") == 2
    again = (tmp_path / "made").read_text().splitlines()[len(made) :]
    again = [file for file in again if file != os.devnull]  # trials of the compiler
    assert again.count("stats.cuda.o") == 2 and len(again) == 4  # two objects and two links


def test_constants_to_try_reach_the_kernels_and_the_bindings(sources, compilers, tmp_path):
    shutil.copytree(ROOT / "benchmarks" / "gpu", sources / "benchmarks" / "gpu")
    command = [sys.executable, str(sources / "benchmarks" / "gpu" / "build.py"), "--out", str(tmp_path / "out")]
    command += ["--variants", "octets4"]
    result = subprocess.run(command, env=os.environ | compilers, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ninja = (tmp_path / "out-objects" / "octets4" / "build.ninja").read_text().splitlines()
    wanted = " -DBAM_OCTETS=4 -DBAM_THREADS=256 -DBAM_REGISTER_THREADS=256"
    assert {line.split()[0] for line in ninja if wanted in line} == {"nvflags", "more"}
    result = build(sources, BAM_KERNELS_DEFINES="BAM_STAGES=6 BAM_THREADS", **compilers)
    assert result.returncode != 0 and "must be BAM_NAME=NUMBER and more of them, got 'BAM_THREADS'" in result.stderr
    result = build(sources, BAM_KERNELS_DEFINES="BAM_STAGES=6 BAM_THREAD=256", **compilers)
    known = "BAM_OCTETS, BAM_THREADS, BAM_REGISTER_THREADS, BAM_GROUPS, BAM_STAGES"
    assert result.returncode != 0 and f"may set {known}, got 'BAM_THREAD=256'" in result.stderr
