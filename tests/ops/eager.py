"""Landmark attention in plain PyTorch, to judge a kernel's error by.

Every step is rounded to the dtype of the inputs. It takes one document at a time, in whole blocks.
It shares the loop's geometry and nothing with the package. Blocks are selected by scores in
float64: what a rounding does to a selection is no matter of tolerance.
"""

import torch
import torch.nn.functional as F

from ops.loop import blocks_of_row

NEVER = -3e4  # fits float16


def eager_attention(
    query,
    key,
    value,
    *,
    block_size,
    scale=None,
    query_start=None,
    starts=None,
    segments=None,
    top_k=None,
    forced=None,
):
    """Output (B, H, T, D) and log-sum-exp (B, H, T)."""
    (rows, heads, queries, dim) = query.shape
    (_, groups, length, _) = key.shape
    scale = dim**-0.5 if scale is None else scale
    query_start = length - queries if query_start is None else query_start
    key, value = (each.repeat_interleave(heads // groups, dim=1) for each in (key, value))
    outs = []
    sums = []
    for row in range(rows):
        start = 0 if starts is None else int(starts[row])
        row_segments = None if segments is None else segments[row].tolist()
        documents = blocks_of_row(length, block_size, start, row_segments)
        unseen = (
            key[row].sum() + value[row].sum()
        ) * 0  # a gradient of zeros where nothing is seen
        out = query[row] * 0 + unseen
        lse = query[row, ..., 0] * 0 + unseen - torch.inf
        for number, document in enumerate(documents):
            first = document[0][0][0]
            end = (
                length + query_start + queries
                if number == len(documents) - 1
                else documents[number + 1][0][0][0]
            )
            low = max(first - query_start, 0)
            high = min(end - query_start, queries)
            if low < high:
                part = slice(first, min(end, length))
                slots = torch.arange(low, high, device=query.device) + query_start - first
                each = one_document(
                    query[row, :, low:high],
                    key[row, :, part],
                    value[row, :, part],
                    slots,
                    block_size,
                    scale,
                    top_k,
                    None if forced is None else forced[row, low:high],
                )
                out = torch.cat([out[:, :low], each[0], out[:, high:]], dim=1)
                lse = torch.cat([lse[:, :low], each[1], lse[:, high:]], dim=1)
        outs.append(out)
        sums.append(lse)
    return torch.stack(outs), torch.stack(sums)


def one_document(query, key, value, slots, block_size, scale, top_k, forced=None):
    """Queries (H, T, D) at ``slots`` (T,) against a document's keys (H, S, D)."""
    length = key.shape[1]
    blocks = -(-length // block_size)
    key, value = (F.pad(each, (0, 0, 0, blocks * block_size - length)) for each in (key, value))
    scores = (scale * (query @ key.transpose(-1, -2))).unflatten(-1, (blocks, block_size))
    place = torch.arange(blocks * block_size, device=query.device).view(blocks, block_size)
    number = torch.arange(blocks, device=query.device)
    own = (slots // block_size)[:, None]
    text = (
        (place % block_size != block_size - 1) & (place < length) & (place <= slots[:, None, None])
    )
    inner = scores.masked_fill(~text, NEVER)
    sums = inner.logsumexp(-1)
    past = (number < own) & (number < length // block_size)
    if top_k is not None:
        landmarks = scale * (query.double() @ key.double()[:, block_size - 1 :: block_size].mT)
        if forced is not None:
            wanted = (forced[:, :, None] == number).any(1) & past
            landmarks = landmarks.masked_fill(wanted, torch.inf)
        past = kept(landmarks, past, top_k)
    seen = past | ((number == own) & text.any(-1))
    gate = torch.where(past, scores[..., -1], sums).masked_fill(~seen, NEVER)
    anything = seen.any(-1)
    weights = torch.softmax(inner, -1) * (torch.softmax(gate, -1) * anything[..., None])[..., None]
    lse = torch.where(anything, gate.logsumexp(-1), -torch.inf)
    return weights.flatten(-2) @ value, lse


def kept(scores, past, top_k):
    """Whether past blocks (H, T, N) are among the ``top_k`` of highest score.

    Of equal scores the lower block wins.
    """
    order = (
        scores.detach()
        .masked_fill(~past, -torch.inf)
        .sort(dim=-1, descending=True, stable=True)
        .indices
    )
    rank = order.argsort(dim=-1)
    return past & (rank < top_k)


def smallest_gap(query, key, options):
    """Least distance of two different landmark scores of a query, over the spread of all scores.

    Landmarks of all documents of a row are compared with all its queries.
    """
    size = options["block_size"]
    groups = key.shape[1]
    starts = options.get("starts", torch.zeros(1, dtype=torch.long)).tolist() * len(query)
    segments = options.get("segments")
    gaps = [1.0]
    for row, start in zip(range(len(query)), starts, strict=False):
        row_segments = None if segments is None else segments[row].tolist()
        documents = blocks_of_row(key.shape[2], size, start, row_segments)
        landmarks = [slot for document in documents for _, slot in document if slot is not None]
        landmark_keys = (
            key[row, :, landmarks].double().repeat_interleave(query.shape[1] // groups, dim=0)
        )
        scores = (query[row].double() @ landmark_keys.mT).sort(dim=-1).values
        gap = scores.diff(dim=-1)
        gap = gap[gap > 0]
        gaps += [gap.min().item() / scores.abs().max().item()] if gap.numel() else []
    return min(gaps)
