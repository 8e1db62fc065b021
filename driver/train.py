"""Training loop, from options to a finished run.

A step has G images over all ranks and micro-batches, each image in V views; rows are view-major.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_kernels import GradientCache

from . import checkpoint, cli, config, contrastive_crop, history
from .config import Config, LostWorker, Run, UserError
from .data import make_images
from .data.images import Crops, virtual_batch
from .data.inventory import FILE as INVENTORY
from .data.inventory import Inventory
from .data.random_keys import seed_of
from .distributed import World
from .evaluation.online import Embed, Vote, evaluate, features, pixels
from .exits import Stopped, StopSignal
from .files import LOCK, RunLock, obstacle, remove_unfinished
from .history import File, Sink
from .log import Log
from .loss import TEACHER_VIEWS, make_loss, step_embeddings
from .model import Network, follow, make_teacher, synchronised
from .optim import Arithmetic, Schedules, make_optimizer
from .reporting import outputs
from .reporting.trackers import TensorBoard, Wandb
from .weights import load_backbone, load_pretrained

OWN_FILES = "|".join(
    [*map(re.escape, (checkpoint.FILE, config.FILE, history.FILE, INVENTORY)), r"(step-\d{9}|epoch-\d{4,})\.pt"]
)
"""Regular expression of the names of files that only the process which trains a run writes."""


def pretrain(options: Config, world: World | None = None) -> Path:
    """Train as the options say and return the run's directory, which rank 0 has locked meanwhile.

    An error from outside the run, such as the loss of a rank, gets a note on the checkpoint from which it can go on.

    Raises: UserError, also where another process trains the run; Stopped once a signal has come.
    """
    world, training = world or World(), None
    with RunLock() as lock:
        try:
            world.from_first("place", lambda: check_place(options.run, lock))
            device = world.choose_device(options.run.device)
            world.start(device)
            make_deterministic(options.run.deterministic)
            torch.manual_seed(options.run.seed)
            training = Training(options, device, world, lock)
            training.run()
        except BaseException as error:
            note_checkpoint(error, options.run.resume if training is None else training.saved)
            raise
    return training.directory


def note_checkpoint(error: BaseException, saved: Path | None) -> None:
    """Add a note to an error from outside the run: the path by which --run.resume goes on, if a checkpoint is there."""
    if isinstance(error, Stopped) or (isinstance(error, UserError) and not isinstance(error, LostWorker)):
        return
    if saved is None or not checkpoint.file_of(saved).is_file():
        error.add_note("no checkpoint was written yet")
    else:
        error.add_note(f"--run.resume {saved} goes on from the last checkpoint")


def check_place(run: Run, lock: RunLock) -> Path:
    """Folder in which the run will be written, after a trial on it. The directory of a resumed run is locked.

    Raises: UserError where the folder cannot be written, or another process trains the run.
    """
    if run.resume is None:
        cli.check_new_name(run.name)
        return cli.check_folder(run.directory, f"--run.directory {run.directory}")
    directory, names = checkpoint.file_of(run.resume).parent, (checkpoint.FILE, config.FILE, history.FILE, LOCK)
    cli.check_folder(directory, f"--run.resume {run.resume}", *names)
    remove_unfinished(directory, OWN_FILES, at_once=lock.take(directory))
    return directory


class Training:
    """A run: its images, networks, loss, optimiser, schedules and log, and the methods that take epochs and steps."""

    def __init__(self, options: Config, device: torch.device, world: World, lock: RunLock | None = None) -> None:
        """Make all parts of the run, load the checkpoint of a resumed run, and print a line about the run.

        Raises: UserError where options, images or checkpoint do not fit.
        """
        data, optim, run = options.data, options.optim, options.run
        self.device, self.world, self.lock = device, world, lock or RunLock()
        self.G = G = virtual_batch(data, world)
        self.images = make_images(data, options.boxes, device, run.seed, world)
        self.steps = self.images.training // G
        self.schedules = Schedules(options, self.steps, G)
        self.arithmetic = Arithmetic.of(run.dtype, device)
        self.network, self.teacher = make_networks(options, self.images.channels, device, self.arithmetic.weights)
        if options.boxes.every:
            with self.arithmetic.context():
                contrastive_crop.check(self.network, self.images.channels, data.size)
        self.bam = make_loss(options.loss, self.schedules, device, self.arithmetic.weights, world)
        self.optimizer = make_optimizer(self.network, optim)

        inventory = Inventory.of(self.images.source) if world.first else None
        self.state = checkpoint.State(
            self.network, self.teacher, self.optimizer, self.arithmetic.scaler, self.images, inventory, G
        )
        if run.resume is not None:
            self.directory = checkpoint.load(self.state, options, world)
        else:
            self.directory = world.from_first("directory", lambda: new_directory(run, self.lock))
        # The images per step are saved, so that a run resumed on another number of ranks keeps its objective.
        self.options = replace(options, data=replace(data, virtual_batch=G))
        if world.first:
            config.save(self.options, self.directory)
            inventory.write(self.directory)
            self.state.history.sinks = make_sinks(self.state, self.options, self.directory)
        self.saved = run.resume  # the path by which the run can be resumed
        self.last_epoch = min(optim.epochs, run.stop_after or optim.epochs)
        print(
            f"{self.directory}: {self.images.training} training images, {self.images.tested} held out; "
            f"{self.steps} steps an epoch; {device}; loss backend: {self.expected_way()}"
        )
        if optim.lr_end > self.schedules.peak:
            print(
                f"warning: the learning rate rises to --optim.lr-end {optim.lr_end:g} "
                f"from a peak of {self.schedules.peak:.3g}, that of {G} images per step"
            )
        self.log = Log(self.state, self.directory, self.steps, optim.epochs, self.schedules.warmup, G, world)
        self.cache = GradientCache(
            world.parallel(self.network),
            self.criterion,
            self.teach if self.teacher else None,
            self.arithmetic.scaler,
            views=data.views + data.local_views,
        )

    def run(self) -> None:
        """Train to the last epoch and write the report; a signal ends this once the state is saved."""
        with StopSignal() as signal:
            try:
                self.begin()
                while self.state.epoch < self.last_epoch:
                    self.epoch(signal)
            finally:
                self.log.close()
            self.finish()

    def begin(self) -> None:
        """Evaluate raw pixels and the network, before the first step of a new run."""
        if self.state.step == 0:
            if self.images.tested >= self.world.size:
                self.test("pixels", pixels)
            self.test("evaluation", features(self.network.backbone))
            self.log.restart_clock()

    def epoch(self, signal: StopSignal) -> None:
        """Train from the current step to the end of the epoch; then evaluate and save where they are due."""
        state, log, run = self.state, self.log, self.options.run
        if state.step % self.steps == 0 and contrastive_crop.due(self.options.boxes, state.epoch):
            log.line()
            with self.arithmetic.context():
                looking = self.teacher or self.network
                contrastive_crop.refresh(self.images, looking, self.options.boxes.threshold, self.world)
            log.restart_clock()
        for micro_batches in log.waiting(self.images.views(state.epoch, state.step % self.steps)):
            self.step(micro_batches)
            if state.step % run.log_every == 0:
                log.line()
            if state.step % self.steps:
                if due(state.step, run.save_steps):
                    self.save()
                self.stop_if_asked(signal)

        state.epoch += 1
        for network in filter(None, (self.network, self.teacher)):
            self.world.share_buffers(network)  # for evaluation and boxes
        finished = state.epoch == self.last_epoch
        if finished or due(state.epoch, run.eval_every):
            log.line()
            self.test("evaluation", features(self.network.backbone))
            log.restart_clock()
        if finished or due(state.epoch, run.save_every) or due(state.epoch, run.keep_every):
            self.save()
        if not finished:
            self.stop_if_asked(signal)

    def step(self, micro_batches: list[Crops]) -> None:
        """Take one optimiser step over G images. The host does not wait for the device."""
        state = self.state
        torch.manual_seed(seed_of(self.options.run.seed, state.step, self.world.rank))
        lr = self.schedules.apply(self.optimizer, state.step)
        self.optimizer.zero_grad()
        with self.arithmetic.context():
            loss, stats = self.cache(micro_batches)
        self.arithmetic.step(self.optimizer, self.network, self.options.optim.clip_norm)
        if self.teacher is not None:
            follow(self.teacher, self.network, self.schedules.teacher_momentum(state.step))
        state.step += 1
        self.log.add(lr, loss, stats)

    def criterion(self, *embeddings: Tensor) -> Any:
        """BAM loss and statistics of the current step. An error of the loss becomes the error that ends the run."""
        step = self.state.step
        try:
            if not self.log.pending:  # the first step after a log line, or of this process
                self.log.computed_by(self.bam.way(*embeddings, step=step))
            return self.bam(*embeddings, step=step)
        except ValueError as error:
            raise self.log.stopped(step, str(error)) from error

    def expected_way(self) -> str:
        """Backend and engine by which the library computes the loss of the next step, as `BAMLoss.way` names them."""
        share = self.G // self.world.size
        embeddings = step_embeddings(self.options, self.network, self.teacher is not None, self.arithmetic, share)
        return self.bam.way(*embeddings, step=self.state.step)

    def teach(self, crops: Crops) -> Tensor:
        """Teacher's embeddings of the views that it sees."""
        assert self.teacher is not None
        data, model = self.options.data, self.options.model
        return self.teacher(crops if model.teacher_views == "all" else crops[0][: TEACHER_VIEWS * data.batch_size])

    def test(self, kind: str, embed: Embed) -> None:
        """Evaluate the features of `embed` and add the results to the history, as a row of this kind."""
        self.log.note(kind, **evaluate(embed, self.images, Vote(self.options.run.neighbours), self.world))
        self.log.settle()

    def save(self) -> None:
        """Save a checkpoint of the current step, after a check that losses and weights are finite."""
        state, run = self.state, self.options.run
        self.log.numbers()
        self.log.check_weights()
        if self.world.first:
            self.lock.keep()
            keep = state.step % self.steps == 0 and due(state.epoch, run.keep_every)
            checkpoint.save(state, config.as_plain(self.options), self.directory, run.keep_last, keep)
        self.saved = self.directory
        self.log.settle()
        self.log.restart_clock()

    def stop_if_asked(self, signal: StopSignal) -> None:
        """Save and raise Stopped if a signal has come. Several ranks agree at log lines, where they wait anyway."""
        if self.world.size > 1 and self.state.step % self.options.run.log_every:
            return
        if self.world.any(signal.asked, self.device):
            self.save()
            raise Stopped(self.directory, self.state.step)

    def finish(self) -> None:
        """Write the report of the run, on rank 0. The others wait for it."""
        if self.world.first:
            embed = features(self.network.backbone)
            outputs.finish(self.state.history, self.options, self.directory, self.images, embed)
        self.world.any(False, self.device)


