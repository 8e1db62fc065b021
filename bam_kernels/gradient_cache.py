"""Exact gradient of a contrastive loss over many micro-batches, with the activation memory of a single micro-batch.

V views, b images in a micro-batch, B images in all micro-batches of this rank, D features.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .options import python_number
from .parallel_model import broadcast_buffers, check_pass_count, preserve_buffers, skip_gradient_exchange

_OPERATION = "GradientCache"


class GradientCache:
    """Back-propagate criterion(model(whole batch)) while holding the activations of one micro-batch at a time.

        dL/dtheta = Σ_m (dL/dz_m)ᵀ dz_m/dtheta

    1. Every micro-batch m is embedded without a graph.
    2. The criterion gives the loss of all embeddings z, over all ranks if it gathers them, and the gradient dL/dz.
    3. Every micro-batch is embedded again, with a graph and the random numbers of its first pass, and its rows of
       dL/dz are propagated into the parameters.

    Memory: the activations of one micro-batch, all embeddings, and the memory of the criterion. Cost: one more forward
    pass. A single micro-batch is embedded once.

        cache = GradientCache(model, BAMLoss(return_stats=True))
        loss, stats = cache(micro_batches, step=step)  # adds to .grad, as loss.backward() does
        optimizer.step()

    model      nn.Module: micro-batch -> (V, b, D) or (V*b, D). DistributedDataParallel (the model or any module in it)
               broadcasts buffers once a call, before the first micro-batch, and exchanges gradients once, in the last
               micro-batch. If the model has a `no_sync` of its own, it is entered for all micro-batches but the last
    criterion  called once as criterion(z, **options), or criterion(z, y, **options) with a teacher; z (V, B, D), images
               in the order of the micro-batches. Returns the loss, or a tuple whose first element is the loss
    teacher    micro-batch -> (R, b, D) or (R*b, D); called once per micro-batch, without gradient
    scaler     torch.amp.GradScaler; `scaler.step(optimizer)` and `scaler.update()` stay with the caller
    views      V, needed where the model returns (V*b, D)

    A micro-batch is whatever the model takes, for example a list of crops of two sizes; micro-batches may differ in b.
    If the model runs under `torch.autocast`, call the cache inside `torch.autocast`. After a call, the model's buffers
    and torch's random state (dropout, drop-path) are as after a single pass over the micro-batches; the generators of
    `random` and numpy are not restored between the two passes. BatchNorm normalises by the statistics of one
    micro-batch, SyncBatchNorm by the statistics of one micro-batch of every rank: with either, the result depends on
    the size of micro-batches. A model without statistics over images gives the result of the whole batch.

    Ranks may have different numbers of micro-batches unless the model (or a teacher that is a module) communicates in
    every pass. Modules that communicate in every pass:
    - SyncBatchNorm in training;
    - sharded parameters (FSDP, DTensor);
    - DistributedDataParallel(static_graph=True), in its first step alone: torch then exchanges gradients in the first
      micro-batch too.
    With such modules the ranks compare their numbers of micro-batches at each call; a difference raises on all ranks.

    Raises: ValueError or TypeError for bad arguments and for outputs of the wrong shape, naming the micro-batch.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any],
        teacher: Callable[[Any], Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        views: int | None = None,
    ) -> None:
        views = python_number(_OPERATION, "views", views)
        if views is not None and (not isinstance(views, int) or views < 1):
            raise ValueError(f"{_OPERATION}: views must be a positive integer or None, got {views!r}")
        self.model, self.criterion, self.teacher, self.scaler, self.views = model, criterion, teacher, scaler, views

    def __call__(self, micro_batches: Sequence[Any], **options: Any) -> Any:
        """Add the gradient to .grad of the parameters, and return the criterion's result, detached.

        micro_batches: a sequence, read twice. options: keyword arguments for the criterion.
        """
        if not hasattr(micro_batches, "__len__") or isinstance(micro_batches, Tensor):
            got = type(micro_batches).__name__
            raise TypeError(f"{_OPERATION}: micro_batches must be a sequence of micro-batches, read twice; got {got}")
        if not torch.is_grad_enabled():
            raise ValueError(f"{_OPERATION}: gradients are switched off here (no_grad or inference_mode)")
        models = [model for model in (self.model, self.teacher) if isinstance(model, nn.Module)]
        check_pass_count(_OPERATION, models, len(micro_batches))
        if len(micro_batches) == 0:
            raise ValueError(f"{_OPERATION}: micro_batches is empty")
        with broadcast_buffers(self.model):
            return (self._embed_once if len(micro_batches) == 1 else self._embed_twice)(micro_batches, options)

    def _embed_once(self, micro_batches: Sequence[Any], options: dict[str, Any]) -> Any:
        """Embed a single micro-batch once, with its graph, and back-propagate its loss."""
        z = self._embed(micro_batches[0], 0)
        return self._backward_of_loss(z, self._embed_teacher(micro_batches[0], 0, z.shape[1]), options)

    def _embed_twice(self, micro_batches: Sequence[Any], options: dict[str, Any]) -> Any:
        """Embed several micro-batches twice: without a graph for the loss, then with a graph for the gradient."""
        devices = {p.device for p in self.model.parameters() if p.device.type != "cpu"}
        parts, teacher_parts, random = [], [], []
        with torch.no_grad(), preserve_buffers(self.model):
            for m, batch in enumerate(micro_batches):
                random.append(_random_state(devices))
                parts.append(self._embed(batch, m))
                teacher_parts.append(self._embed_teacher(batch, m, parts[-1].shape[1]))
        sizes = [part.shape[1] for part in parts]
        z = _join(parts, "model").detach().requires_grad_()
        del parts
        y = None if self.teacher is None else _join(teacher_parts, "teacher")
        result = self._backward_of_loss(z, y, options)
        if z.grad is None:
            raise ValueError(f"{_OPERATION}: the criterion's loss does not depend on the embeddings")

        end = _random_state(devices)
        dz = z.grad.split(sizes, dim=1)
        for m, batch in enumerate(micro_batches):
            _set_random_state(random[m])
            with nullcontext() if m == len(micro_batches) - 1 else skip_gradient_exchange(self.model):
                z_m = self._embed(batch, m)
                if not z_m.requires_grad:
                    raise ValueError(f"{_OPERATION}: the model's output for micro-batch {m} has no graph")
                if z_m.shape != dz[m].shape:
                    got = f"{tuple(dz[m].shape)}, then {tuple(z_m.shape)}"
                    raise ValueError(f"{_OPERATION}: two passes over micro-batch {m} gave embeddings of shape {got}")
                with torch.autocast(z_m.device.type, enabled=False):
                    z_m.backward(dz[m])
        _set_random_state(end)
        return result

    def _embed(self, batch: Any, m: int) -> Tensor:
        return _check_views(self.model(batch), "model", m, views=self.views)

    def _embed_teacher(self, batch: Any, m: int, b: int) -> Tensor | None:
        if self.teacher is None:
            return None
        with torch.no_grad():
            return _check_views(self.teacher(batch), "teacher", m, b=b)

    def _backward_of_loss(self, z: Tensor, y: Tensor | None, options: dict[str, Any]) -> Any:
        """Back-propagate the loss, scaled if there is a scaler, into z and the criterion's own parameters."""
        result = self.criterion(z, **options) if y is None else self.criterion(z, y, **options)
        loss = result[0] if isinstance(result, tuple) else result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"{_OPERATION}: the criterion must return one number, or a tuple with it first; got {got}")
        if not loss.requires_grad:
            raise ValueError(f"{_OPERATION}: the criterion's loss has no graph: nothing to propagate to the model")
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        # Autocast would round products of the backward pass whose forward product was in float32.
        with torch.autocast(z.device.type, enabled=False):
            scaled.backward()
        if not isinstance(result, tuple):
            return loss.detach()
        return tuple(part.detach() if isinstance(part, Tensor) else part for part in result)


