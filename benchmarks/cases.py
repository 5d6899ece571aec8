"""Cases on which the operation is measured: named shapes, and tensors of these shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Topics that a structured query mixes, and number of queries after which all topics have changed.
TOPICS = 12
CHANGE = 256


PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
PEERS = {"cudnn": "cuDNN", "flash": "flash", "flex": "flex", "landmark": "landmark"}


class Case(NamedTuple):
    """Shape of one call, whose queries are the last of its keys.

    Attributes:
        name: name of the case.
        rows: B.
        heads: H, query heads.
        groups: G, key/value heads.
        queries: T.
        keys: S.
        dim: D.
        block_size: slots of a block, landmark included.
        top_k: as for ``landmark_attention``.
        tensors: kind of tensors, one of ``MAKERS``.
    """

    name: str
    rows: int
    heads: int
    groups: int
    queries: int
    keys: int
    dim: int
    block_size: int = 64
    top_k: int | None = None
    tensors: str = "normal"

    def pairs(self) -> int:
        """Returns the pairs of a query and a key up to it, in one row and head."""
        return self.queries * self.keys - self.queries * (self.queries - 1) // 2

    def flops(self, backward: bool = False) -> int:
        """Returns the operations of dense causal attention, by which all peers are counted.

        Of the forward pass, or of both passes. Two products for each pair forward, five backward; a
        product is ``2 * dim`` operations.
        """
        return (7 if backward else 2) * 2 * self.rows * self.heads * self.dim * self.pairs()


DENSE = (
    *(
        Case(f"dense-{keys}", rows, 16, 16, keys, keys, 128)
        for keys, rows in ((2048, 8), (4096, 4), (8192, 2), (16384, 1), (32768, 1), (65536, 1))
    ),
    Case("dense-4096-dim64", 8, 16, 16, 4096, 4096, 64),
)
GROUPED = tuple(
    Case(f"grouped-{keys}", rows, 32, 8, keys, keys, 128)
    for keys, rows in ((2048, 4), (8192, 1), (32768, 1))
)
OFFSET = (
    Case("offset-65536", 1, 16, 16, 4096, 65536, 128),
    Case("offset-65536-grouped", 1, 32, 8, 4096, 65536, 128),
)
TOP_K = (
    *(
        Case(f"top8-{n}", 1, 16, 16, n, n, 128, top_k=8, tensors="structured")
        for n in (32768, 65536)
    ),
    *(
        Case(f"top8-{n}-recorded", 1, 6, 6, n, n, 64, top_k=8, tensors="recorded")
        for n in (32768, 65536)
    ),
)
CASES = {case.name: case for case in (*DENSE, *GROUPED, *OFFSET, *TOP_K)}


def normal(case: Case, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random query (B, H, T, D), key and value (B, G, S, D) in bfloat16.

    They are laid out in memory as transformers hands them.
    """
    noise = torch.Generator(device).manual_seed(seed)
    shapes = ((case.heads, case.queries), (case.groups, case.keys), (case.groups, case.keys))
    query, key, value = (
        torch.randn(
            case.rows, length, heads, case.dim, generator=noise, device=device, dtype=torch.bfloat16
        )
        for heads, length in shapes
    )
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def structured(case: Case, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tensors as ``normal`` in which adjacent queries select about the same blocks.

    Distant queries select others. Each block has a topic, a random vector: its landmark key is the
    topic, its other keys are the topic and noise. A query is a mixture of the topics of blocks
    before it, which changes slowly, and some noise. Neighbours share about 7.5 of 8 blocks, and 64
    of them select about 12 in all: what a model selects may agree less.
    """
    noise = torch.Generator(device).manual_seed(seed)
    size = case.block_size
    rows = case.rows
    heads = case.heads
    topics = torch.randn(
        rows, case.groups, -(-case.keys // size), case.dim, generator=noise, device=device
    )
    key = topics.repeat_interleave(size, dim=2)[:, :, : case.keys]
    strength = torch.full((case.keys, 1), 0.5, device=device)
    strength[size - 1 :: size] = 0.0
    key = key + strength * torch.randn(key.shape, generator=noise, device=device)
    value = torch.randn(key.shape, generator=noise, device=device)

    steps = torch.arange(case.queries // CHANGE + 2, device=device)
    before = ((case.keys - case.queries + steps * CHANGE) // size).clamp(1, topics.shape[2])
    drawn = torch.rand(rows, heads, len(steps), TOPICS, generator=noise, device=device)
    place = (drawn * before[:, None]).long().flatten(2)[..., None].expand(-1, -1, -1, case.dim)
    picked = topics.repeat_interleave(heads // case.groups, dim=1).gather(2, place)
    mixtures = torch.unflatten(picked, 2, (len(steps), TOPICS)).sum(dim=3) / TOPICS**0.5

    step = torch.arange(case.queries, device=device) / CHANGE
    low = step.long()
    share = step.frac()[:, None]
    query = (1 - share) * mixtures[:, :, low] + share * mixtures[:, :, low + 1]
    query = query / ((1 - share) ** 2 + share**2).sqrt()  # components of variance 1 all the way
    query = query + 0.1 * torch.randn(query.shape, generator=noise, device=device)
    query, key, value = (
        each.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key, value)
    )
    return query, key, value


def recorded(case: Case, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values of a middle layer of the bundled model.

    It reads Python's language reference. As the memory scores them: keys rotated by their offset in
    the block, queries by theirs and the distance to the slot where old landmarks are scored.
    ``seed`` says where in the text it begins.
    """
    from landmark.blocks import tokens_for
    from landmark.eval.fillers import load_filler
    from landmark.hf.attention import CachedPass
    from landmark.texts.loading import load

    subject = load(None, device)
    taken = []
    tokens = load_filler("pydoc", subject.tokenizer).take(
        1000 * seed, tokens_for(case.keys, case.block_size)
    )
    attend = CachedPass.attend

    def record(
        self: CachedPass, module: torch.nn.Module, *tensors: Tensor, **more: float
    ) -> Tensor:
        if module.layer_idx == subject.model.config.num_hidden_layers // 2:
            taken.append(tensors[:3])
        return attend(self, module, *tensors, **more)

    CachedPass.attend = record  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            subject.model.read(tokens[None].to(device))
    finally:
        CachedPass.attend = attend  # type: ignore[method-assign]
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*taken, strict=True))
    settings = subject.model.landmark
    rotary = next(iter(subject.model.base_model._rotaries.values()))
    offset = torch.arange(case.keys, device=device) % case.block_size
    distance = (settings.top_k + 1 + settings.local_blocks) * case.block_size
    key = rotary.rotation(offset, key.dtype).rotate(key)
    query = rotary.rotation(offset + distance, query.dtype).rotate(query)[:, :, -case.queries :]
    query, key, value = (
        each.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key, value)
    )
    return query, key, value


MAKERS = {"normal": normal, "structured": structured, "recorded": recorded}
