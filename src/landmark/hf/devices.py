"""What the devices of a data-parallel training tell each other in one pass.

Each has rows of its own; where they are wanted together, they are gathered. Without processes of
``torch.distributed`` there is one device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def device_count() -> int:
    """Returns the number of devices that train together."""
    is_running = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_running else 1


def device_number() -> int:
    """Returns the number of this device among them, from 0 on."""
    return distributed.get_rank() if device_count() > 1 else 0


def gather_counts(*counts: int, device: torch.device) -> list[list[int]]:
    """Returns the counts of each device, in their order.

    Args:
        *counts: those of this device, equally many on each.
        device: the device.
    """
    if device_count() == 1:
        return [list(counts)]
    found: list[list[int]] = gather_rows(torch.tensor([counts], device=device)).tolist()
    return found


def gather_rows(rows: Tensor) -> Tensor:
    """Returns the rows of all devices, in their order.

    The gradient of a row is the sum of those that it gets on each device. So gradients that are
    then averaged over devices are those of the mean of all devices' losses.

    Args:
        rows: ``(B, ...)``, of the same shape on each device.

    Returns:
        ``(devices * B, ...)``.
    """
    if device_count() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows.contiguous())  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Gathers rows, and sums up their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(device_count())]
        distributed.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Not reduce_scatter, which gloo has in new versions of torch only.
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.chunk(device_count())[device_number()]
