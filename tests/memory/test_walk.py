"""How far one decode step walks through the files of the memory."""

import sys
from collections import Counter
from pathlib import Path

import torch

from landmark import LandmarkConfig
from landmark.memory import layer
from landmark.memory.geometry import make_geometry
from landmark.memory.layer import LayerMemory
from landmark.memory.rotary_tables import RotaryTables
from landmark.memory.storage.tiers import OffloadConfig
from landmark.rotary import Rotary

BLOCK = 4
DIM = 8
HEADS = 2
FOLDER = Path(layer.__file__).parent
MOST = 87 // 2  # before the memory was cut into rooms, the same step changed file 87 times


class Walk:
    """While open, notes each file of the memory that execution enters, by a call or a return."""

    def __init__(self) -> None:
        self.stays: list[str] = []
        self.open: list[str] = []

    def __enter__(self) -> "Walk":
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_) -> None:
        sys.setprofile(None)

    def note(self, frame, event, _) -> None:
        path = Path(frame.f_code.co_filename)
        if FOLDER not in path.parents:
            return
        if event == "call":
            self.open.append(str(path.relative_to(FOLDER)))
        elif event == "return" and self.open:
            self.open.pop()
        if self.open and (not self.stays or self.stays[-1] != self.open[-1]):
            self.stays.append(self.open[-1])


def attend(memory, start, tokens):
    """One call on random queries, keys and values."""
    query = torch.randn(1, 2 * HEADS, tokens, DIM)
    key, value = torch.randn(2, 1, HEADS, tokens, DIM)
    geometry = make_geometry([start], [tokens], memory.config)
    memory.attend(query, key, value, geometry, scale=0.3, retrieve=True, record=False)


def test_a_decode_step_stays_in_few_files():
    """Eager, on tier host, in the middle of a block, with blocks to be fetched."""
    torch.manual_seed(0)
    config = LandmarkConfig(block_size=BLOCK, top_k=2, local_blocks=1)
    rotary = Rotary(torch.linspace(0.01, 1, DIM).double(), torch.ones(DIM).double(), False)
    budget = OffloadConfig("host", device_bytes=8 * 2 * HEADS * BLOCK * DIM * 4)
    memory = LayerMemory(config, RotaryTables(rotary, BLOCK), 1, budget)
    attend(memory, 0, 81)
    attend(memory, 81, 1)
    before = memory.store.stats.misses
    with Walk() as walk:
        attend(memory, 82, 1)
    entered = Counter(walk.stays)
    assert memory.store.stats.misses > before, "a step that has to fetch"
    assert len(walk.stays) <= MOST, walk.stays
    assert max(entered.values()) <= 4, entered
