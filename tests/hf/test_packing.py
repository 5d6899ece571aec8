"""Packed rows as transformers delivers them equal separate rows, in both modes, with loss and
gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

import models
from landmark import LandmarkConfig

pytestmark = pytest.mark.usefixtures("wide_norms")

LENGTHS = (11, 4, 1, 26)
MODES = {
    "all": LandmarkConfig(block_size=5, mode="all"),
    "retrieval": LandmarkConfig(block_size=5, top_k=2, local_blocks=1, chunk_tokens=9),
}
DELIVERED = {
    "position_ids": {},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "everything": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


def rows() -> list[torch.Tensor]:
    return [models.text(length, seed=length) for length in LENGTHS]


def delivered(options: dict[str, bool]) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(return_tensors="pt", **options)
    return collator([{"input_ids": row.tolist()} for row in rows()])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by", DELIVERED)
def test_flattened_batches_equal_separate_rows(family: str, mode: str, by: str) -> None:
    model = models.landmark_model(family, MODES[mode])
    batch = delivered(DELIVERED[by])
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch, labels=labels, use_cache=False)
        apart = [model(row[None], use_cache=False).logits[0] for row in rows()]
    torch.testing.assert_close(together.logits[0], torch.cat(apart), rtol=0, atol=1e-10)
    predicted = torch.cat([logits[:-1] for logits in apart])
    wanted = torch.cat([row[1:] for row in rows()])
    loss = torch.nn.functional.cross_entropy(predicted.float(), wanted)
    torch.testing.assert_close(together.loss.float(), loss)


@pytest.mark.parametrize("by", DELIVERED)
def test_a_document_has_no_gradient_from_another(by: str) -> None:
    model = models.landmark_model("llama", MODES["all"])
    batch = delivered(DELIVERED[by])
    batch.pop("labels")
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embeds, **batch).logits[0, sum(LENGTHS[:3]) :].sum().backward()
    model.zero_grad()
    assert embeds.grad is not None
    assert (
        not embeds.grad[0, : sum(LENGTHS[:3])].any()
        and embeds.grad[0, sum(LENGTHS[:3]) : -1].any(dim=1).all()
    )


def test_what_fits_no_packed_row_is_refused() -> None:
    model = models.landmark_model("llama", MODES["all"])
    ids = models.text(12).view(2, 6)
    borders = torch.tensor([0, 4, 12])
    with pytest.raises(ValueError, match="one flattened row, got 2; pass seq_idx"):
        model(ids, cu_seq_lens_q=borders)
    with pytest.raises(ValueError, match="expected no attention_mask"):
        model(ids.view(1, 12), cu_seq_lens_q=borders, attention_mask=torch.ones(1, 12))
    with pytest.raises(ValueError, match="and no cache"):
        model(ids, seq_idx=torch.zeros(2, 6), past_key_values=model.read(ids))
    with pytest.raises(ValueError, match=r"seq_idx: expected shape \(2, 6\).*got \(1, 12\)"):
        model(ids, seq_idx=torch.zeros(1, 12))
