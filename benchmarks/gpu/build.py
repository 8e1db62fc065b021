"""Builds of the extension that a GPU is tried with: one for it, one for older GPUs, and one whose waits end.

    python benchmarks/gpu/build.py --out build/gpu
    BAM_KERNELS_EXTENSION=$(ls build/gpu/bounded/_C.*.so) python -m bam_kernels

They can be made where there is no GPU and carried to where there is one: an extension needs neither torch nor nvcc
where it runs, but the Python version that it was made for. Objects are kept in OUT-objects: what did not change is not
compiled again.
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
# Environment in which setup.py builds each variant, whatever is exported. On a newer GPU the driver compiles the code
# for sm_80, from PTX.
AS_IT_IS = {"BAM_KERNELS_BUILD": "cuda", "BAM_KERNELS_BOUNDED_WAITS": "0", "BAM_KERNELS_DEFINES": ""}
VARIANTS = {
    "sm_90a": AS_IT_IS | {"TORCH_CUDA_ARCH_LIST": "9.0a"},
    "sm_80": AS_IT_IS | {"TORCH_CUDA_ARCH_LIST": "8.0+PTX"},
    "bounded": AS_IT_IS | {"TORCH_CUDA_ARCH_LIST": "9.0a", "BAM_KERNELS_BOUNDED_WAITS": "1"},
}
VARIANTS |= {name: VARIANTS["sm_90a"] | {"BAM_KERNELS_DEFINES": defines} for name, defines in TRIED.items()}
USUAL = [name for name in VARIANTS if name not in TRIED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="each variant's extension goes to OUT/VARIANT/")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="the interpreter that the extension is for; it has setuptools, ninja and pybind11 (default: this one)",
    )
    names = f"of {', '.join(VARIANTS)}; default: {' '.join(USUAL)}"
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=USUAL, metavar="VARIANT", help=names)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for variant in arguments.variants:
        begin = time.perf_counter()
        extension = build(variant, out, arguments.python)
        seconds = time.perf_counter() - begin
        print(f"{variant:11} {seconds:6.1f} s {extension.stat().st_size / 1e6:6.1f} MB  {extension}", flush=True)


def build(variant: str, out: Path, python: str) -> Path:
    """Path of the variant's extension, made or brought up to date."""
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
