"""The same weights run densely: every token attends to every earlier one, no landmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from landmark.eval.episodes import Episode
from landmark.eval.measure import measured
from landmark.hf.compat import CACHE
from landmark.hf.families import PREFIX, family
from landmark.texts.loading import LoadedModel


@dataclass(frozen=True)
class DenseRun:
    """A dense run on one document.

    Attributes:
        length: text tokens of the document.
        answer: what the model wrote.
        right: whether it is the key.
        read_seconds: reading the document.
        answer_seconds: reading the question and writing the answer, all keys attended to.
        peak_bytes: see ``Measure``.
        cache_bytes: keys and values remembered.
        keys_per_query: most keys that one query is compared with in each layer and head.
    """

    length: int
    answer: str
    right: bool
    read_seconds: float
    answer_seconds: float
    peak_bytes: int | None
    cache_bytes: int
    keys_per_query: int


def dense_model(model: Any) -> Any:
    """Returns the stock model of a landmark model's family, sharing its weights."""
    stock: Any = family(model.config.model_type.removeprefix(PREFIX)).stock_causal_lm
    fields = model.config.to_dict()
    for name in ("landmark", "model_type", "architectures", "auto_map", "dtype"):
        fields.pop(name, None)
    dense = stock(stock.config_class.from_dict(fields))
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if name in dense.state_dict()
    }
    dense.load_state_dict(weights, assign=True)
    dense.tie_weights()
    dense.generation_config = model.generation_config
    return dense.to(model.device).eval()


@torch.no_grad()
def run_dense(loaded: LoadedModel, episode: Episode) -> DenseRun:
    """Reads the document and answers its question with the weights of ``loaded``, densely."""
    from transformers import DynamicCache

    dense = dense_model(loaded.model)
    (question,) = episode.questions
    known = len(question.ids) - question.answered
    cache = DynamicCache(config=dense.config)
    written: list[int] = []
    with measured(loaded.device) as whole:
        with measured(loaded.device) as reading:
            dense(
                episode.document[None].to(loaded.device),
                **{CACHE: cache},
                use_cache=True,
                logits_to_keep=1,
            )
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        ids = torch.tensor([question.ids[:known]], device=loaded.device)
        while len(written) < question.answered:
            logits = dense(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
            written.append(int(logits[0, -1].argmax()))
            ids = ids.new_tensor([written[-1:]])
    return DenseRun(
        length=len(episode.document),
        answer=loaded.tokenizer.decode(written).strip(),
        right=written == question.ids[known:],
        read_seconds=reading.seconds,
        answer_seconds=whole.seconds - reading.seconds,
        peak_bytes=whole.peak_bytes,
        cache_bytes=cache_bytes,
        keys_per_query=len(episode.document) + len(question.ids),
    )
