"""The mixin that makes a landmark decoder of a stock decoder.

It takes text, inserts landmarks as embeddings, runs the stock decoder on both, and returns the
states of text. All positions are 0 in the stock decoder, so that queries and keys reach the
attention function without rotation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from landmark.blocks import slots_for
from landmark.config import LandmarkConfig
from landmark.hf.attention import (
    CachedPass,
    ForwardContext,
    FullPass,
    check_attention,
    claim_attention,
)
from landmark.hf.cache import LandmarkCache
from landmark.hf.columns import device_of, sketch_of
from landmark.hf.compat import CACHE, cache_by_installed_name
from landmark.hf.decode_graph import current_graph
from landmark.hf.layout import (
    TextLayout,
    document_numbers,
    documents_by_position,
    packed_layout,
    padded_layout,
    plain_layout,
)
from landmark.hf.rope import layer_types, read_rotaries
from landmark.hf.states import merge
from landmark.hf.stub import PackagedMixin
from landmark.memory.geometry import make_geometry
from landmark.memory.rotary_tables import RotaryTables


class LandmarkDecoderMixin(PackagedMixin):
    """Inserts landmarks in front of a stock decoder and takes them out behind it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        claim_attention(config)
        super().__init__(config, *args, **kwargs)
        self.landmark_embedding = nn.Embedding(1, config.hidden_size)
        self._rotaries = read_rotaries(self)
        self._tables: dict[str | None, RotaryTables] | None = None
        self._layer_types = tuple(
            kind if kind in self._rotaries else None for kind in layer_types(config)
        )
        self._warned = False

    @property
    def settings(self) -> LandmarkConfig:
        """The landmark settings in force."""
        return LandmarkConfig.from_dict(self.config.landmark or {})

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the decoder on text.

        Args:
            input_ids: ``(B, T)`` text token ids, or else ``inputs_embeds (B, T, hidden)``.
            attention_mask: ``(B, T)`` or ``(B, past + T)``, 0 for padding, which may be anywhere.
                A 0 over the last tokens of a row in the cache removes them
                (``LandmarkCache.hide``).
            position_ids: ``(B, T)``. Without a mask and a cache, a new document begins wherever
                positions do not go on (packed rows). Otherwise ignored: slots come from the mask.
            past_key_values: a ``LandmarkCache`` to read from and to extend; ``cache`` is another
                name for it.
            inputs_embeds: see ``input_ids``.
            use_cache: whether to return the cache; it never changes what is computed.
            seq_idx: ``(B, T)`` document of each column of packed rows, in place of
                ``position_ids``. ``cu_seq_lens_q``, the borders of documents in one flattened row,
                is taken as well.
            cache: see ``past_key_values``.
            **kwargs: passed to the stock decoder, but for two of a pass without a cache in mode
                ``all`` or ``top_k``: ``gate_loss``, a ``landmark.hf.gate_loss.GateLoss`` that each
                layer adds to, and ``forced_blocks``, ``(B, T, F)`` blocks that each token keeps
                whatever their score in mode ``top_k`` (``forced`` of ``landmark_attention``).

        Returns:
            ``BaseModelOutputWithPast`` whose states are those of text, zeros at padding.

        Raises:
            ValueError: arguments that do not fit, a stock cache, retrieval in train mode, or a text
                beyond the trained length under exact positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if kwargs.pop("output_attentions", None) or self.config.output_attentions:
            raise ValueError(
                "landmark attention keeps no attention matrix: read cache.retrievals "
                "(cache.record = True)"
            )
        check_attention(self.config)
        return_dict = kwargs.pop("return_dict", None)
        text = input_ids if input_ids is not None else inputs_embeds
        assert text is not None
        if text.ndim < 2 or text.shape[1] == 0:
            raise ValueError(
                f"expected text of shape (B, T) with T of at least 1, got {tuple(text.shape)}"
            )
        settings = self.settings
        given = cache_by_installed_name({"cache": cache, "past_key_values": past_key_values})
        cache = given.get(CACHE)
        if cache is not None:
            require_landmark_cache(cache)
        mask = text_mask(attention_mask, text, cache)
        if kwargs.get("output_router_logits"):
            _check_balanced(attention_mask, text.shape[1])
        may_be_packed = mask is None and cache is None
        documents = _documents(text, seq_idx, position_ids, kwargs, may_be_packed=may_be_packed)
        if settings.mode != "retrieval" and cache is None:
            output = self._full_pass(
                self._embed(text),
                mask=mask,
                documents=documents,
                settings=settings,
                kwargs=kwargs,
            )
        elif documents is not None and bool((documents != documents[:, :1]).any()):
            with torch.no_grad():
                output = self._by_document(self._embed(text), documents, settings, kwargs)
        else:
            cache = LandmarkCache(self.config) if cache is None else cache
            chunks = self.read_chunks(text, attention_mask, cache, settings=settings, kwargs=kwargs)
            output = _join(list(chunks))
            returns_cache = self.config.use_cache if use_cache is None else use_cache
            if returns_cache:
                output[CACHE] = cache
        return output if return_dict is not False else output.to_tuple()

    def _embed(self, text: Tensor) -> Tensor:
        """Returns the embeddings of a text, ``(B, T, hidden)``.

        Args:
            text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings, which are returned.

        Raises:
            ValueError: on the CPU, ids that have no embedding.
        """
        if text.ndim == 3:
            return text
        embedding = self.get_input_embeddings()
        try:
            embeds: Tensor = embedding(text.to(device_of(embedding)))
        except IndexError:
            raise ValueError(
                f"expected token ids from 0 to {self.config.vocab_size - 1}, got "
                f"{int(text.min())} to {int(text.max())}; use the model's own tokenizer, or "
                "resize_token_embeddings"
            ) from None
        return embeds

    def _landmark(self, like: Tensor) -> Tensor:
        """Returns the landmark's embedding ``(hidden,)`` on the device of a tensor."""
        index = torch.zeros(1, dtype=torch.long, device=like.device)
        embedding: Tensor = self.landmark_embedding(index)[0]
        return embedding.to(like.device)

    def _full_pass(
        self,
        embeds: Tensor,
        *,
        mask: Tensor | None,
        documents: Tensor | None,
        settings: LandmarkConfig,
        kwargs: Any,
    ) -> Any:
        """Runs mode ``all`` or ``top_k`` without a cache: the text in one differentiable pass."""
        tokens = embeds.shape[1]
        size = settings.block_size
        if documents is not None:
            layout = packed_layout(documents, size)
        elif mask is not None:
            layout = padded_layout(mask, size)
        else:
            layout = plain_layout(tokens, size, embeds.device)
        positions = layout.positions
        restarts = kwargs.pop("restarts", None)
        if self.training:
            positions = layout.training_positions(len(embeds), settings, restarts)
        if positions.ndim > 1:
            positions = positions[:, None]  # broadcast over heads
        rotations = {
            kind: rotary.rotation(positions, embeds.dtype)
            for kind, rotary in self._rotaries.items()
        }
        gate_loss = kwargs.pop("gate_loss", None)
        if gate_loss is not None:
            gate_loss.prepare(
                settings, self._rotaries, embeds.new_empty(len(embeds), layout.width, 0)
            )
        forced = kwargs.pop("forced_blocks", None)
        if forced is not None:
            # One more, so that landmarks and empty slots, which get zeros, have none.
            forced = layout.insert(forced + 1, forced.new_zeros(forced.shape[2])) - 1
        context = FullPass(
            settings, self._layer_types, rotations, layout.segments, gate_loss, forced
        )
        return self._run(embeds, layout, context, kwargs)

    def _run(self, embeds: Tensor, layout: TextLayout, context: ForwardContext, kwargs: Any) -> Any:
        """Runs the stock decoder on text and landmarks, and returns its output for text."""
        tokens = embeds.shape[1]
        inserted = layout.insert(embeds, self._landmark(embeds))
        # Later layers get contiguous states as well, so that a compiled layer has one graph.
        output = self.stock(inserted.contiguous(), context, **kwargs)
        return merge([output], lambda states: layout.extract(states[0], tokens))

    def stock(self, embeds: Tensor, context: ForwardContext, **kwargs: Any) -> Any:
        """Runs the stock decoder on slots ``(B, width, hidden)``, all at position 0."""
        zeros = torch.zeros(1, embeds.shape[1], dtype=torch.long, device=embeds.device)
        return super().forward(
            inputs_embeds=embeds,
            position_ids=zeros,
            use_cache=False,
            landmark=context.attend,
            **kwargs,
        )

    def read_chunks(
        self,
        text: Tensor,
        attention_mask: Tensor | None,
        cache: LandmarkCache,
        *,
        settings: LandmarkConfig,
        kwargs: Any,
        retrieve: bool = True,
    ) -> Iterator[Any]:
        """Prefills a cache with a text, chunk by chunk.

        Args:
            text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
            attention_mask: as for ``forward``.
            cache: the cache.
            settings: the landmark settings.
            kwargs: further arguments of the stock decoder.
            retrieve: as for ``extend``.

        Yields:
            the output of each chunk.

        Raises:
            ValueError: as ``forward``.
        """
        if settings.mode == "top_k":
            raise ValueError(
                "mode='top_k' trains in one pass: expected no memory, got one; call "
                "configure_landmark(mode='retrieval') first"
            )
        mask = text_mask(attention_mask, text, cache)
        cache.check(settings, len(text), self)
        with cache.unchanged_on_failure():
            if attention_mask is not None and attention_mask.shape[1] > text.shape[1]:
                cache.hide(attention_mask[:, : -text.shape[1]])
            before = cache.tokens or [0] * len(text)
            new = [text.shape[1]] * len(text) if mask is None else mask.sum(1).tolist()
            longest = max(seen + more for seen, more in zip(before, new, strict=True))
            _check_length(slots_for(longest, settings.block_size), settings)
            for begin in range(0, text.shape[1], settings.chunk_tokens):
                columns = slice(begin, begin + settings.chunk_tokens)
                part = text[:, columns]
                if mask is None:
                    is_text = torch.ones(part.shape[:2], dtype=torch.bool)
                else:
                    is_text = mask[:, columns].cpu()
                yield self.extend(
                    part, is_text, cache, settings=settings, kwargs=kwargs, retrieve=retrieve
                )

    # The tensors of a cache have to be written to outside of inference mode, too.
    @torch.inference_mode(False)
    @torch.no_grad()
    def extend(
        self,
        text: Tensor,
        mask: Tensor,
        cache: LandmarkCache,
        *,
        settings: LandmarkConfig,
        kwargs: Any,
        retrieve: bool = True,
    ) -> Any:
        """Runs one chunk, or one decode step, and adds it to the cache.

        Args:
            text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
            mask: ``(B, T)`` bool on the CPU, True for text.
            cache: the cache.
            settings: the landmark settings.
            kwargs: further arguments of the stock decoder.
            retrieve: whether queries retrieve; otherwise they see their local context and block 0.

        Returns:
            the output of the stock decoder for text.

        Raises:
            ValueError: the model is in train mode.
        """
        if self.training:
            raise ValueError(
                "a memory has no gradient and was used in train mode: train in "
                "configure_landmark(mode='all') or 'top_k' without a cache, or call model.eval()"
            )
        embeds = self._embed(text)
        ids = text if text.ndim == 2 else sketch_of(text)
        size = settings.block_size
        seen = cache.tokens or [0] * len(mask)
        starts = []
        lengths = []
        for before, new in zip(seen, mask.sum(1).tolist(), strict=True):
            start = slots_for(before, size)
            starts.append(start)
            lengths.append(slots_for(before + new, size) - start)
        geometry = make_geometry(starts, lengths, settings)
        if geometry.candidates and retrieve:
            self._warn_untrained(settings)
        width = max(max(lengths), 1)
        context = CachedPass(
            settings=settings,
            layer_types=self._layer_types,
            tables=self._all_tables(),
            cache=cache,
            geometry=geometry,
            retrieve=retrieve,
            dtype=embeds.dtype,
        )
        graph = current_graph()
        if graph is not None and width == 1 and bool(mask.all()):
            output = graph.run(context, self, embeds, kwargs)
            if output is not None:
                cache.commit(mask, ids)
                return output
        device = embeds.device
        layout = padded_layout(mask.to(device), size, torch.tensor(seen).to(device), width)
        retrievals = len(cache.retrievals)
        try:
            output = self._run(embeds, layout, context, kwargs)
        except BaseException:
            cache.rollback(retrievals)
            raise
        cache.commit(mask, ids)
        return output

    def _all_tables(self) -> dict[str | None, RotaryTables]:
        """Returns the rotary tables of each rotary type, made at their first use."""
        if self._tables is None:
            size = self.settings.block_size
            self._tables = {
                kind: RotaryTables(rotary, size) for kind, rotary in self._rotaries.items()
            }
        return self._tables

    def tables_of(self, layer: int) -> RotaryTables:
        """Returns the rotary tables of a layer."""
        return self._all_tables()[self._layer_types[layer]]

    def _by_document(
        self, embeds: Tensor, documents: Tensor, settings: LandmarkConfig, kwargs: Any
    ) -> Any:
        """Reads each document of packed rows as a row of its own."""
        rows = []
        for row, numbers in zip(embeds, documents, strict=True):
            outputs = []
            for document in row.split(numbers.bincount().tolist()):
                cache = LandmarkCache(self.config)
                chunks = self.read_chunks(
                    document[None], None, cache, settings=settings, kwargs=kwargs
                )
                outputs.append(_join(list(chunks)))
            rows.append(_join(outputs))
        return merge(rows, lambda states: torch.cat(states, dim=0))

    def _warn_untrained(self, settings: LandmarkConfig) -> None:
        if not settings.landmark_trained and settings.mode == "retrieval" and not self._warned:
            self._warned = True
            warnings.warn(
                "this model retrieves by a landmark that was never trained: fine-tune it first "
                "(landmark train)",
                stacklevel=2,
            )


