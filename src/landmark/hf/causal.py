"""The mixin that makes a landmark model of a stock causal language model.

Head, loss and ``generate`` stay stock code.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.hf.attention import IMPLEMENTATION
from landmark.hf.cache import LandmarkCache
from landmark.hf.compat import CACHE, cache_by_installed_name, check_assisted, columns_of_step
from landmark.hf.decode_graph import capture_scope
from landmark.hf.model import require_landmark_cache
from landmark.hf.prompt_retrieval import pin_for_prompt
from landmark.hf.stub import PackagedMixin

# Stock code passes these from step to step; landmark models find positions by mask and cache.
NOT_FOR_FORWARD = ("position_ids", "cache_position", "next_sequence_length", "labels")


@dataclass(frozen=True)
class PromptColumns:
    """The columns of the prompt that the running ``generate`` was given.

    Attributes:
        columns: columns of its ids or embeddings, ``None`` where it was given neither.
        left_out: columns that the cache has read before and that the prompt leaves out.
    """

    columns: int | None = None
    left_out: int = 0

    def of_text(self, text: Tensor) -> Tensor:
        """Returns the prompt without the tokens that an assistant model has proposed behind it."""
        return text[:, : self.columns]

    def of_mask(self, mask: Tensor | None) -> Tensor | None:
        """Returns the mask over the prompt and the columns that it leaves out."""
        if self.columns is None or mask is None:
            return mask
        return mask[:, : self.left_out + self.columns]


_prompt: ContextVar[PromptColumns] = ContextVar("prompt")


class LandmarkCausalLMMixin(PackagedMixin):
    """The methods of a landmark model beside ``forward`` and ``generate`` of its stock family."""

    @property
    def landmark(self) -> LandmarkConfig:
        """The landmark settings in force."""
        return LandmarkConfig.from_dict(self.config.landmark or {})

    def configure_landmark(self, **changes: Any) -> LandmarkConfig:
        """Changes landmark settings, but not ``block_size``, which training fixed.

        Returns:
            all settings from then on.

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
        """Runs the prefill of a text: fills a cache with it, without computing logits.

        Args:
            input_ids: ``(B, T)`` text token ids.
            attention_mask: as for ``forward``: ``(B, T)``, or ``(B, past + T)`` with a cache; 0 for
                padding.
            cache: a cache to extend; by default a new one.
            retrieve: whether the prefill retrieves. ``False`` is prefill with local attention and
                block 0 only: fast, and not what the model would compute with retrieval. Later calls
                retrieve from what was read either way.

        Returns:
            the cache, to be passed as ``past_key_values``.

        Raises:
            ValueError: as the model's ``forward``.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                "expected input_ids of shape (B, T) with T of at least 1, got "
                f"{tuple(input_ids.shape)}"
            )
        cache = LandmarkCache(self.config) if cache is None else require_landmark_cache(cache)
        chunks = self.base_model.read_chunks(
            input_ids,
            attention_mask,
            cache,
            settings=self.landmark,
            kwargs={},
            retrieve=retrieve,
        )
        for _ in chunks:
            pass  # the states of text are not needed
        return cache

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as stock code does.

        With a cache (``past_key_values`` or ``cache``) the ids have to begin with all that it has
        read. Where they are exactly that, the last token is computed again. The ids of new text
        alone are taken together with an ``attention_mask`` over all columns, those read before
        included. The rows of a cache are repeated for beams and for several answers.

        Where ``retrieval_layers`` or ``retrieval_heads`` are set, a prompt of at most
        ``chunk_tokens`` behind a cache that has read something is run twice: first to choose the
        blocks, which are pinned until this returns. Blocks that the caller has pinned stay.

        On an NVIDIA GPU, decode steps of one token are captured in a CUDA graph and replayed, but
        not while blocks are pinned.

        Raises:
            ValueError: ids that do not begin with what the cache has read, or as ``forward``.
        """
        kwargs = cache_by_installed_name(kwargs)
        cache = kwargs.get(CACHE)
        token = _prompt.set(_prompt_columns(args, kwargs))
        try:
            with ExitStack() as stack:
                stack.enter_context(capture_scope())
                if isinstance(cache, LandmarkCache):
                    stack.enter_context(cache.unchanged_on_failure())
                    if cache.pinned is None:
                        stack.callback(cache.pin, None)
                return super().generate(*args, **kwargs)
        finally:
            _prompt.reset(token)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the arguments of the next ``forward`` inside ``generate``.

        Its text is what the cache has not read. This replaces the method of every family: those cut
        the text by other rules, or drop the cache where RoPE switches to other frequencies
        (longrope), which it never does in landmark models.
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
            prompt = _prompt.get(PromptColumns())
            if is_first_iteration:
                cache.begin_with(
                    prompt.of_text(text),
                    prompt.of_mask(attention_mask),
                    embedding=self.get_input_embeddings(),
                    left_out=prompt.left_out,
                )
            count = prompt.left_out + text.shape[1] - cache.get_seq_length()
            if count < 1:
                # After a prompt of embeddings, the text is the generated ids alone.
                count = columns_of_step(kwargs)
            new = text[:, -count:]
            if is_first_iteration:
                self.pin_for_prompt(cache, new, attention_mask)
        return {
            **rest,
            name: new.clone(memory_format=torch.contiguous_format),
            "attention_mask": attention_mask,
        }

    def pin_for_prompt(
        self, cache: LandmarkCache, prompt: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Chooses blocks for a prompt and pins them, as ``generate`` does.

        They stay pinned until ``cache.pin(None)``. Nothing is done without ``retrieval_layers`` and
        ``retrieval_heads``, where blocks are pinned already, before anything was read, or for a
        prompt of more than ``chunk_tokens``.

        Args:
            cache: what stands before the prompt.
            prompt: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
            attention_mask: ``(B, T)`` or of more columns before these, 0 for padding; ``None`` for
                no padding.

        Raises:
            ValueError: as ``forward``.
        """
        settings = self.landmark
        if not (settings.retrieval_layers or settings.retrieval_heads):
            return
        if cache.pinned is not None or not cache.is_initialized:
            return
        if settings.mode != "retrieval" or settings.granularity != "token_head":
            return
        if prompt.shape[1] <= settings.chunk_tokens:
            mask = None if attention_mask is None else attention_mask[:, -prompt.shape[1] :]
            pin_for_prompt(self, cache, prompt, mask)

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
            # A cache that is given is always extended.
            generation_config.use_cache = True
            model_kwargs["use_cache"] = True

    def _get_initial_cache_position(
        self, seq_length: int, device: Any, model_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Adds the indices of the columns that the cache has not read.

        transformers calls this before 5.3.
        """
        prompt = _prompt.get(PromptColumns())
        embeds = model_kwargs.get("inputs_embeds")
        cache = model_kwargs.get(CACHE)
        end = prompt.left_out + (seq_length if embeds is None else embeds.shape[1])
        read = 0 if cache is None else cache.get_seq_length()
        begin = min(read, end - 1)
        model_kwargs["cache_position"] = torch.arange(begin, end, device=device)
        return model_kwargs

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        check_assisted(_prompt.get(PromptColumns()).left_out)
        return super()._assisted_decoding(*args, **kwargs)

    def _prepare_generated_length(
        self, generation_config: Any, has_default_max_length: bool, **kwargs: Any
    ) -> Any:
        """Counts the default length as new tokens.

        Stock code cuts it at ``max_position_embeddings``, the prompt included.
        """
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = generation_config.max_length
        return super()._prepare_generated_length(
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            **kwargs,
        )

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        """Removes the warning for a text beyond ``max_position_embeddings``, which is allowed."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for each in criteria:
            if hasattr(each, "max_position_embeddings"):
                each.max_position_embeddings = None
        return criteria

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refuses any attention but ``landmark``: others would ignore the landmarks."""
        if attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"a landmark model attends by {IMPLEMENTATION!r} only, got {attn_implementation!r}"
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses continuous batching, whose paged KV cache knows no landmarks."""
        raise AttributeError("continuous batching does not know landmarks: use generate")


def _prompt_columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PromptColumns:
    """Returns the columns of the prompt that ``generate`` is given by these arguments.

    The width of the mask tells a whole text from new text alone.

    Raises:
        ValueError: a mask of another shape than the text, or one that does not fit what the cache
            has read.
    """
    cache = kwargs.get(CACHE)
    mask = kwargs.get("attention_mask")
    inputs = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
    text = next((each for each in inputs if isinstance(each, Tensor) and each.ndim > 1), None)
    if text is None:
        return PromptColumns()
    batch, columns = text.shape[:2]
    if mask is None:
        return PromptColumns(columns)
    read = cache.get_seq_length() if isinstance(cache, LandmarkCache) else 0
    shape: Any = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape not in ((batch, columns), (batch, read + columns)):
        raise ValueError(
            f"attention_mask: expected shape ({batch}, {columns}) as the text, or ({batch}, "
            f"{read + columns}) for new text behind the {read} columns that the cache has read, "
            f"got {shape}"
        )
    if isinstance(cache, LandmarkCache) and mask.shape[1] >= read:
        cache.check_mask(mask[:, :read])  # here, as stock code drops a mask of ones
    return PromptColumns(columns, left_out=mask.shape[1] - columns)


def check_layers(settings: LandmarkConfig, layers: int) -> None:
    """Raises ``ValueError`` where settings name a layer that does not exist."""
    named = {
        "layers": settings.layers or (),
        "retrieval_layers": settings.retrieval_layers or (),
        "retrieval_heads": [layer for layer, _ in settings.retrieval_heads or ()],
    }
    for name, indices in named.items():
        beyond = [layer for layer in indices if layer >= layers]
        if beyond:
            raise ValueError(f"{name}: expected indices below {layers}, got {beyond}")


def warn_beyond_trained(settings: LandmarkConfig) -> None:
    """Warns where stingy positions exceed the trained length."""
    largest = settings.largest_top_k
    if settings.positions != "stingy" or largest is None or settings.top_k <= largest:
        return
    remedy = "no top_k fits: use fewer local_blocks"
    if largest > 0:
        remedy = f"the largest top_k that fits is {largest}"
    warnings.warn(
        f"stingy positions take {settings.stingy_positions} positions, the model was trained on "
        f"{settings.trained_length}: {remedy}",
        stacklevel=3,
    )
