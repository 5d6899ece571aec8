"""Attention over keys that lie in several places, merged by the gate's log-sum-exp as if they had
been in one.

Every past block has to lie wholly in one part; the own block's text comes with the last part.
"""

import itertools

import torch

from landmark import landmark_attention

BLOCK_SIZE = 64
BLOCKS = 30
HEADS = 4
QUERIES = 20
DIM = 32


def main() -> None:
    """Cuts the keys in three parts and merges what each gives."""
    torch.manual_seed(0)
    keys = BLOCKS * BLOCK_SIZE + QUERIES
    query = torch.randn(1, HEADS, QUERIES, DIM, dtype=torch.float64)
    key, value = torch.randn(2, 1, HEADS, keys, DIM, dtype=torch.float64)
    whole = landmark_attention(query, key, value, block_size=BLOCK_SIZE)

    borders = [0, 10 * BLOCK_SIZE, 24 * BLOCK_SIZE, keys]
    outputs = []
    weights = []
    for begin, end in itertools.pairwise(borders):
        output, lse = landmark_attention(
            query,
            key[:, :, begin:end],
            value[:, :, begin:end],
            block_size=BLOCK_SIZE,
            query_start=keys
            - QUERIES
            - begin,  # behind the keys of the first parts: these are all past blocks
            return_lse=True,
        )
        outputs.append(output)
        weights.append(lse)
    share = torch.stack(weights).softmax(dim=0)[..., None]
    merged = (torch.stack(outputs) * share).sum(dim=0)
    print(
        f"largest difference between parts merged and the whole: {(merged - whole).abs().max():.1e}"
    )


if __name__ == "__main__":
    main()
