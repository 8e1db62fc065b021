"""Builds the extension bam_kernels._C: C++ kernels for the CPU and, where nvcc is found, CUDA kernels.

The extension neither includes nor links torch, so a bare isolated environment builds it and it works with any
torch. One ninja file runs all compilers in parallel and recompiles only what changed.

    BAM_KERNELS_BUILD     auto (default: CUDA when nvcc is found), cpu, cuda, or none (no extension: the reference
                          and the Triton kernels still work)
    TORCH_CUDA_ARCH_LIST  CUDA architectures in torch's notation; default: those of 8.0+PTX, 9.0a, 10.0a that nvcc knows
    CUDA_HOME             CUDA toolkit that has nvcc
    CXX                   C++ compiler
    MAX_JOBS              largest number of compilers at work at once; default: one per core
    BAM_KERNELS_BOUNDED_WAITS
                          1, for finding hangs: a CUDA kernel that waits in vain for a second says where and ends with
                          an error. Kernels are slower; their objects have a build folder of their own
    BAM_KERNELS_DEFINES   constants of csrc/cuda/cuda.h to set, e.g. "BAM_THREADS=256 BAM_STAGES=6"

BAM_KERNELS_BOUNDED_WAITS and BAM_KERNELS_DEFINES are errors in a build without CUDA kernels.
Objects are kept in build/, or where `build_ext --build-temp` says; `--build-lib` says where the extension goes.

At run time, BAM_KERNELS_EXTENSION=FILE loads FILE instead of the extension in the package; if that fails, it is an
ImportError. benchmarks/gpu/build.py builds several such files.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU_KERNELS = ("column_lse", "sinkhorn_pass", "match", "plan", "rows", "symmetrize", "table")
CUDA_FILES = (
    "match",  # the longest to compile is first
    "match_long",
    "sinkhorn_on_chip",
    "sinkhorn_pass",
    "column_lse",
    "plan",
    "embed",
    "keys",
    "scores",
    "stats",
    "table",
    "device",
)
X86_ISAS = {
    "plain": (4, ""),
    "avx2": (8, "-mavx2 -mfma"),
    "avx512": (16, "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mprefer-vector-width=512"),
}
AMX = X86_ISAS["avx512"][1] + " -mavx512bf16 -mamx-tile -mamx-bf16"  # flags of gcc 11, clang 12 and later
NO_FALSE_ALARMS = "-Wno-maybe-uninitialized -Wno-uninitialized"  # of gcc 12's headers of AVX-512
SOURCE_SUFFIXES = (".h", ".cpp", ".cuh", ".cu")
NO_NVCC = "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"
WITHOUT_EXTENSION = "To install without the extension: BAM_KERNELS_BUILD=none pip install -e ."


def build_mode() -> str:
    mode = os.environ.get("BAM_KERNELS_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"BAM_KERNELS_BUILD must be auto, cpu, cuda or none, got {mode!r}")
    return mode


def bounded_waits() -> bool:
    asked = os.environ.get("BAM_KERNELS_BOUNDED_WAITS", "0")
    if asked not in ("0", "1"):
        sys.exit(f"BAM_KERNELS_BOUNDED_WAITS must be 0 or 1, got {asked!r}")
    return asked == "1"


def defines() -> str:
    """Compiler flags that set the constants in BAM_KERNELS_DEFINES."""
    asked = os.environ.get("BAM_KERNELS_DEFINES", "").split()
    known = constants_to_try() if asked else []
    for one in asked:
        if not re.fullmatch(r"BAM_[A-Z_]+=[0-9]+", one):
            sys.exit(f"BAM_KERNELS_DEFINES must be BAM_NAME=NUMBER and more of them, got {one!r}")
        if one.partition("=")[0] not in known:
            sys.exit(f"BAM_KERNELS_DEFINES may set {', '.join(known)}, got {one!r}")
    return "".join(f" -D{one}" for one in asked)


def constants_to_try() -> list[str]:
    """Names of the constants in csrc/cuda/cuda.h that BAM_KERNELS_DEFINES may set."""
    return re.findall(r"^#ifndef (BAM_\w+)$", (ROOT / "csrc" / "cuda" / "cuda.h").read_text(), re.MULTILINE)


def refuse_cuda_options(why: str) -> None:
    """Exit with an error if an option of CUDA kernels is set. `why` says why this build has no such kernels."""
    for name, asked in (("BAM_KERNELS_BOUNDED_WAITS", bounded_waits()), ("BAM_KERNELS_DEFINES", defines())):
        if asked:
            sys.exit(f"{name} is for CUDA kernels, and this build has none: {why}")


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((nvcc for nvcc in candidates if nvcc.exists()), None)


def nvcc_home(nvcc: Path) -> Path:
    """Root folder of the CUDA toolkit, as nvcc prints it: the file `nvcc` may be a wrapper outside the toolkit."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in dry_run.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return nvcc.resolve().parent.parent


