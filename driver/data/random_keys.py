"""Random numbers that belong to a key, not to a moment: the same on any rank, device, worker, and after any resume.

A key is made of (seed, epoch, image, view); its numbers are those of SplitMix64 (Steele et al., OOPSLA 2014), which
hashes key + counter.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15


def seed_of(*parts: int) -> int:
    """One seed from several numbers: run, epoch, image, view."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed


def keys_of(seed: int, epoch: int, images: Tensor, views: range) -> Tensor:
    """(V*n,) int64, row v*n + i of view views[v] of images[i] (n,): `seed_of(seed, epoch, image, view)`."""
    base = (seed_of(seed, epoch) * 1_000_003 % 2**63 + images + 1) & _LOW_63
    return torch.cat([(base * 1_000_003 + view + 1) & _LOW_63 for view in views])


def uniform(keys: Tensor, count: int) -> Tensor:
    """(n, count) float32, uniform in (0, 1), on the device of keys (n,) int64."""
    counters = torch.arange(1, count + 1, device=keys.device) * _signed(GOLDEN)
    x = keys[:, None] + counters
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    return (_shifted(x, 41).float() + 0.5) / 2**23


def normal(keys: Tensor, count: int) -> Tensor:
    """(n, count) float32, standard normal; not independent of `uniform` of the same keys."""
    return torch.erfinv(uniform(keys, count) * 2 - 1) * 2**0.5


_LOW_63 = 2**63 - 1


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64 has only the arithmetic one."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
