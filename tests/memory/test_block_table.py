"""The block table alone: which block is where, as the window moves on."""

import torch

from landmark.memory.storage.block_table import BlockTable


def test_blocks_leave_the_window():
    """Block 0 stays; every other block is there until another one takes its place."""
    table = BlockTable(2, 1, 4, torch.device("cpu"))
    table.resize_window(3, torch.tensor([0, 0]))
    rows = torch.tensor([[0], [1]])
    for last in range(1, 8):
        table.place_in_window(torch.tensor([[last], [last + 1]]))
        for block in range(-1, 10):
            found = table.is_in_window(rows, torch.full((2, 1), block)).flatten().tolist()
            expected = [
                block <= 0 or max(first, end - 2) <= block <= end
                for first, end in ((1, last), (2, last + 1))
            ]
            assert found == expected, (last, block)
        blocks = torch.arange(max(1, last - 2), last + 1)
        assert table.window_index(blocks).tolist() == [1 + block % 3 for block in blocks.tolist()]
    table.check_integrity()
