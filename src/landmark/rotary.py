"""Rotary position embedding (RoPE) at any position, with angles computed in float64.

A rotation by ``a`` followed by one by ``b`` is the rotation by ``a + b``. Keys are therefore kept
rotated by their offset inside the block only, and a query is rotated by its distance to the
position that is assigned to a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of one layer type.

    At position ``p`` it is ``y = x * cos(p * f) + partner(x) * sign * sin(p * f)``.

    Attributes:
        frequencies: ``(R,)`` float64, radians per position of each rotated column, ``R <= D``.
            Columns from ``R`` on pass unchanged.
        signs: ``(R,)`` float64, +1 or -1.
        interleaved: whether column ``2i`` pairs with ``2i + 1``, or else ``i`` with ``i + R / 2``.
    """

    frequencies: Tensor
    signs: Tensor
    interleaved: bool

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Returns the rotation to ``positions`` (any shape, integers) for tensors of ``dtype``."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions.to(torch.float64)[..., None] * self.frequencies.to(positions.device)
        sin = angles.sin() * self.signs.to(positions.device)
        return Rotation(angles.cos().to(compute), sin.to(compute), self.interleaved)


@dataclass(frozen=True)
class Rotation:
    """A rotation to given positions.

    Attributes:
        cos: ``(*positions, R)``.
        sin: ``(*positions, R)``, multiplied by the signs.
        interleaved: as for ``Rotary``.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def __getitem__(self, index: Any) -> Rotation:
        """Returns the rotation to ``positions[index]``."""
        return Rotation(self.cos[index], self.sin[index], self.interleaved)

    def at(self, index: Tensor) -> Rotation:
        """Returns ``self[index]`` by a faster kernel.

        The positions must have one dimension; ``index`` may have any shape.
        """
        look_up = torch.nn.functional.embedding
        return Rotation(look_up(index, self.cos), look_up(index, self.sin), self.interleaved)

    def to(self, device: torch.device) -> Rotation:
        """Returns the rotation on ``device``."""
        return Rotation(self.cos.to(device), self.sin.to(device), self.interleaved)

    def rotate(self, x: Tensor) -> Tensor:
        """Returns ``x (..., D)`` rotated, computed in at least float32.

        The leading shape of ``x`` must broadcast with the positions.
        """
        rotated = self.cos.shape[-1]
        head = x[..., :rotated].to(self.cos.dtype)
        if self.interleaved:
            partner = torch.unflatten(head, -1, (-1, 2)).flip(-1).flatten(-2)
        else:
            first, second = head.chunk(2, dim=-1)
            partner = torch.cat((second, first), dim=-1)
        head = torch.addcmul(head * self.cos, partner, self.sin).to(x.dtype)
        if rotated == x.shape[-1]:
            return head
        rest = x[..., rotated:]
        return torch.cat((head, rest.expand(*head.shape[:-1], rest.shape[-1])), dim=-1)
