"""Passes with a contrast, on one device or on two processes of the CPU that each have some rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import models
from landmark.config import LandmarkConfig
from landmark.hf.gate_loss import GateContrast, JointContrast, QuestionSpan, TextContrast
from landmark.hf.recall import EvidenceQuery
from landmark.train.run import compile_layers

SIZE = 5
SETTINGS = LandmarkConfig(block_size=SIZE, top_k=2, local_blocks=1, mode="all")
HEADS = 3  # of 8 that are trained
NEAR = EvidenceQuery(0, 40, (range(8, 9), range(21, 22)))
FAR = EvidenceQuery(0, 62, (range(3, 5),))
MIDDLE = EvidenceQuery(0, 50, (range(30, 31),))


@dataclass(frozen=True)
class Share:
    """What a device has of a batch.

    Attributes:
        ids: ``(B, T)``.
        queries: queries of these rows.
    """

    ids: torch.Tensor
    queries: tuple[EvidenceQuery, ...]


@dataclass(frozen=True)
class Case:
    """Two devices' shares, and how their layers run."""

    shares: tuple[Share, Share]
    checkpointing: bool = False
    compiled: bool = False
    kind: str = "heads"  # who is contrasted


def _rows(number: int, tokens: int = 63) -> torch.Tensor:
    return models.text(number * tokens).view(number, tokens)


_TWO = tuple(_rows(2).split(1))
CASES = {
    "as many queries": Case((Share(_TWO[0], (FAR,)), Share(_TWO[1], (NEAR,)))),
    "more queries": Case((Share(_TWO[0], (FAR, NEAR, MIDDLE)), Share(_TWO[1], (NEAR,)))),
    "no query": Case((Share(_TWO[0], ()), Share(_TWO[1], (NEAR, MIDDLE)))),
    "more rows": Case(
        (
            Share(_rows(3)[:2], (FAR, MIDDLE._replace(row=1))),
            Share(_rows(3)[2:], (NEAR,)),
        )
    ),
    "more blocks": Case((Share(_TWO[0], (FAR,)), Share(_TWO[1][:, :44], (NEAR,)))),
    "no block": Case((Share(_TWO[0], (FAR, NEAR)), Share(_TWO[1][:, :3], ()))),
    "checkpointing": Case((Share(_TWO[0], ()), Share(_TWO[1], (NEAR, MIDDLE))), checkpointing=True),
    "joint": Case((Share(_TWO[0], (FAR, NEAR, MIDDLE)), Share(_TWO[1], (NEAR,))), kind="joint"),
    "joint, no query": Case((Share(_TWO[0], ()), Share(_TWO[1], (NEAR, MIDDLE))), kind="joint"),
    "text": Case((Share(_TWO[0], (FAR, NEAR, MIDDLE)), Share(_TWO[1], (NEAR,))), kind="text"),
    "text, no query": Case((Share(_TWO[0], ()), Share(_TWO[1], (NEAR, MIDDLE))), kind="text"),
    "compiled": Case((Share(_TWO[0], (FAR,)), Share(_TWO[1], (NEAR, MIDDLE))), compiled=True),
}


@dataclass
class Found:
    """A loss and the gradients of all weights."""

    loss: float
    gradients: dict[str, torch.Tensor]


def model_of(case: Case) -> torch.nn.Module:
    model = models.landmark_model("gpt_neox", SETTINGS)  # whose norms are in float64 throughout
    model.zero_grad()
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    if case.compiled:
        compile_layers(model, backend="eager")
    return model


def undo(model: torch.nn.Module) -> None:
    """The model is shared."""
    model.gradient_checkpointing_disable()
    for module in model.modules():
        module._compiled_call_impl = None


def text_loss(logits: torch.Tensor) -> torch.Tensor:
    return logits.square().sum() / 1000


Contrast = GateContrast | JointContrast | TextContrast


def contrast_of(queries: Sequence[EvidenceQuery], kind: str) -> Contrast:
    spans = [range(query.token - 9, query.token + 1) for query in queries]
    if kind == "joint":
        return JointContrast(queries, spans=spans, layers=[0, 1])
    if kind == "text":
        questions = [QuestionSpan(*each) for each in zip(queries, spans, strict=True)]
        return TextContrast(questions, [(0, 1), (1, 2), (1, 0)])
    return GateContrast(queries)


def loss_of(contrast: Contrast) -> torch.Tensor:
    return contrast.loss(HEADS) if isinstance(contrast, GateContrast) else contrast.loss()


def on_one_device(share: Share, *, kind: str = "heads") -> Found:
    model = model_of(Case((share, share)))
    contrast = contrast_of(share.queries, kind)
    logits = model(input_ids=share.ids, use_cache=False, gate_loss=contrast).logits
    loss = text_loss(logits) + loss_of(contrast)
    loss.backward()
    return found(loss, model)


def on_two_devices(device: int, folder: Path) -> None:
    """Runs all cases as one of two processes, and saves what each finds."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/together", rank=device, world_size=2
    )
    for name, case in CASES.items():
        torch.save(on_a_device_of_two(case, device), folder / f"{name}-{device}")
    # What holds the process group has to be gone before it. One that is freed with the last of
    # them waits for its threads, and they may wait for the interpreter that it holds.
    gc.collect()
    distributed.destroy_process_group()


def on_a_device_of_two(case: Case, device: int) -> Found:
    model = model_of(case)
    parallel = DistributedDataParallel(model)
    share = case.shares[device]
    contrast = contrast_of(share.queries, case.kind)
    logits = parallel(input_ids=share.ids, use_cache=False, gate_loss=contrast).logits
    loss = 2 * text_loss(logits) + loss_of(contrast)
    loss.backward()
    undo(model)
    return found(loss, model)


def found(loss: torch.Tensor, model: torch.nn.Module) -> Found:
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    return Found(loss.item(), gradients)
