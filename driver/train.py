"""The training loop, from options to a finished run. V views per image, view-major; G images per step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bam_kernels import BAMLoss, GradientCache

from . import checkpoint, config, report
from .config import Config, Loss, UserError
from .data import make_images, seed_of, virtual_batch
from .evaluate import evaluate, features, pixels
from .log import Log
from .model import Network, follow, make_teacher
from .optim import learning_rate, make_optimizer
from .world import World

TEACHER_VIEWS = 2


def pretrain(options: Config, world: World | None = None) -> Path:
    """Train as the options say and return the run's directory. Raises: UserError."""
    world = world or World()
    data, model, optim, run = options.data, options.model, options.optim, options.run
    device = world.choose_device(run.device)
    world.start(device)
    torch.manual_seed(run.seed)

    G = virtual_batch(data, world)
    images = make_images(data, device, run.seed, world)
    dtype = torch.float64 if run.dtype == "float64" else torch.float32
    network = Network(model, images.channels, data.size).to(device, dtype).to(memory_format=torch.channels_last)
    teacher = make_teacher(network) if model.teacher_momentum > 0 else None
    bam = make_loss(options.loss, device, dtype)
    optimizer = make_optimizer(network, optim)

    state = checkpoint.State(network, teacher, optimizer)
    if run.resume is not None:
        checkpoint.load(state, run.resume)
    directory = run.resume or world.from_first("directory", lambda: fresh_directory(run.name))
    # Resumed on other ranks, the run keeps its objective.
    options = replace(options, data=replace(data, virtual_batch=G))
    if world.first:
        config.save(options, directory)

    steps = images.training // G
    total, warmup = optim.epochs * steps, optim.warmup_epochs * steps
    last_epoch = min(optim.epochs, run.stop_after or optim.epochs)
    print(f"{directory}: {images.training} training images, {images.tested} held out; {steps} steps an epoch; {device}")
    if images.tested and state.epoch == 0 and world.first:
        state.note("pixels", 0, evaluate(pixels, images, run.neighbours))
        state.note("knn", 0, evaluate(features(network.backbone), images, run.neighbours))

    log = Log(state, directory, steps, optim.epochs, G, world)

    def criterion(*embeddings: Tensor) -> Any:
        try:
            return bam(*embeddings, step=state.step)
        except ValueError as error:
            raise log.stopped(state.step, str(error)) from error

    def teach(views: Tensor) -> Tensor:
        return teacher(views[: TEACHER_VIEWS * data.batch_size])

    cache = GradientCache(world.parallel(network), criterion, teach if teacher else None, views=data.views)
    try:
        while state.epoch < last_epoch:
            torch.manual_seed(seed_of(run.seed, state.epoch, world.rank))
            for micro_batches in images.views(state.epoch):
                lr = learning_rate(state.step, total, warmup, optim.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
                value, stats = cache(micro_batches)
                if optim.clip_norm > 0:
                    nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
                optimizer.step()
                if teacher is not None:
                    follow(teacher, network, model.teacher_momentum)
                state.step += 1
                log.add(value, stats)
                if state.step % run.log_every == 0:
                    log.line(lr)

            state.epoch += 1
            finished = state.epoch == last_epoch
            test = bool(images.tested) and (finished or due(state.epoch, run.eval_every))
            save = finished or due(state.epoch, run.save_every)
            if test or save:
                log.line(lr)
            if test and world.first:
                state.note("knn", state.epoch, evaluate(features(network.backbone), images, run.neighbours))
            if save:
                log.check_weights()
            if save and world.first:
                checkpoint.save(state, config.as_plain(options), directory)
            if test or save:
                log.restart_clock()
    finally:
        log.close()

    if world.first:
        report.write(state, options, directory, images.tested, steps)
    world.end()
    return directory


def make_loss(loss: Loss, device: torch.device, dtype: torch.dtype) -> BAMLoss:
    """BAM with these options, tried on two images: what cannot run here is known before anything is written.

    Raises: UserError.
    """
    try:
        bam = BAMLoss(
            temperature=loss.temperature,
            epsilon=loss.epsilon,
            iterations=loss.iterations,
            top_k=loss.top_k,
            backend=loss.backend,
            return_stats=True,
        )
        bam(torch.eye(4, device=device, dtype=dtype).view(2, 2, 4))
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


def due(epoch: int, every: int) -> bool:
    return every > 0 and epoch % every == 0
