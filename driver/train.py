"""The training loop, from options to a finished run. V views per image, B images per step, view-major."""

from pathlib import Path

import torch
from torch import nn

from bam_kernels import BAMLoss

from . import checkpoint, config, report
from .config import Config, Loss, UserError
from .data import make_images
from .evaluate import evaluate, features, pixels
from .log import Log
from .model import Network, follow, make_teacher
from .optim import learning_rate, parameter_groups

TEACHER_VIEWS = 2


def pretrain(options: Config) -> Path:
    """Train as the options say and return the run's directory. Raises: UserError."""
    data, model, optim, run = options.data, options.model, options.optim, options.run
    device = choose_device(run.device)
    torch.manual_seed(run.seed)

    images = make_images(data, device, run.seed)
    network = Network(model, images.channels, data.size).to(device).to(memory_format=torch.channels_last)
    teacher = make_teacher(network) if model.teacher_momentum > 0 else None
    bam = make_loss(options.loss, device)
    optimizer = torch.optim.AdamW(parameter_groups(network, optim.weight_decay), lr=optim.lr, fused=True)

    state = checkpoint.State(network, teacher, optimizer)
    if run.resume is not None:
        checkpoint.load(state, run.resume, device)
    directory = run.resume or fresh_directory(run.name)
    config.save(options, directory)

    steps = images.training // data.batch_size
    total, warmup = optim.epochs * steps, optim.warmup_epochs * steps
    last_epoch = min(optim.epochs, run.stop_after or optim.epochs)
    print(f"{directory}: {images.training} training images, {images.tested} held out; {steps} steps an epoch; {device}")
    if images.tested and state.epoch == 0:
        state.note("pixels", 0, evaluate(pixels, images, run.neighbours))
        state.note("knn", 0, evaluate(features(network.backbone), images, run.neighbours))

    log = Log(state, directory, steps, optim.epochs, data.batch_size)
    try:
        while state.epoch < last_epoch:
            for views in images.views(state.epoch):
                lr = learning_rate(state.step, total, warmup, optim.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                student = network(views).unflatten(0, (data.views, -1))
                keys = None
                if teacher is not None:
                    with torch.no_grad():
                        keys = teacher(views[: TEACHER_VIEWS * data.batch_size]).unflatten(0, (TEACHER_VIEWS, -1))
                try:
                    value, stats = bam(student, keys, step=state.step)
                except ValueError as error:
                    raise log.stopped(state.step, str(error)) from error
                optimizer.zero_grad()
                value.backward()
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
            if test:
                state.note("knn", state.epoch, evaluate(features(network.backbone), images, run.neighbours))
            if save:
                log.check_weights()
                checkpoint.save(state, config.as_plain(options), directory)
            if test or save:
                log.restart_clock()
    finally:
        log.close()

    report.write(state, options, directory, images.tested, steps)
    return directory


def make_loss(loss: Loss, device: torch.device) -> BAMLoss:
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
        bam(torch.eye(4, device=device).view(2, 2, 4))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--loss: {error}") from error
    return bam


def choose_device(name: str) -> torch.device:
    """The device of that name, seen to work. Raises: UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--run.device {name}: {str(error).splitlines()[0]}") from error


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
