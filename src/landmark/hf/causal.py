"""The mixin that makes a landmark model of a stock causal language model; head, loss and generate
stay stock code.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.hf.attempts import kept_on_failure
from landmark.hf.attention import IMPLEMENTATION
from landmark.hf.cache import LandmarkCache
from landmark.hf.compat import CACHE, cache_by_installed_name, check_assisted, columns_of_step
from landmark.hf.decode_graph import capture_scope
from landmark.hf.model import require_landmark_cache
from landmark.hf.stub import PackagedMixin

# What stock code hands from step to step: landmark models find positions by the mask and the
# memory.
NOT_FOR_FORWARD = ("position_ids", "cache_position", "next_sequence_length", "labels")


@dataclass(frozen=True)
class Given:
    """What the running ``generate`` was given.

    Attributes:
        columns: of its ids or embeddings, ``None`` where it was given neither.
        before: columns that the memory has read and that these leave out.
    """

    columns: int | None = None
    before: int = 0

    def without_candidates(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns text and mask of the first step without the tokens that an assistant has put
        behind them.
        """
        if self.columns is None or mask is None:
            return text[:, : self.columns], mask
        return text[:, : self.columns], mask[:, : self.before + self.columns]


_given: ContextVar[Given] = ContextVar("given")


class LandmarkCausalLMMixin(PackagedMixin):
    """What a landmark model offers beside its stock family's ``forward`` and ``generate``."""

    @property
    def landmark(self) -> LandmarkConfig:
        """The landmark settings in force."""
        return LandmarkConfig.from_dict(self.config.landmark or {})

    def configure_landmark(self, **changes: Any) -> LandmarkConfig:
        """Changes landmark settings (not ``block_size``, which training fixed) and returns them.

        Raises:
            ValueError: an unknown setting, a value outside its range, or another ``block_size``.
        """
        settings = self.landmark.replace(**changes)
        if settings.block_size != self.landmark.block_size:
            raise ValueError(
                f"block_size is fixed at {self.landmark.block_size}, got {settings.block_size}; "
                "convert anew"
            )
        check_layers(settings, self.config.num_hidden_layers)
        warn_beyond_trained(settings)
        self.config.landmark = settings.to_dict()
        return settings

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: LandmarkCache | None = None,
        retrieve: bool = True,
    ) -> LandmarkCache:
        """Reads a text into a memory, without computing logits.

        Args:
            input_ids: ``(B, T)`` text token ids.
            attention_mask: as for ``forward``: ``(B, T)``, or ``(B, past + T)`` with a memory; 0
                for padding.
            cache: a memory to go on from.
            retrieve: ``False`` reads with the local context and block 0 only: fast, and not what
                the model would compute with retrieval; later calls retrieve from what was read.

        Returns:
            the memory, to be passed as ``past_key_values``.

        Raises:
            ValueError: as the model's ``forward``.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                "expected input_ids of shape (B, T) with T of at least 1, got "
                f"{tuple(input_ids.shape)}"
            )
        cache = LandmarkCache(self.config) if cache is None else require_landmark_cache(cache)
        for _ in self.base_model.read_chunks(
            input_ids, attention_mask, cache, self.landmark, {}, retrieve=retrieve
        ):
            pass
        return cache

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as stock code does; on an NVIDIA GPU, steps of one token are captured in a CUDA
        graph.

        With a memory (``past_key_values`` or ``cache``) the ids given begin with all that it has
        read. Where they are exactly that, its last token is computed again. Ids of new text alone
        are taken together with an ``attention_mask`` over all columns, those read before included.
        A memory of fewer rows is repeated for beams and answers.

        Raises:
            ValueError: ids that do not begin with what the memory has read, or as ``forward``.
        """
        kwargs = cache_by_installed_name(kwargs)
        cache = kwargs.get(CACHE)
        token = _given.set(_what_is_given(args, kwargs))
        try:
            with (
                capture_scope(),
                kept_on_failure(cache) if isinstance(cache, LandmarkCache) else nullcontext(),
            ):
                return super().generate(*args, **kwargs)
        finally:
            _given.reset(token)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns what the next call of ``forward`` inside ``generate`` is given: the text behind
        the memory.

        Stands in place of every family's own: those cut the text by other rules, or drop the cache
        where a RoPE of other frequencies begins (longrope), which landmark models never switch to.
        """
        kwargs = cache_by_installed_name(kwargs)
        cache = kwargs.get(CACHE)
        rest = {name: value for name, value in kwargs.items() if name not in NOT_FOR_FORWARD}
        if getattr(self.config, "output_router_logits", False):
            # Nobody asks for the balancing loss of a generated token.
            rest["output_router_logits"] = False
        name = "input_ids"
        text = input_ids
        if is_first_iteration and inputs_embeds is not None:
            name = "inputs_embeds"
            text = inputs_embeds
        new = text
        if cache is not None:
            given = _given.get(Given())
            if is_first_iteration:
                own, mask = given.without_candidates(text, attention_mask)
                cache.begin_with(own, mask, self.get_input_embeddings(), given.before)
            count = given.before + text.shape[1] - cache.get_seq_length()
            if count < 1:  # behind embeddings, these are the ids alone that were generated
                count = columns_of_step(kwargs)
            new = text[:, -count:]
        return {
            **rest,
            name: new.clone(memory_format=torch.contiguous_format),
            "attention_mask": attention_mask,
        }

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot hold "
                "landmarks: leave it unset"
            )
        generation_config.prefill_chunk_size = None  # forward reads in chunks of its own
        cache = model_kwargs.get(CACHE)
        if cache is None:
            if generation_config.use_cache is not False:
                model_kwargs[CACHE] = LandmarkCache(self.config)
        else:
            require_landmark_cache(cache)._is_user_defined = True
            # A memory that is given is read on.
            model_kwargs["use_cache"] = generation_config.use_cache = True

    def _get_initial_cache_position(
        self, seq_length: int, device: Any, model_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Adds the places of the columns that the memory has not read; called by transformers
        before 5.3.
        """
        given = _given.get(Given())
        embeds = model_kwargs.get("inputs_embeds")
        cache = model_kwargs.get(CACHE)
        columns = given.before + (seq_length if embeds is None else embeds.shape[1])
        read = 0 if cache is None else cache.get_seq_length()
        model_kwargs["cache_position"] = torch.arange(
            min(read, columns - 1), columns, device=device
        )
        return model_kwargs

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        check_assisted(_given.get(Given()).before)
        return super()._assisted_decoding(*args, **kwargs)

    def _prepare_generated_length(
        self, generation_config: Any, has_default_max_length: bool, **kwargs: Any
    ) -> Any:
        """Counts the default length as new tokens: stock code cuts it at
        ``max_position_embeddings``, text included.
        """
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = generation_config.max_length
        return super()._prepare_generated_length(
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            **kwargs,
        )

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        """Takes out the reminder that the text is longer than ``max_position_embeddings``: it may
        be.
        """
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for each in criteria:
            if hasattr(each, "max_position_embeddings"):
                each.max_position_embeddings = None
        return criteria

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refused but for ``landmark``: another attention would ignore the landmarks."""
        if attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"a landmark model attends by {IMPLEMENTATION!r} only, got {attn_implementation!r}"
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching keeps keys in pages that know no landmarks."""
        raise AttributeError("continuous batching does not know landmarks: use generate")


