"""Gallery of a run: augmented views as the network sees them, nearest neighbours, projections of features to 2-D."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.images import Images, floats
from ..evaluation.online import Embed, pixels

SHOWN = 8
"""Number of images shown with their views, and of images shown with their nearest neighbours."""
NEIGHBOURS = 7
BANK_LIMIT = 4096
"""Largest number of training images among which neighbours are searched."""
QUERY_LIMIT = 800
"""Largest number of held-out images that are embedded, and of images that are projected."""
THUMBNAIL = 96
"""Largest side of a picture, pixels."""


@dataclass(frozen=True)
class Picture:
    """A thumbnail as a data URI. `right`: whether a neighbour has its query's class, None for all other pictures."""

    uri: str
    right: bool | None = None


@dataclass(frozen=True)
class Projection:
    """Two principal components of n normalised feature vectors: points (n, 2), labels (n,)."""

    points: NDArray[np.float64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Gallery:
    """All pictures and projections of a report.

    Each list in `views` has the views of one image; each list in `neighbours` a query, then its neighbours, nearest
    first.
    """

    views: list[list[Picture]]
    neighbours: list[list[Picture]]
    pixels: Projection
    features: Projection

    @property
    def with_classes(self) -> bool:
        """Whether neighbours are marked as being of their query's class or not."""
        return any(picture.right is not None for row in self.neighbours for picture in row)


@dataclass(frozen=True)
class EmbeddedImages:
    """n images with their features (n, D), pixels as features (n, P), thumbnails (C, s, s) and labels (n,)."""

    features: Tensor
    pixels: Tensor
    thumbnails: list[Tensor]
    labels: Tensor


@torch.no_grad()
def gallery(embed: Embed, images: Images, epoch: int, batch_size: int) -> Gallery:
    """Gallery of this rank's share of the images; other ranks take no part.

    Queries and projected images are held-out images, or training images where none are held out.
    """
    bank = embed_images(embed, images.bank(), BANK_LIMIT)
    queries = embed_images(embed, images.held_out(), QUERY_LIMIT) if images.tested else bank
    return Gallery(
        views=sample_views(images, epoch, batch_size),
        neighbours=neighbours(queries, bank, with_classes=images.tested > 0),
        pixels=project(queries.pixels[:QUERY_LIMIT], queries.labels),
        features=project(queries.features[:QUERY_LIMIT], queries.labels),
    )


def embed_images(embed: Embed, batches: Iterable[tuple[Tensor, Tensor]], limit: int) -> EmbeddedImages:
    """Embed the first `limit` images of (images, labels) batches."""
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
    return EmbeddedImages(torch.cat(features), torch.cat(raw), thumbnails, torch.cat(labels))


def neighbours(queries: EmbeddedImages, bank: EmbeddedImages, with_classes: bool) -> list[list[Picture]]:
    """A list of pictures for each of at most `SHOWN` queries: the query, then its nearest images in the bank by cosine.

    The queries are evenly spaced indices, as images may be sorted by class. An image is not its own neighbour.
    """
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
    """Project normalised features onto two principal components, each with its longer tail on the positive side.

    The sign of a component is arbitrary; the rule makes pictures repeatable.
    """
    from sklearn.decomposition import PCA

    unit = F.normalize(features, dim=1).double().numpy()
    points = PCA(n_components=min(2, *unit.shape), svd_solver="full").fit_transform(unit)
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    skew = np.where((points**3).sum(0) < 0, -1, 1)
    return Projection(points * skew, labels[: len(points)].numpy())


def sample_views(images: Images, epoch: int, batch_size: int) -> list[list[Picture]]:
    """The augmented views of the first images of an epoch, one list for each image."""
    crops = next(iter(images.views(epoch)))[0]
    rows: list[list[Picture]] = [[] for _ in range(SHOWN)]
    for one_size in crops:
        for view in one_size.cpu().unflatten(0, (-1, batch_size)):
            for row, image in zip(rows, thumbnail(floats(view[:SHOWN])), strict=False):
                row.append(Picture(data_uri(image)))
    return [row for row in rows if row]


def thumbnail(images: Tensor) -> Tensor:
    """Images (n, C, S, S) in [0, 1] as bytes (n, C, s, s), s at most `THUMBNAIL`."""
    if images.shape[-1] > THUMBNAIL:
        images = F.interpolate(images.float(), size=(THUMBNAIL, THUMBNAIL), mode="area")
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)


def data_uri(image: Tensor) -> str:
    """Data URI of an image (C, s, s) of bytes: a JPEG for colour above 48 pixels, else a PNG."""
    array = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    kind = "JPEG" if picture.mode == "RGB" and picture.width > 48 else "PNG"
    data = io.BytesIO()
    picture.save(data, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
