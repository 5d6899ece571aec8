"""What becomes of a memory when a call with it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from landmark.hf.cache import LandmarkCache


@contextmanager
def kept_on_failure(cache: LandmarkCache) -> Iterator[None]:
    """Around a call: when it is refused, or fails before it has read anything, the memory is as it
    was.

    But what a mask has hidden stays hidden where some layers have read new text in its place.
    """
    columns = cache._columns.copy()
    hidden = cache._hidden
    rewound = cache.rewound
    try:
        yield
    except BaseException:
        if cache._columns.changes == columns.changes:
            repeats = cache._rows // max(1, len(columns.tokens))
            if columns.tokens and repeats > 1:
                cache._select_rows(torch.arange(0, cache._rows, repeats))
            cache._columns = columns
            cache._hidden = hidden
            cache.rewound = rewound
        raise
