"""Times of the parts of a driver step: data, backbone, head, loss, teacher, optimiser, and the rest.

    python benchmarks/driver_step.py --json benchmarks/results/cpu_driver.json
    python benchmarks/driver_step.py --options="--recipe imagenet-vit-s --data.root PATH --virtual-batch 256"

The parts are the driver's own, built from the given options, on photographs of noise unless the options name a folder.
Each part runs alone, on the inputs it has within a step. `rest` is the whole step minus the sum of its parts;
`overhead` is the whole step minus data and backbones. The last column divides each part's time by the time of the
student's and teacher's backbones, forward and backward.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from command_line import options_of
from hardware import Machine
from PIL import Image
from report import plain_table, write
from torch import Tensor

from bam_kernels import GradientCache
from driver import cli
from driver.config import Config
from driver.data import make_images
from driver.data.images import Crops, virtual_batch
from driver.distributed import World
from driver.loss import TEACHER_VIEWS, make_loss
from driver.model import follow
from driver.optim import Arithmetic, Schedules, make_optimizer
from driver.train import make_networks

PARTS = ("data", "backbone", "teacher", "head", "loss", "optimiser")


@dataclass
class DriverOptions:
    options: str = "--recipe cifar10-resnet18 --data.batch-size 128"
    """Options of driver/pretrain.py, all in one string."""
    images: int = 512
    """Number of noise photographs to write, if the options name no folder."""
    device: str = "auto"
    threads: int | None = None
    repetitions: int = 5
    json: Path | None = None
    csv: Path | None = None


class Step:
    """One step of the driver on one rank, and its parts. B is the number of images per micro-batch."""

    def __init__(self, options: Config, machine: Machine) -> None:
        self.options, device, world = options, machine.device, World()
        torch.manual_seed(options.run.seed)
        self.G = virtual_batch(options.data, world)
        self.images = make_images(options.data, options.boxes, device, options.run.seed, world)
        self.schedules = Schedules(options, self.images.training // self.G, self.G)
        self.arithmetic = Arithmetic.of(options.run.dtype, device)
        self.network, self.teacher = make_networks(options, self.images.channels, device, self.arithmetic.weights)
        bam = make_loss(options.loss, self.schedules, device, self.arithmetic.weights, world)
        self.criterion = lambda *embeddings: bam(*embeddings, step=0)
        self.optimizer = make_optimizer(self.network, options.optim)
        self.views = options.data.views + options.data.local_views
        teach = self.teach if self.teacher else None
        self.cache = GradientCache(self.network, self.criterion, teach, self.arithmetic.scaler, views=self.views)
        self.batches = self._endless()

    def _endless(self):
        epoch = 0
        while True:
            yield from self.images.views(epoch)
            epoch += 1

    def teach(self, crops: Crops) -> Tensor:
        model, B = self.options.model, self.options.data.batch_size
        assert self.teacher is not None
        return self.teacher(crops if model.teacher_views == "all" else crops[0][: TEACHER_VIEWS * B])

    def whole(self) -> None:
        self.schedules.apply(self.optimizer, 0)
        micro_batches = next(self.batches)
        self.optimizer.zero_grad()
        with self.arithmetic.context():
            self.cache(micro_batches)
        self.optimise()

    def optimise(self) -> None:
        self.arithmetic.step(self.optimizer, self.network, self.options.optim.clip_norm)
        if self.teacher is not None:
            follow(self.teacher, self.network, self.options.model.teacher_momentum)

    def parts(self) -> dict[str, Callable[[], Any]]:
        """The parts of a step by name, each on the inputs it has there, with the gradients that `whole` has left."""
        micro_batches, context = next(self.batches), self.arithmetic.context
        passes = 2 if len(micro_batches) > 1 else 1  # the gradient cache embeds several micro-batches twice

        def embed(crops: Crops) -> Tensor:
            return torch.cat([self.network.backbone(part) for part in crops])

        with torch.no_grad(), context():
            features = [embed(crops) for crops in micro_batches]
            z = torch.cat([self.network.head(f).unflatten(0, (self.views, -1)) for f in features], dim=1)
            y = None
            if self.teacher is not None:
                B = self.options.data.batch_size
                y = torch.cat([self.teach(crops).unflatten(0, (-1, B)) for crops in micro_batches], dim=1)
        features = [f.detach().requires_grad_() for f in features]
        z.requires_grad_()

        def backbone() -> None:
            for crops in micro_batches:
                if passes == 2:
                    with torch.no_grad(), context():
                        embed(crops)
                with context():
                    out = embed(crops)
                out.backward(torch.ones_like(out))

        def head() -> None:
            for f in features:
                with context():
                    out = self.network.head(f)
                out.backward(torch.ones_like(out))

        def loss() -> None:
            with context():
                value, _ = self.criterion(z) if y is None else self.criterion(z, y)
            value.backward()

        def teacher() -> None:
            with torch.no_grad(), context():
                for crops in micro_batches:
                    self.teach(crops)

        runs = {"data": lambda: next(self.batches), "backbone": backbone, "head": head, "loss": loss}
        return runs | ({"teacher": teacher} if self.teacher else {}) | {"optimiser": self.optimise}


def quantiles(times: list[float]) -> tuple[float, float, float]:
    return tuple(torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist())


def measure(options: DriverOptions, machine: Machine, config: Config) -> list[dict[str, Any]]:
    step = Step(config, machine)
    for _ in range(2):
        step.whole()
    parts = {"step": step.whole} | step.parts()
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.repetitions):  # in rotation, so that noise of the machine hits all parts alike
        for name, run in parts.items():
            run()  # an untimed run first, so that the allocator already has the memory, as between steps
            if machine.device.type == "cuda":
                torch.cuda.synchronize()  # work still queued would hide the time of the host
            times[name].append(machine.time_ms(run))
    median = {name: quantiles(samples)[0] for name, samples in times.items()}
    networks = median["backbone"] + median.get("teacher", 0.0)
    rest = median["step"] - sum(median[name] for name in PARTS if name in median)
    overhead = median["step"] - networks - median["data"]
    rows = []
    for name in ("step", *PARTS, "rest", "overhead"):
        if name in median or name in ("rest", "overhead"):
            ms = {"rest": rest, "overhead": overhead}.get(name, median.get(name))
            _, p20, p80 = quantiles(times[name]) if name in times else (None, None, None)
            shares = {"share_of_step": ms / median["step"], "share_of_networks": ms / networks}
            rows.append({"part": name, "median_ms": ms, "p20_ms": p20, "p80_ms": p80} | shares)
    sizes = {"model": config.model.name, "images": step.G, "views": step.views, "repetitions": options.repetitions}
    return [row | sizes for row in rows]


def write_noise_photographs(folder: Path, count: int, side: int = 64) -> None:
    """Write `count` JPEG photographs of noise into the folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:05d}.jpg")


def main(options: DriverOptions) -> int:
    machine = Machine.detect(options.device, options.threads)
    print(machine.line(), flush=True)
    arguments = shlex.split(options.options)
    with tempfile.TemporaryDirectory() as folder:
        if not any(word.startswith("--data.root") for word in arguments):
            (Path(folder) / "all").mkdir()
            write_noise_photographs(Path(folder) / "all", options.images)
            arguments += ["--data.root", folder]
        rows = measure(options, machine, cli.parse(arguments))
    print(plain_table([{k: "-" if v is None else v for k, v in row.items()} for row in rows]))
    rows = [{"benchmark": "driver", "options": options.options} | row | machine.fields() for row in rows]
    write(rows, options.json, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main(options_of(DriverOptions, __doc__)))
