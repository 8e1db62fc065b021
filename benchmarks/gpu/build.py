"""Builds variants of the extension for a GPU run: for sm_90a, for older GPUs, and with bounded waits.

    python benchmarks/gpu/build.py --out build/gpu
    BAM_KERNELS_EXTENSION=$(ls build/gpu/bounded/_C.*.so) python -m bam_kernels

The variants can be built without a GPU and copied to a machine with one. There an extension needs neither torch nor
nvcc, but the Python version it was built for. Objects are kept in OUT-objects, so that only changed files are compiled
again.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from variants import TRIED

ROOT = Path(__file__).resolve().parent.parent.parent
# Each variant's environment for setup.py; it overrides exported variables. On a newer GPU the driver compiles the
# variant sm_80 from PTX.
PLAIN_CUDA = {"BAM_KERNELS_BUILD": "cuda", "BAM_KERNELS_BOUNDED_WAITS": "0", "BAM_KERNELS_DEFINES": ""}
VARIANTS = {
    "sm_90a": PLAIN_CUDA | {"TORCH_CUDA_ARCH_LIST": "9.0a"},
    "sm_80": PLAIN_CUDA | {"TORCH_CUDA_ARCH_LIST": "8.0+PTX"},
    "bounded": PLAIN_CUDA | {"TORCH_CUDA_ARCH_LIST": "9.0a", "BAM_KERNELS_BOUNDED_WAITS": "1"},
}
VARIANTS |= {name: VARIANTS["sm_90a"] | {"BAM_KERNELS_DEFINES": defines} for name, defines in TRIED.items()}
DEFAULTS = [name for name in VARIANTS if name not in TRIED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the extensions: OUT/VARIANT/_C*.so")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter to build for, which must have setuptools, ninja and pybind11 (default: this one)",
    )
    names = f"variants to build, among {', '.join(VARIANTS)} (default: {' '.join(DEFAULTS)})"
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULTS, metavar="VARIANT", help=names)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for variant in arguments.variants:
        begin = time.perf_counter()
        extension = build(variant, out, arguments.python)
        seconds = time.perf_counter() - begin
        print(f"{variant:11} {seconds:6.1f} s {extension.stat().st_size / 1e6:6.1f} MB  {extension}", flush=True)


def build(variant: str, out: Path, python: str) -> Path:
    """Build the variant, or bring it up to date; returns the path of its extension."""
    objects = out.with_name(f"{out.name}-objects") / variant
    library = objects / "library"
    command = [python, "setup.py", "--quiet", "build_ext", f"--build-temp={objects}", f"--build-lib={library}"]
    environment = os.environ | VARIANTS[variant]
    subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=True)
    (made,) = library.glob("bam_kernels/_C.*.so")
    extension = out / variant / made.name
    extension.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, extension)
    return extension


if __name__ == "__main__":
    main()
