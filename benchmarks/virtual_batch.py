"""Memory and time of one step with the gradient cache, for several numbers of micro-batches.

    python benchmarks/virtual_batch.py --json benchmarks/results/cpu_virtual_batch.json

A small convolutional network embeds two views of random 8 x 8 images, one micro-batch of fixed size at a time; the loss
is over the whole virtual batch. The table has the peak memory of a step and of the loss alone on as many embeddings.
What a step takes beyond the loss and the embeddings must not grow with the number of micro-batches. The last row is a
plain backward pass on one micro-batch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import options_of
from hardware import Machine
from report import plain_table, write
from torch import Tensor, nn

from bam_kernels import BAMLoss, GradientCache

VIEWS = 2


@dataclass
class VirtualBatchOptions:
    batches: tuple[int, ...] = (1024, 4096, 16384)
    """Numbers of images in the virtual batch, one row of the table each."""
    micro_batch: int = 128
    features: int = 128
    width: int = 32
    memory_budget: int = 128 << 20
    """Bytes that the loss may allocate for scores."""
    device: str = "auto"
    threads: int | None = None
    json: Path | None = None
    csv: Path | None = None


def network(width: int, features: int) -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.ReLU()]

    layers = [*block(1, width, 1), *block(width, 2 * width, 2), *block(2 * width, 4 * width, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, features))


def row(options: VirtualBatchOptions, machine: Machine, images: int, cached: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = network(options.width, options.features).to(machine.device)
    loss = BAMLoss(views=VIEWS, memory_budget=options.memory_budget, precision="exact")
    b = options.micro_batch
    batches = [torch.rand(VIEWS * b, 1, 8, 8, device=machine.device) for _ in range(images // b)]
    cache = GradientCache(model, loss, views=VIEWS)

    def step() -> Tensor:
        model.zero_grad()
        if cached:
            return cache(batches)
        value = loss(model(batches[0]))
        value.backward()
        return value

    step()
    peak = machine.peak_bytes(step)
    embeddings = VIEWS * images * options.features * 4
    z = torch.randn(VIEWS, images, options.features, device=machine.device, requires_grad=True)
    of_loss = machine.peak_bytes(lambda: loss(z).backward())
    return {
        "step": "gradient cache" if cached else "plain",
        "images": images,
        "micro_batch": b,
        "micro_batches": len(batches),
        "features": options.features,
        "memory_budget": options.memory_budget,
        "ms": machine.time_ms(step),
        "peak_bytes": peak,
        "embeddings_bytes": embeddings,
        "peak_of_loss_bytes": of_loss,
        "beyond_bytes": None if peak is None or of_loss is None else peak - of_loss - embeddings,
    }


def main(options: VirtualBatchOptions) -> int:
    for images in options.batches:
        if images % options.micro_batch:
            print(f"--batches: {images} is not a multiple of --micro-batch {options.micro_batch}", file=sys.stderr)
            return 2
    machine = Machine.detect(options.device, options.threads)
    print(machine.line(), flush=True)
    rows = [row(options, machine, images, True) for images in options.batches]
    rows.append(row(options, machine, options.micro_batch, False))
    print(plain_table(rows))
    rows = [{"benchmark": "virtual_batch"} | values | machine.fields() for values in rows]
    write(rows, options.json, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main(options_of(VirtualBatchOptions, __doc__)))
