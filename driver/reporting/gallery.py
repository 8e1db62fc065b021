"""Pictures for a run's report: views as the network sees them, nearest neighbours of some images, a 2-D projection."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.images import Images
from ..evaluation.online import Embed, pixels

SHOWN = 8
"""Images whose views, and queries whose neighbours, are shown."""
NEIGHBOURS = 7
GALLERY_LIMIT = 4096
PROJECTED_LIMIT = 800
THUMBNAIL = 96
"""Largest side of a picture in the report, pixels."""


@dataclass(frozen=True)
class Picture:
    """A thumbnail as a data URI, and whether it is of its query's class (None: no classes, or no query)."""

    uri: str
    right: bool | None = None


@dataclass(frozen=True)
class Projection:
    """(n, 2) points, the two first principal components of unit features, and labels (n,)."""

    points: NDArray[np.float64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Gallery:
    """`views` has a list of pictures per image; `neighbours` has a query and then its nearest, best first."""

    views: list[list[Picture]]
    neighbours: list[list[Picture]]
    pixels: Projection
    features: Projection


@dataclass(frozen=True)
class Shelf:
    """Images of one part of the data, embedded: features (n, D), raw pixels (n, P), thumbnails and labels."""

    features: Tensor
    pixels: Tensor
    thumbnails: list[Tensor]
    labels: Tensor


@torch.no_grad()
def gallery(embed: Embed, images: Images, epoch: int, batch_size: int) -> Gallery:
    """Of this rank's share of the images, at most 4096 of them; no other rank takes part.

    Without held-out images, the queries are training images, among the others.
    """
    bank = shelf(embed, images.bank(), GALLERY_LIMIT)
    queries = shelf(embed, images.held_out(), PROJECTED_LIMIT) if images.tested else bank
    return Gallery(
        views=sample_views(images, epoch, batch_size),
        neighbours=neighbours(queries, bank, with_classes=images.tested > 0),
        pixels=project(queries.pixels[:PROJECTED_LIMIT], queries.labels),
        features=project(queries.features[:PROJECTED_LIMIT], queries.labels),
    )


def shelf(embed: Embed, batches, limit: int) -> Shelf:
    """The first `limit` images of (images, labels) batches."""
    features, raw, thumbnails, labels, count = [], [], [], [], 0
    for batch, batch_labels in batches:
        batch, batch_labels = batch[: limit - count], batch_labels[: limit - count]
        features.append(embed(batch).float().cpu())
        raw.append(pixels(batch).float().cpu())
        thumbnails += thumbnail(batch).cpu().unbind()
        labels.append(batch_labels.cpu())
        count += len(batch)
        if count >= limit:
            break
    return Shelf(torch.cat(features), torch.cat(raw), thumbnails, torch.cat(labels))


def neighbours(queries: Shelf, bank: Shelf, with_classes: bool) -> list[list[Picture]]:
    """Queries are spread over the shelf, which may be sorted by class. An image is not its own neighbour."""
    chosen = torch.linspace(0, len(queries.labels) - 1, min(SHOWN, len(queries.labels))).round().long().unique()
    cosine = F.normalize(queries.features[chosen], dim=1) @ F.normalize(bank.features, dim=1).T
    if queries is bank:
        cosine.scatter_(1, chosen[:, None], -torch.inf)
    rows = []
    for query, near in zip(
        chosen.tolist(), cosine.topk(min(NEIGHBOURS, cosine.shape[1] - 1)).indices.tolist(), strict=True
    ):
        row = [Picture(data_uri(queries.thumbnails[query]))]
        for i in near:
            right = bool(bank.labels[i] == queries.labels[query]) if with_classes else None
            row.append(Picture(data_uri(bank.thumbnails[i]), right))
        rows.append(row)
    return rows


def project(features: Tensor, labels: Tensor) -> Projection:
    """Principal components, each with its longer tail on the right: their signs are arbitrary otherwise."""
    from sklearn.decomposition import PCA

    unit = F.normalize(features, dim=1).double().numpy()
    points = PCA(n_components=min(2, *unit.shape), svd_solver="full").fit_transform(unit)
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    skew = np.where((points**3).sum(0) < 0, -1, 1)
    return Projection(points * skew, labels[: len(points)].numpy())


def sample_views(images: Images, epoch: int, batch_size: int) -> list[list[Picture]]:
    """The views of the first images of an epoch, as they go into the network."""
    crops = next(iter(images.views(epoch)))[0]
    rows: list[list[Picture]] = [[] for _ in range(SHOWN)]
    for of_size in crops:
        for view in of_size.cpu().unflatten(0, (-1, batch_size)):
            for row, image in zip(rows, thumbnail(view[:SHOWN]), strict=False):
                row.append(Picture(data_uri(image)))
    return [row for row in rows if row]


def thumbnail(images: Tensor) -> Tensor:
    """(n, C, s, s) bytes, with s at most THUMBNAIL."""
    if images.shape[-1] > THUMBNAIL:
        images = F.interpolate(images.float(), size=(THUMBNAIL, THUMBNAIL), mode="area")
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)


def data_uri(image: Tensor) -> str:
    """(C, s, s) bytes as a PNG, or a JPEG where it is larger than 48 pixels and in colour."""
    array = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    kind = "JPEG" if picture.mode == "RGB" and picture.width > 48 else "PNG"
    data = io.BytesIO()
    picture.save(data, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