def _join(parts: list[Any]) -> Any:
    """Joins the outputs of consecutive columns."""
    return parts[0] if len(parts) == 1 else merge(parts, lambda states: torch.cat(states, dim=1))


def require_landmark_cache(cache: Any) -> LandmarkCache:
    """Returns the cache; raises ``ValueError`` where it is not a ``LandmarkCache``."""
    if not isinstance(cache, LandmarkCache):
        raise ValueError(
            f"expected a LandmarkCache, got {type(cache).__name__}: use "
            "LandmarkCache(model.config), or leave it out"
        )
    return cache


def text_mask(attention_mask: Tensor | None, text: Tensor, cache: Any) -> Tensor | None:
    """Returns the mask of the new columns, ``(B, T)`` bool; ``None`` without an attention mask.

    Args:
        attention_mask: ``(B, T)`` or ``(B, past + T)``.
        text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
        cache: the cache, if any.

    Raises:
        ValueError: a mask of another shape.
    """
    if attention_mask is None:
        return None
    batch, tokens = text.shape[:2]
    past = cache.get_seq_length() if isinstance(cache, LandmarkCache) else 0
    shape: Any = type(attention_mask).__name__
    if isinstance(attention_mask, Tensor):
        shape = tuple(attention_mask.shape)
    if shape not in ((batch, tokens), (batch, past + tokens)):
        raise ValueError(
            f"attention_mask: expected shape ({batch}, {past + tokens}), got {shape}; "
            "landmark models take the two-dimensional padding mask"
        )
    return attention_mask[:, -tokens:].bool()