def _check_views(out: Any, role: str, m: int, views: int | None = None, b: int | None = None) -> Tensor:
    """Check an output (V, b, D) or (V*b, D) against the known `views` and `b`, and return it as (V, b, D)."""
    if not isinstance(out, Tensor) or out.ndim not in (2, 3) or out.numel() == 0:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{_OPERATION}: the {role} must return (V, b, D) or (V*b, D), got {got}, micro-batch {m}")
    returned = f"{_OPERATION}: the {role} returned shape {tuple(out.shape)} for micro-batch {m}"
    if out.ndim == 2:
        known = views or b
        if known is None:
            raise ValueError(f"{returned}, so views must be given")
        if len(out) % known:
            raise ValueError(f"{returned}: {len(out)} rows, not a multiple of {known} {'views' if views else 'images'}")
        out = out.unflatten(0, (views or -1, b or -1))
    if views not in (None, out.shape[0]) or b not in (None, out.shape[1]):
        raise ValueError(f"{returned}, but it has {f'views={views}' if views else f'{b} images'}")
    return out


def _join(parts: list[Any], role: str) -> Tensor:
    """Concatenate the embeddings (V, b, D) of all micro-batches into (V, B, D)."""
    first = parts[0]
    for m, part in enumerate(parts):
        if (part.shape[0], part.shape[2], part.dtype) != (first.shape[0], first.shape[2], first.dtype):
            raise ValueError(
                f"{_OPERATION}: micro-batches must agree in views, features and dtype; the {role} returned "
                f"{tuple(first.shape)} {first.dtype} for micro-batch 0, {tuple(part.shape)} {part.dtype} for {m}"
            )
    return torch.cat(parts, dim=1)


def _random_state(devices: set[torch.device]) -> list[tuple[torch.device, Tensor]]:
    state = [(torch.device("cpu"), torch.get_rng_state())]
    return state + [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]


def _set_random_state(state: list[tuple[torch.device, Tensor]]) -> None:
    for device, value in state:
        module = torch if device.type == "cpu" else torch.get_device_module(device)
        module.set_rng_state(value, *([] if device.type == "cpu" else [device]))
