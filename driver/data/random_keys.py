"""Random numbers that follow from a key alone: equal on every rank, device and worker, and after a resume.

A key is made of (seed, epoch, place of the image, view). SplitMix64 (Steele et al., OOPSLA 2014) hashes key + counter.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15


def seed_of(*parts: int) -> int:
    """One seed from several numbers, such as a run's seed, an epoch, an image's place and a view."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed


def keys_of(seed: int, epoch: int, places: Tensor, views: range) -> Tensor:
    """(V*n,) int64 keys of V views of the images at places (n,): row v*n + i is the key of view views[v] of image i.

    Each key is `seed_of(seed, epoch, place, view)`, computed on the device.
    """
    base = (seed_of(seed, epoch) * 1_000_003 % 2**63 + places + 1) & _LOW_63
    return torch.cat([(base * 1_000_003 + view + 1) & _LOW_63 for view in views])


def uniform(keys: Tensor, count: int) -> Tensor:
    """(n, count) float32 numbers, uniform in (0, 1), on the device of keys (n,) int64."""
    counters = torch.arange(1, count + 1, device=keys.device) * _signed(GOLDEN)
    x = keys[:, None] + counters
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    return (_shifted(x, 41).float() + 0.5) / 2**23


def normal(keys: Tensor, count: int) -> Tensor:
    """(n, count) float32 numbers, standard normal; not independent of `uniform` at equal keys."""
    return torch.erfinv(uniform(keys, count) * 2 - 1) * 2**0.5


_LOW_63 = 2**63 - 1


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; int64 has only the arithmetic shift."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