def _check_balanced(attention_mask: Tensor | None, tokens: int) -> None:
    """Refuses a mask over columns in the cache, which the stock balancing loss cannot take.

    Raises:
        ValueError: the mask covers more than the ``tokens`` new columns.
    """
    if attention_mask is not None and attention_mask.shape[1] != tokens:
        raise ValueError(
            f"output_router_logits: expected an attention_mask of the {tokens} new columns, got "
            f"{attention_mask.shape[1]}; leave the remembered columns out, or set "
            "output_router_logits=False"
        )


def _check_length(slots: int, settings: LandmarkConfig) -> None:
    """Raises ``ValueError`` for a text beyond the trained length under exact positions."""
    trained = settings.trained_length
    if settings.mode != "retrieval" or settings.positions != "exact" or trained is None:
        return
    if slots > trained:
        raise ValueError(
            f"exact positions reach {slots}, the model was trained on {trained}: use stingy "
            "positions or less text"
        )


def _documents(
    text: Tensor,
    seq_idx: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    *,
    may_be_packed: bool,
) -> Tensor | None:
    """Returns the document of each column of packed rows, ``(B, T)`` rising from 0.

    Args:
        text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
        seq_idx: as for ``forward``.
        position_ids: as for ``forward``.
        kwargs: further arguments of ``forward``; those about packed rows are removed.
        may_be_packed: whether there is neither a mask nor a cache.

    Returns:
        the documents; ``None`` where nothing says that rows are packed.

    Raises:
        ValueError: packed rows with a mask or a cache, or arguments of other shapes.
    """
    borders = kwargs.pop("cu_seq_lens_q", None)
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    if (seq_idx is not None or borders is not None) and not may_be_packed:
        raise ValueError(
            "packed rows (seq_idx, cu_seq_lens_q): expected no attention_mask and no cache; drop "
            "them"
        )
    batch, tokens = text.shape[:2]
    if seq_idx is not None:
        if seq_idx.shape != (batch, tokens):
            raise ValueError(
                f"seq_idx: expected shape {(batch, tokens)} as the text, got {tuple(seq_idx.shape)}"
            )
        return document_numbers(seq_idx)
    if borders is not None:
        if batch != 1:
            raise ValueError(
                f"cu_seq_lens_q: expected one flattened row, got {batch}; pass seq_idx for more"
            )
        columns = torch.arange(tokens, device=borders.device)
        return document_numbers(
            torch.searchsorted(borders[1:].contiguous(), columns, right=True)[None]
        )
    if position_ids is not None and may_be_packed:
        return documents_by_position(position_ids.expand(batch, -1))
    return None
