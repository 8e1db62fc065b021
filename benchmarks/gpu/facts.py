"""Prints the facts of this machine: its GPU, its software, and the extension that the library loads."""

import shutil
import subprocess
import sys

import torch

from bam_kernels.backends import cuda, extension

COMMANDS = (
    (
        "nvidia-smi",
        "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total",
        "--format=csv",
    ),
    ("nvcc", "--version"),
    ("compute-sanitizer", "--version"),
    ("ncu", "--version"),
)


def main() -> int:
    """Print the facts; exit status 0 if the CUDA kernels can run here, 1 if they cannot, 2 if there is no GPU."""
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for command in COMMANDS:
        if shutil.which(command[0]) is None:
            print(f"{command[0]}: not here")
            continue
        found = subprocess.run(command, capture_output=True, text=True)
        print(found.stdout.strip() or found.stderr.strip())
    if not torch.cuda.is_available():
        print("torch sees no GPU")
        return 2
    print(torch.cuda.get_device_properties(0))
    print(f"the extension: {getattr(extension._C, '__file__', None)}, {extension.import_error or 'loaded'}")
    reason = cuda.unavailable(torch.device("cuda"))
    print(cuda.query_device(0) if cuda.device_count() else "", f"compiled for {cuda.architectures()}", sep="\n")
    print(f"CUDA kernels: {reason or 'can run here'}")
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main())