def _what_is_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Returns how much text ``generate`` was given: new text alone, where the mask says so by its
    width.

    Raises:
        ValueError: a mask of another shape than the text, or over a memory that has read otherwise.
    """
    cache = kwargs.get(CACHE)
    mask = kwargs.get("attention_mask")
    inputs = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
    text = next((each for each in inputs if isinstance(each, Tensor) and each.ndim > 1), None)
    if text is None:
        return Given()
    batch, columns = text.shape[:2]
    if mask is None:
        return Given(columns)
    read = cache.get_seq_length() if isinstance(cache, LandmarkCache) else 0
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape not in ((batch, columns), (batch, read + columns)):
        raise ValueError(
            f"attention_mask: expected shape ({batch}, {columns}) as the text, or ({batch}, "
            f"{read + columns}) for new text behind the {read} columns that the cache has read, "
            f"got {shape}"
        )
    if isinstance(cache, LandmarkCache) and mask.shape[1] >= read:
        cache.check_mask(mask[:, :read])  # here, as stock code drops a mask of ones
    return Given(columns, mask.shape[1] - columns)


def check_layers(settings: LandmarkConfig, layers: int) -> None:
    """Raises ``ValueError`` where ``settings.layers`` names a layer that the model has not."""
    beyond = [layer for layer in settings.layers or () if layer >= layers]
    if beyond:
        raise ValueError(f"layers: expected indices below {layers}, got {beyond}")


def warn_beyond_trained(settings: LandmarkConfig) -> None:
    """Warns where stingy positions exceed the trained length."""
    largest = settings.largest_top_k
    if settings.positions != "stingy" or largest is None or settings.top_k <= largest:
        return
    remedy = (
        f"the largest top_k that fits is {largest}"
        if largest > 0
        else "no top_k fits: use fewer local_blocks"
    )
    warnings.warn(
        f"stingy positions take {settings.stingy_positions} positions, the model was trained on "
        f"{settings.trained_length}: {remedy}",
        stacklevel=3,
    )