def make_deterministic(wanted: bool) -> None:
    """Switch torch to deterministic algorithms, or off; cuBLAS reads its setting from the environment at first use."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted


def make_networks(
    options: Config, channels: int, device: torch.device, dtype: torch.dtype
) -> tuple[Network, Network | None]:
    """Student, and teacher if --model.teacher-momentum asks for one. Raises: UserError where the options do not fit."""
    data, model = options.data, options.model
    network = Network(model, channels, data.size, data.local_size if data.local_views else None).to(device, dtype)
    if model.weights is not None and options.run.resume is None:
        load_backbone(network.backbone[1], model.weights, model=model)
    if model.pretrained and options.run.resume is None:
        load_pretrained(network.backbone[1], model.name)
    if model.sync_batch_norm:
        if device.type != "cuda":
            raise UserError(f"--model.sync-batch-norm True: batch norms are synchronised between GPUs, not on {device}")
        network = synchronised(network)
    if model.channels_last:
        network = network.to(memory_format=torch.channels_last)
    teacher = make_teacher(network) if model.teacher_momentum > 0 else None
    if model.compile:
        for part in (network, teacher):
            if part is not None:
                part.compile()
    return network, teacher


def make_sinks(state: checkpoint.State, options: Config, directory: Path) -> list[Sink]:
    """Sinks of the history: its file, and TensorBoard and W&B on request. Raises: UserError if a package is missing."""
    sinks: list[Sink] = [File(directory, state.history.rows)]
    if options.run.tensorboard:
        sinks.append(TensorBoard(directory, state.step))
    if options.run.wandb is not None:
        sinks.append(Wandb(options.run.wandb, directory, options))
    return sinks


def new_directory(run: Run, lock: RunLock) -> Path:
    """Make, lock and return the directory of a new run. Raises: UserError where no directory can be made there."""
    directory = fresh_directory(run.name, run.directory)
    lock.take(directory)
    return directory


def fresh_directory(name: str, parent: Path = Path("runs")) -> Path:
    """Make and return PARENT/NAME-001, or NAME with the first free number, so that no two runs share a directory.

    Raises: UserError where no directory can be made there.
    """
    number = 1
    while True:
        directory = parent / f"{name}-{number:03d}"
        try:
            directory.mkdir(parents=True)
            return directory
        except (OSError, ValueError) as error:
            if not isinstance(error, FileExistsError) or not parent.is_dir():  # else a run has this number
                why = obstacle(directory, error)
                raise UserError(f"--run.directory {parent}: {directory} cannot be made: {why}") from error
            number += 1


def due(count: int, every: int) -> bool:
    """Whether `count` is a multiple of `every`; never if `every` is 0."""
    return every > 0 and count % every == 0
