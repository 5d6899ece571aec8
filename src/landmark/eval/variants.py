"""The models that are measured: as they are, or plain ones with other attention.

A plain model is measured with full attention and, where asked for, with a sliding window or with
RoPE scaling. The weights of a landmark model can be run densely, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landmark.blocks import slots_for
from landmark.config import GREATEST, LandmarkConfig
from landmark.eval.dense import dense_model
from landmark.eval.window import SINK, window_attention
from landmark.hf.bundled import model_folder
from landmark.texts.loading import LoadedModel, load, load_configured

ROPE_TYPES = ("dynamic", "yarn")


class RopeScaling(NamedTuple):
    """RoPE scaling that a plain model is measured with, by the names of transformers.

    Attributes:
        rope_type: ``dynamic`` or ``yarn``.
        factor: how many times the trained length it is meant for.
    """

    rope_type: str
    factor: float

    @classmethod
    def read(cls, text: str | None) -> RopeScaling | None:
        """Reads ``TYPE`` (factor 2) or ``TYPE:FACTOR``; ``None`` stays.

        Raises:
            ValueError: anything else.
        """
        if text is None:
            return None
        rope_type, _, factor = text.partition(":")
        try:
            found = float(factor or 2) if rope_type in ROPE_TYPES else 0.0
        except ValueError:
            found = 0.0
        if not 1 <= found <= GREATEST:
            raise ValueError(
                f"rope: expected {' or '.join(ROPE_TYPES)}, alone or followed by a colon and a "
                f"factor from 1 to {GREATEST}, got {text!r}; pass for example rope=dynamic:2"
            )
        return cls(rope_type, found)


@dataclass(frozen=True)
class Variant(LoadedModel):
    """A loaded model with the attention that is measured.

    Attributes:
        window: latest tokens that a query of a windowed plain model sees beside the first 64.
        rope: RoPE scaling that the plain model was loaded with.
    """

    window: int | None = None
    rope: RopeScaling | None = None

    @classmethod
    def of(
        cls, loaded: LoadedModel, *, window: int | None = None, rope: RopeScaling | None = None
    ) -> Variant:
        """Returns a loaded model as a variant."""
        return cls(
            name=loaded.name,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            folder=loaded.folder,
            window=window,
            rope=rope,
        )

    @property
    def attention(self) -> str:
        """``landmark``, or for a plain model ``full``, ``window``, ``dynamic`` or ``yarn``."""
        if self.is_landmark:
            return "landmark"
        if self.window is not None:
            return "window"
        return "full" if self.rope is None else self.rope.rope_type

    @property
    def trained_length(self) -> int | None:
        """Positions that the model was trained on, as far as its configuration says."""
        if self.is_landmark:
            trained: int | None = self.model.landmark.trained_length
        else:
            trained = getattr(self.model.config, "max_position_embeddings", None)
        return trained

    def settings(self) -> dict[str, Any]:
        """Returns all settings of the attention as JSON types."""
        if self.is_landmark:
            fields: dict[str, Any] = self.model.landmark.to_dict()
            return fields
        if self.window is not None:
            return {"sink": SINK, "window": self.window}
        if self.rope is not None:
            return {"rope_factor": self.rope.factor}
        return {}

    def beyond_trained(self, length: int) -> bool | None:
        """Returns whether ``length`` text tokens make attention use untrained positions.

        ``None`` where the trained length is unknown.
        """
        trained = self.trained_length
        if trained is None:
            return None
        return self._positions_used(length) > trained

    def _positions_used(self, length: int) -> int:
        if self.window is not None:
            return min(length, SINK + self.window)
        if not self.is_landmark:
            return length
        config: LandmarkConfig = self.model.landmark
        everything = slots_for(length, config.block_size)
        if config.positions == "exact":
            return everything
        if config.local == "chunk":
            started = config.block_size - 1 if config.chunk_tokens % config.text_per_block else 0
            chunk = started + slots_for(config.chunk_tokens, config.block_size)
            return min(everything, (config.top_k + 1) * config.block_size + chunk)
        return min(everything, config.stingy_positions)

    @torch.no_grad()
    def logits(self, ids: Tensor, keep: int = 0) -> Tensor:
        """Returns the logits of the last tokens of each row.

        Args:
            ids: ``(B, T)`` token ids.
            keep: so many last tokens; 0 for all.

        Returns:
            ``(B, keep or T, V)``.
        """
        arguments: dict[str, Any] = {"logits_to_keep": keep}
        if not self.is_landmark:
            arguments["use_cache"] = False
        if self.window is not None:
            with window_attention(self.model, self.window) as extra:
                logits: Tensor = self.model(ids, **arguments, **extra(ids)).logits
                return logits
        return self.model(ids, **arguments).logits  # type: ignore[no-any-return]


def load_variants(
    model: str | None,
    compare: str | None,
    *,
    device: str,
    dtype: str,
    window: int | None = None,
    rope: RopeScaling | None = None,
    dense: bool = False,
) -> list[Variant]:
    """Loads one model or two: landmark models first, then each plain one in all its variants.

    Args:
        model: as for ``landmark.texts.loading.load``.
        compare: a second model, ``None`` for none.
        device: as for ``load``.
        dtype: as for ``load``.
        window: as for ``plain_variants``.
        rope: as for ``plain_variants``.
        dense: whether the weights of landmark models also run as a plain model.

    Raises:
        ValueError: as ``load`` and ``plain_variants``, and for a window or scaling without a plain
            model.
        FileNotFoundError: as ``load``.
    """
    loaded = [load(model, device, dtype)]
    if compare is not None:
        loaded.append(load(compare, device, dtype))
    plain = [each for each in loaded if not each.is_landmark]
    if not plain and (window is not None or rope is not None):
        name = "rope" if window is None else "window"
        raise ValueError(
            f"{name}: expected a plain model, got landmark models only; add for example "
            "compare=Qwen/Qwen3-0.6B"
        )
    variants = [Variant.of(each) for each in loaded if each.is_landmark]
    if dense:
        variants += [
            Variant.of(replace(each, model=dense_model(each.model)))
            for each in loaded
            if each.is_landmark
        ]
    for each in plain:
        variants += plain_variants(each, window, rope)
    return variants


def plain_variants(
    plain: LoadedModel, window: int | None, rope: RopeScaling | None
) -> list[Variant]:
    """Returns a plain model as it is and, where asked for, windowed and with scaled RoPE.

    Args:
        plain: a plain model.
        window: the latest tokens that a query sees beside the first 64.
        rope: RoPE scaling.

    Raises:
        ValueError: a window below 1.
    """
    variants = [Variant.of(plain)]
    if window is not None:
        if not 1 <= window <= GREATEST:
            raise ValueError(
                f"window: expected 1 to {GREATEST} tokens, got {window}; pass for example "
                "window=384"
            )
        variants.append(Variant.of(plain, window=window))
    if rope is not None:
        config = type(plain.model.config).from_dict(plain.model.config.to_dict())
        old = getattr(config, "rope_parameters", None) or {}
        config.rope_parameters = {**old, **rope._asdict()}
        scaled = load_configured(
            plain.name,
            model_folder(plain.name),
            config,
            plain.device,
            next(plain.model.parameters()).dtype,
        )
        variants.append(Variant.of(scaled, rope=rope))
    return variants
