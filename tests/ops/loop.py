"""Landmark attention written from the definition, as a loop in float64.

The loop runs over rows, heads and queries. It uses nothing of the package. Blocks are lists of
slots; gradients come from autograd through short vectors.
"""

import math

import torch


def blocks_of_row(length, block_size, start=0, segments=None, landmarks=None):
    """Documents of a row as lists of blocks.

    A block is ``(text slots, landmark slot or None)``.
    """
    documents = []
    previous = None
    for slot in range(start, length):
        identity = None if segments is None else segments[slot]
        if slot == start or identity != previous:
            documents.append([([], None)])
            origin = slot
        previous = identity
        blocks = documents[-1]
        if blocks[-1][1] is not None:
            blocks.append(([], None))
        is_landmark = (
            (slot - origin) % block_size == block_size - 1 if landmarks is None else landmarks[slot]
        )
        if is_landmark:
            blocks[-1] = (blocks[-1][0], slot)
        else:
            blocks[-1][0].append(slot)
    return documents


def place_of_query(slot, documents, length, block_size, start, irregular):
    """The document of a query and the index of its own block there; ``None`` for padding."""
    if slot < start:
        return None
    for document in documents:
        for index, (text, landmark) in enumerate(document):
            if slot in text or slot == landmark:
                return document, index
    assert slot >= length
    if not documents:
        return [], 0
    document = documents[-1]
    if not irregular:
        return document, (slot - start) // block_size
    return document, len(document) - (document[-1][1] is None)


def loop_attention(
    query,
    key,
    value,
    *,
    block_size,
    scale=None,
    top_k=None,
    query_start=None,
    starts=None,
    segments=None,
    landmarks=None,
    forced=None,
):
    """Output (B, H, T, D) and log-sum-exp (B, H, T)."""
    query = query.double()
    key = key.double()
    value = value.double()
    (rows, heads, queries, dim) = query.shape
    (_, groups, length, _) = key.shape
    scale = dim**-0.5 if scale is None else scale
    query_start = length - queries if query_start is None else query_start
    outputs = []
    sums = []
    for row in range(rows):
        start = 0 if starts is None else int(starts[row])
        row_segments = None if segments is None else segments[row].tolist()
        row_landmarks = None if landmarks is None else landmarks[row].tolist()
        documents = blocks_of_row(length, block_size, start, row_segments, row_landmarks)
        for head in range(heads):
            keys = key[row, head * groups // heads]
            values = value[row, head * groups // heads]
            for index in range(queries):
                slot = query_start + index
                place = place_of_query(
                    slot, documents, length, block_size, start, landmarks is not None
                )
                scores = scale * (keys @ query[row, head, index])
                wanted = [] if forced is None else forced[row, index].tolist()
                out, lse = attend(slot, place, scores, values, top_k, wanted)
                outputs.append(out)
                sums.append(lse)
    return torch.stack(outputs).view(rows, heads, queries, dim), torch.stack(sums).view(
        rows, heads, queries
    )


def attend(slot, place, scores, values, top_k, forced=()):
    """One query: a gate softmax over landmarks and own text, one softmax within each past block."""
    nothing = (scores.sum() * 0 + values.sum(0) * 0, scores.sum() * 0 - math.inf)
    if place is None:
        return nothing
    document, own = place
    own_text = [each for each in document[own][0] if each <= slot] if own < len(document) else []
    past = {
        number: (text, landmark)
        for number, (text, landmark) in enumerate(document[:own])
        if landmark is not None and text
    }
    kept = list(past)
    if top_k is not None:
        others = [number for number in past if number not in forced]
        others.sort(key=lambda number: (-scores[past[number][1]].item(), number))
        kept = sorted(([number for number in past if number in forced] + others)[:top_k])
    past = [past[number] for number in kept]
    if not past and not own_text:
        return nothing
    logits = scores[[landmark for _, landmark in past] + own_text]
    gate = torch.softmax(logits, 0)
    out = gate[len(past) :] @ values[own_text] if own_text else values.sum(0) * 0
    for weight, (text, _) in zip(gate, past, strict=False):
        out = out + weight * (torch.softmax(scores[text], 0) @ values[text])
    return out, torch.logsumexp(logits, 0)