def cuda_architectures(nvcc: Path) -> list[str]:
    """CUDA architectures to compile for, in torch's notation, e.g. 8.0+PTX or 9.0a."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return asked.replace(";", " ").split()
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    default = {"8.0+PTX": "compute_80", "9.0a": "compute_90", "10.0a": "compute_100"}
    return [name for name, arch in default.items() if arch in listed]


def nvcc_version(nvcc: Path) -> str:
    """Version of nvcc, e.g. 13.0; "unknown" if it does not print one."""
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", printed)
    return found[1] if found else "unknown"


def sources_hash(constants: str) -> str:
    """Hash of the texts in csrc/ and of `constants`, flags that change the code. Equal on every machine."""
    digest = hashlib.sha256(constants.encode())
    for file in sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in SOURCE_SUFFIXES):
        text = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def gencode(architecture: str) -> list[str]:
    number = architecture.removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if architecture.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaBuild(build_ext):
    """Build step that writes build.ninja, runs it, and says what to do if a command fails."""

    def finalize_options(self) -> None:
        self.asked_temp = self.build_temp  # None without --build-temp
        super().finalize_options()

    def build_dir(self) -> Path:
        if self.asked_temp:
            return Path(self.asked_temp).resolve()
        variant = "-bounded" if bounded_waits() else ""
        return ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}{variant}"

    def build_extension(self, ext: Extension) -> None:
        import ninja

        nvcc = None if build_mode() == "cpu" else find_nvcc()
        if build_mode() == "cuda" and nvcc is None:
            sys.exit(f"BAM_KERNELS_BUILD=cuda, but {NO_NVCC}. {WITHOUT_EXTENSION}")
        if nvcc is None:
            refuse_cuda_options("BAM_KERNELS_BUILD=cpu" if build_mode() == "cpu" else NO_NVCC)
        build_dir = self.build_dir()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        module = build_dir / target.name
        self.write_ninja(build_dir / "build.ninja", module, nvcc)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode:
            sys.exit(
                "\nbam_kernels: the command printed after FAILED above did not compile or link the extension.\n"
                f"To leave CUDA out: BAM_KERNELS_BUILD=cpu pip install -e .\n{WITHOUT_EXTENSION}"
            )
        shutil.copyfile(module, target)

    def write_ninja(self, path: Path, module: Path, nvcc: Path | None) -> None:
        from ninja.ninja_syntax import Writer

        source = ROOT / "csrc"
        with path.open("w") as file:
            w = Writer(file, width=100000)
            w.variable("cxx", self.cxx())
            w.variable("flags", "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra")
            w.rule("cpp", "$cxx -MMD -MF $out.d $flags $more -c $in -o $out", depfile="$out.d", deps="gcc")
            with_amx = self.knows_amx()
            more = self.openmp_flags() + (" -DBAM_WITH_AMX" if with_amx else "")
            objects = [self.cpu_object(w, source / "cpu" / "dispatch.cpp", "dispatch", more)]
            if with_amx:
                more = f"{self.openmp_flags()} {AMX} -DBAM_ISA=amx -DBAM_LANES=16 {NO_FALSE_ALARMS}"
                objects.append(self.cpu_object(w, source / "cpu" / "product.cpp", "product.amx", more))
            for isa, (lanes, machine) in self.isas().items():
                more = f"{self.openmp_flags()} {machine} -DBAM_ISA={isa} -DBAM_LANES={lanes}"
                if isa == "avx512":
                    more += f" {NO_FALSE_ALARMS}"
                objects += [self.cpu_object(w, source / "cpu" / f"{k}.cpp", f"{k}.{isa}", more) for k in CPU_KERNELS]
            bindings, link, constants, compiler = self.binding_flags(), self.openmp_flags(), "", ""
            if nvcc:
                constants = (" -DBAM_BOUNDED_WAITS" if bounded_waits() else "") + defines()
                compiler = f"nvcc {nvcc_version(nvcc)}"
                cuda_objects, bind_cuda, link_cuda = self.cuda_objects(w, source, nvcc, constants)
                objects += cuda_objects
                bindings += bind_cuda
                link += link_cuda
            built_from = f"-DBAM_BUILT_FROM='\"{sources_hash(constants)} {compiler}\"'"
            objects.append(self.cpu_object(w, source / "built_from.cpp", "built_from", built_from))
            for name in ("bindings", "bindings_cuda"):
                objects.append(self.cpu_object(w, source / f"{name}.cpp", name, bindings))
            shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
            w.rule("link", f"$cxx {shared} -o $out $in {link}")
            w.build(str(module), "link", objects)

    @staticmethod
    def cpu_object(w, source: Path, name: str, more: str) -> str:
        w.build(f"{name}.o", "cpp", str(source), variables={"more": more})
        return f"{name}.o"

    @staticmethod
    def isas() -> dict[str, tuple[int, str]]:
        if platform.machine() in ("x86_64", "AMD64"):
            return X86_ISAS
        return {"plain": (4, "")}

    @staticmethod
    def cxx() -> str:
        return os.environ.get("CXX", "g++" if shutil.which("g++") else "c++")

    def knows_amx(self) -> bool:
        """Whether compiler and assembler know tile units (AMX) of x86-64 processors, which Linux lets processes use."""
        if sys.platform != "linux" or "avx512" not in self.isas():
            return False
        source = "#include <immintrin.h>\n#include <omp.h>\nvoid release() { _tile_release(); }\n"
        flags = [*AMX.split(), *self.openmp_flags().split(), "-x", "c++", "-c", "-o", os.devnull, "-"]
        try:
            tried = subprocess.run([*shlex.split(self.cxx()), *flags], input=source, text=True, capture_output=True)
        except OSError:  # there is no compiler, as the build will say
            return False
        return tried.returncode == 0

    @staticmethod
    def openmp_flags() -> str:
        """Plain -fopenmp shares torch's OpenMP runtime. Apple's compiler has no OpenMP: one thread there."""
        return "" if sys.platform == "darwin" else "-fopenmp"

    @staticmethod
    def binding_flags() -> str:
        import pybind11

        # Only the bindings see pybind11's path: isolated builds change it, and all that see it are recompiled.
        return f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"

    @staticmethod
    def cuda_objects(w, source: Path, nvcc: Path, constants: str) -> tuple[list[str], str, str]:
        architectures = cuda_architectures(nvcc)
        generated = " ".join(flag for a in architectures for flag in gencode(a))
        w.variable("nvcc", str(nvcc))
        w.variable("nvflags", f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall {generated}{constants}")
        w.rule("cuda", "$nvcc -MD -MF $out.d $nvflags -c $in -o $out", depfile="$out.d", deps="gcc")
        objects = []
        for name in CUDA_FILES:
            w.build(f"{name}.cuda.o", "cuda", str(source / "cuda" / f"{name}.cu"))
            objects.append(f"{name}.cuda.o")
        define = f" -DBAM_WITH_CUDA -DBAM_CUDA_ARCHITECTURES='\"{' '.join(architectures)}\"'{constants}"
        home = nvcc_home(nvcc)
        libraries = next((d for d in (home / "lib64", home / "lib") if (d / "libcudart_static.a").exists()), home)
        return objects, define, f" -L{libraries} -lcudart_static -ldl -lrt -lpthread"


extensions = [Extension("bam_kernels._C", sources=[])]
if build_mode() == "none":
    refuse_cuda_options("BAM_KERNELS_BUILD=none")
    extensions = []
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
