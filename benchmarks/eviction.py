"""Times one layer that appends a text without end and keeps its latest blocks (``max_blocks``).

    python benchmarks/eviction.py --blocks 100000 --tier host --out benchmarks/results/eviction.json

The layer is tiny, so that what is timed is the keeping of books: blocks of two slots, one head of
two dimensions. An extent holds one block (``--extent-bytes 1``), as where a block of all rows takes
4 MiB; with the usual 4 MiB these tiny blocks would share few extents. Each row of the result is the
mean time of a block over the last ``--window`` blocks: that of the process, so that what else runs
on the machine does not count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import record
import torch

from landmark import LandmarkConfig
from landmark.memory.geometry import make_geometry
from landmark.memory.storage import offload
from landmark.memory.storage.store import EVICTION_STEP, BlockStore
from landmark.memory.storage.tiers import TIERS, OffloadConfig
from landmark.versions import made_with

SIZE = 2
DIM = 2
MARKS = (0.1, 0.5, 1.0)  # of all blocks: where time is taken


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; replaced")
    parser.add_argument("--blocks", type=int, default=100_000, help="appended in all")
    parser.add_argument("--max-blocks", type=int, default=64, help="kept for retrieval")
    parser.add_argument("--tier", choices=TIERS, default="host")
    parser.add_argument(
        "--window", type=int, default=1_000, help="blocks that a time is the mean of"
    )
    parser.add_argument(
        "--extent-bytes",
        type=int,
        default=1,
        help="most bytes of an extent that holds several blocks",
    )
    options = parser.parse_args()
    offload.EXTENT_BYTES = options.extent_bytes
    torch.set_num_threads(1)
    made = {**made_with("cpu", "torch"), "threads": 1}
    rows = measure(options.tier, options.blocks, options.max_blocks, options.window)
    record.write(options.out, made, {"rows": rows})


def measure(tier: str, blocks: int, max_blocks: int, window: int) -> list[dict[str, Any]]:
    """Returns the time of a block after a tenth, a half and all of them."""
    config = LandmarkConfig(block_size=SIZE, local_blocks=1, max_blocks=max_blocks)
    store = BlockStore(SIZE, local_blocks=1, offload=OffloadConfig(tier))
    begin = 0
    rows = []
    for mark in MARKS:
        end = round(mark * blocks)
        begin = append(store, config, begin, max(begin, end - window))
        start = time.process_time()
        count = end - begin
        begin = append(store, config, begin, end)
        seconds = (time.process_time() - start) / max(1, count)
        rows.append(
            {
                "tier": tier,
                "max_blocks": max_blocks,
                "blocks": end,
                "microseconds": round(seconds * 1e6, 1),
            }
        )
        print(
            f"{end:,} blocks, tier {tier}: {rows[-1]['microseconds']:,.1f} microseconds a block",
            flush=True,
        )
    return rows


def append(store: BlockStore, config: LandmarkConfig, begin: int, end: int) -> int:
    """Appends the blocks ``begin..end - 1``, a step of the eviction at a time, and drops what no
    query will see.
    """
    for first in range(begin, end, EVICTION_STEP):
        count = min(EVICTION_STEP, end - first)
        geometry = make_geometry([first * SIZE], [count * SIZE], config)
        key = torch.full((1, 1, count * SIZE, DIM), float(first))
        store.begin_call(geometry, key)
        store.append(key, key, geometry, begun=True)
    return end


if __name__ == "__main__":
    main()
