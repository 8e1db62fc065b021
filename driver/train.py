"""The training loop, from options to a finished run. V views per image, view-major; G images per step."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_kernels import BAMLoss, GradientCache

from . import checkpoint, config, contrast, report
from .config import Config, Loss, UserError
from .data import Crops, make_images, virtual_batch
from .evaluate import Embed, Vote, evaluate, features, pixels
from .history import File, Sink
from .keyed import seed_of
from .log import Log
from .model import Network, follow, make_teacher
from .optim import Arithmetic, Schedules, make_optimizer
from .signals import Stopped, StopSignal
from .trackers import TensorBoard, Wandb
from .weights import load_backbone
from .world import World

TEACHER_VIEWS = 2


def pretrain(options: Config, world: World | None = None) -> Path:
    """Train as the options say and return the run's directory. Raises: UserError; Stopped after a signal."""
    world = world or World()
    data, model, optim, run = options.data, options.model, options.optim, options.run
    device = world.choose_device(run.device)
    world.start(device)
    make_deterministic(run.deterministic)
    torch.manual_seed(run.seed)

    G = virtual_batch(data, world)
    images = make_images(data, options.boxes, device, run.seed, world)
    steps = images.training // G
    schedules = Schedules(options, steps, G)
    arithmetic = Arithmetic.of(run.dtype, device)
    network, teacher = make_networks(options, images.channels, device, arithmetic.weights)
    bam = make_loss(options.loss, schedules, device, arithmetic.weights)
    optimizer = make_optimizer(network, optim)

    state = checkpoint.State(network, teacher, optimizer, arithmetic.scaler, images, G)
    if run.resume is not None:
        directory = checkpoint.load(state, run.resume)
    else:
        directory = world.from_first("directory", lambda: fresh_directory(run.name))
    # Resumed on other ranks, the run keeps its objective.
    options = replace(options, data=replace(data, virtual_batch=G))
    if world.first:
        config.save(options, directory)
        state.history.sinks = make_sinks(state, options, directory)

    last_epoch = min(optim.epochs, run.stop_after or optim.epochs)
    print(f"{directory}: {images.training} training images, {images.tested} held out; {steps} steps an epoch; {device}")
    log = Log(state, directory, steps, optim.epochs, schedules.warmup, G, world)

    def test(kind: str, embed: Embed) -> None:
        log.note(kind, **evaluate(embed, images, Vote(run.neighbours), world))

    def criterion(*embeddings: Tensor) -> Any:
        try:
            return bam(*embeddings, step=state.step)
        except ValueError as error:
            raise log.stopped(state.step, str(error)) from error

    def teach(crops: Crops) -> Tensor:
        return teacher(crops if model.teacher_views == "all" else crops[0][: TEACHER_VIEWS * data.batch_size])

    cache = GradientCache(
        world.parallel(network),
        criterion,
        teach if teacher else None,
        arithmetic.scaler,
        views=data.views + data.local_views,
    )

    def save() -> None:
        log.check_weights()
        if world.first:
            keep = state.step % steps == 0 and due(state.epoch, run.keep_every)
            checkpoint.save(state, config.as_plain(options), directory, run.keep_last, keep)

    def stop_if_asked() -> None:
        """Several ranks agree where they wait for each other anyway."""
        if world.size > 1 and state.step % run.log_every and state.step % steps:
            return
        if world.any(signal.asked, device):
            log.line(lr)
            save()
            world.end()
            raise Stopped(directory, state.step)

    with StopSignal() as signal:
        try:
            if state.step == 0:
                if images.tested >= world.size:
                    test("pixels", pixels)
                test("evaluation", features(network.backbone))
                log.restart_clock()
            while state.epoch < last_epoch:
                if state.step % steps == 0 and contrast.due(options.boxes, state.epoch):
                    with arithmetic.context():
                        contrast.refresh(images, network, options.boxes.threshold, world)
                for micro_batches in log.waiting(images.views(state.epoch, state.step % steps)):
                    torch.manual_seed(seed_of(run.seed, state.step, world.rank))
                    lr = schedules.apply(optimizer, state.step)
                    optimizer.zero_grad()
                    with arithmetic.context():
                        value, stats = cache(micro_batches)
                    arithmetic.step(optimizer, network, optim.clip_norm)
                    if teacher is not None:
                        follow(teacher, network, schedules.teacher_momentum(state.step))
                    state.step += 1
                    log.add(value, stats)
                    if state.step % run.log_every == 0:
                        log.line(lr)
                    if state.step % steps:
                        if due(state.step, run.save_steps):
                            log.line(lr)
                            save()
                            log.restart_clock()
                        stop_if_asked()

                state.epoch += 1
                finished = state.epoch == last_epoch
                tested = finished or due(state.epoch, run.eval_every)
                keep = finished or due(state.epoch, run.save_every) or due(state.epoch, run.keep_every)
                if tested or keep:
                    log.line(lr)
                if tested:
                    test("evaluation", features(network.backbone))
                if keep:
                    save()
                if tested or keep:
                    log.restart_clock()
                if not finished:
                    stop_if_asked()
        finally:
            log.close()

        if world.first:
            report.finish(state.history, options, directory, images, features(network.backbone))
        world.end()
    return directory


def make_deterministic(wanted: bool) -> None:
    """cuBLAS reads its part from the environment, when it is first used."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted


def make_networks(
    options: Config, channels: int, device: torch.device, dtype: torch.dtype
) -> tuple[Network, Network | None]:
    """Student and, if there is to be one, teacher. Raises: UserError."""
    data, model = options.data, options.model
    network = Network(model, channels, data.size, data.local_size if data.local_views else None).to(device, dtype)
    if model.weights is not None and options.run.resume is None:
        load_backbone(network.backbone[1], model.weights)
    if model.channels_last:
        network = network.to(memory_format=torch.channels_last)
    teacher = make_teacher(network) if model.teacher_momentum > 0 else None
    if model.compile:
        for part in (network, teacher):
            if part is not None:
                part.compile()
    return network, teacher


def make_sinks(state: checkpoint.State, options: Config, directory: Path) -> list[Sink]:
    """Where the history goes, beside memory. Raises: UserError."""
    sinks: list[Sink] = [File(directory, state.history.rows)]
    if options.run.tensorboard:
        sinks.append(TensorBoard(directory, state.step))
    if options.run.wandb is not None:
        sinks.append(Wandb(options.run.wandb, directory, options))
    return sinks


def make_loss(loss: Loss, schedules: Schedules, device: torch.device, dtype: torch.dtype) -> BAMLoss:
    """BAM with these options, tried on two images: what cannot run here is known before anything is written.

    Raises: UserError.
    """
    try:
        bam = BAMLoss(
            temperature=loss.temperature,
            epsilon=schedules.epsilon,
            iterations=loss.iterations,
            top_k=loss.top_k,
            backend=loss.backend,
            return_stats=True,
        )
        for step in (0, schedules.total):
            bam(torch.eye(4, device=device, dtype=dtype).view(2, 2, 4), step=step)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--loss: {error}") from error
    return bam


def fresh_directory(name: str) -> Path:
    """./runs/NAME-001, or the first number that is free; made here, so that no two runs share it."""
    number = 1
    while True:
        directory = Path("runs") / f"{name}-{number:03d}"
        try:
            directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            number += 1


def due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0
