"""The mixin that makes a landmark decoder of a stock decoder.

Text goes in, landmarks are inserted as embeddings inside the decoder, the stock decoder runs on
them with all positions 0 (so that queries and keys arrive un-rotated at the attention function),
and the states of text come out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from landmark.blocks import slots_for
from landmark.config import LandmarkConfig
from landmark.hf.attempts import kept_on_failure
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
from landmark.hf.decode_graph import current
from landmark.hf.layout import Layout, documents_of, packed_layout, padded_layout, plain_layout
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
        self._layer_types = _keys(layer_types(config), self._rotaries)
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
            attention_mask: ``(B, T)`` or ``(B, past + T)``, 0 for padding, which may stand
                anywhere. A 0 over the last tokens that a row has remembered takes them back
                (``LandmarkCache.hide``).
            position_ids: ``(B, T)``; without a mask or a cache, a new document begins wherever they
                do not go on (packed rows). Otherwise ignored: slots come from the mask.
            past_key_values: a ``LandmarkCache`` to read and to extend; ``cache`` is another name
                for it.
            inputs_embeds: see ``input_ids``.
            use_cache: whether to return the cache; it never changes what is computed.
            seq_idx: ``(B, T)`` document of each column of packed rows, instead of ``position_ids``;
                ``cu_seq_lens_q``, the documents' borders in one flattened row, does as well.
            cache: see ``past_key_values``.
            **kwargs: passed to the stock decoder.

        Returns:
            ``BaseModelOutputWithPast`` whose states align with the text, zeros at padding.

        Raises:
            ValueError: arguments that do not fit, a foreign cache, retrieval in train mode, or a
                text beyond the trained length under exact positions.
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
        cache = cache_by_installed_name({"cache": cache, "past_key_values": past_key_values}).get(
            CACHE
        )
        if cache is not None:
            require_landmark_cache(cache)
        mask = text_mask(attention_mask, text, cache)
        if kwargs.get("output_router_logits"):
            _check_balanced(attention_mask, text.shape[1])
        documents = _documents(
            text, seq_idx, position_ids, kwargs, whole=mask is None and cache is None
        )
        if settings.mode == "all" and cache is None:
            output = self._one_pass(self._embed(text), mask, documents, settings, kwargs)
        elif documents is not None and bool((documents != documents[:, :1]).any()):
            with torch.no_grad():
                output = self._by_document(self._embed(text), documents, settings, kwargs)
        else:
            cache = LandmarkCache(self.config) if cache is None else cache
            output = _join(list(self.read_chunks(text, attention_mask, cache, settings, kwargs)))
            if self.config.use_cache if use_cache is None else use_cache:
                output[CACHE] = cache
        return output if return_dict is not False else output.to_tuple()

    def _embed(self, text: Tensor) -> Tensor:
        """Returns the embeddings of token ids ``(B, T)``; embeddings ``(B, T, hidden)`` as they
        are.

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
        index = torch.zeros(1, dtype=torch.long, device=like.device)
        embedding: Tensor = self.landmark_embedding(index)[0]
        return embedding.to(like.device)

    def _one_pass(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        settings: LandmarkConfig,
        kwargs: Any,
    ) -> Any:
        tokens = embeds.shape[1]
        size = settings.block_size
        if documents is not None:
            layout = packed_layout(documents, size)
        elif mask is not None:
            layout = padded_layout(mask, size)
        else:
            layout = plain_layout(tokens, size, embeds.device)
        positions = layout.positions
        if self.training and settings.position_gap:
            positions = _with_gaps(positions, len(embeds), size, settings.position_gap)
        rotations = {
            kind: rotary.rotation(
                positions if positions.ndim == 1 else positions[:, None], embeds.dtype
            )
            for kind, rotary in self._rotaries.items()
        }
        call = FullPass(settings, self._layer_types, rotations, layout.segments)
        return self._run(embeds, layout, call, kwargs)

    def _run(self, embeds: Tensor, layout: Layout, call: ForwardContext, kwargs: Any) -> Any:
        tokens = embeds.shape[1]
        inserted = layout.insert(
            embeds, self._landmark(embeds)
        ).contiguous()  # as later layers get it: one graph
        output = self.stock(inserted, call, **kwargs)
        return merge([output], lambda states: layout.extract(states[0], tokens))

    def stock(self, embeds: Tensor, call: ForwardContext, **kwargs: Any) -> Any:
        """Runs the stock decoder on slots ``(B, width, hidden)``, all at position 0."""
        zeros = torch.zeros(1, embeds.shape[1], dtype=torch.long, device=embeds.device)
        return super().forward(
            inputs_embeds=embeds, position_ids=zeros, use_cache=False, landmark=call, **kwargs
        )

    def read_chunks(
        self,
        text: Tensor,
        attention_mask: Tensor | None,
        cache: LandmarkCache,
        settings: LandmarkConfig,
        kwargs: Any,
        *,
        retrieve: bool = True,
    ) -> Iterator[Any]:
        """Reads a text into a memory, chunk by chunk.

        Args:
            text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
            attention_mask: as for ``forward``.
            cache: the memory.
            settings: the landmark settings.
            kwargs: for the stock decoder.
            retrieve: as for ``extend``.

        Yields:
            the output of each chunk.

        Raises:
            ValueError: as ``forward``.
        """
        mask = text_mask(attention_mask, text, cache)
        cache.check(settings, len(text), self)
        with kept_on_failure(cache):
            if attention_mask is not None and attention_mask.shape[1] > text.shape[1]:
                cache.hide(attention_mask[:, : -text.shape[1]])
            counts = [text.shape[1]] * len(text) if mask is None else mask.sum(1).tolist()
            longest = max(map(sum, zip(cache.tokens or [0] * len(text), counts, strict=True)))
            self._check_length(slots_for(longest, settings.block_size), settings)
            for begin in range(0, text.shape[1], settings.chunk_tokens):
                columns = slice(begin, begin + settings.chunk_tokens)
                part = text[:, columns]
                seen = (
                    torch.ones(part.shape[:2], dtype=torch.bool)
                    if mask is None
                    else mask[:, columns].cpu()
                )
                yield self.extend(part, seen, cache, settings, kwargs, retrieve=retrieve)

    @torch.inference_mode(
        False
    )  # what a memory keeps has to be written to outside of inference mode, too
    @torch.no_grad()
    def extend(
        self,
        text: Tensor,
        mask: Tensor,
        cache: LandmarkCache,
        settings: LandmarkConfig,
        kwargs: Any,
        *,
        retrieve: bool = True,
    ) -> Any:
        """Runs one chunk against the cache and files it.

        Args:
            text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
            mask: ``(B, T)`` bool on the CPU, True for text.
            cache: the memory.
            settings: the landmark settings.
            kwargs: for the stock decoder.
            retrieve: whether to retrieve; otherwise the local context and block 0 are seen.
        """
        if self.training:
            raise ValueError(
                "a memory has no gradient and was used in train mode: use "
                "configure_landmark(mode='all') without a cache to train, or model.eval()"
            )
        embeds = self._embed(text)
        ids = text if text.ndim == 2 else sketch_of(text)
        counts = mask.sum(1).tolist()
        seen = cache.tokens or [0] * len(counts)
        starts = [slots_for(n, settings.block_size) for n in seen]
        ends = [slots_for(n + c, settings.block_size) for n, c in zip(seen, counts, strict=True)]
        plan = make_geometry(starts, [e - s for s, e in zip(starts, ends, strict=True)], settings)
        if plan.candidates and retrieve:
            self._warn_untrained(settings)
        width = plan.flat_index.shape[1]
        call = CachedPass(
            settings, self._layer_types, self._all_tables(), cache, plan, retrieve, embeds.dtype
        )
        steps = current()
        if steps is not None and width == 1 and bool(mask.all()):
            output = steps.run(call, self, embeds, kwargs)
            if output is not None:
                cache.append(mask, ids)
                return output
        layout = padded_layout(
            mask.to(embeds.device), settings.block_size, torch.tensor(seen).to(embeds.device), width
        )
        retrieved = len(cache.retrievals)
        try:
            output = self._run(embeds, layout, call, kwargs)
        except BaseException:
            cache.undo(retrieved)
            raise
        cache.append(mask, ids)
        return output

    def _all_tables(self) -> dict[str | None, RotaryTables]:
        if self._tables is None:
            size = self.settings.block_size
            self._tables = {
                kind: RotaryTables(rotary, size) for kind, rotary in self._rotaries.items()
            }
        return self._tables

    def tables_of(self, layer: int) -> RotaryTables:
        """Returns the rotations of a layer's memory."""
        return self._all_tables()[self._layer_types[layer]]

    def _by_document(
        self, embeds: Tensor, documents: Tensor, settings: LandmarkConfig, kwargs: Any
    ) -> Any:
        """Reads each document of packed rows as a row of its own."""
        changes = torch.nn.functional.pad(
            (documents[:, 1:] != documents[:, :-1]).long().cumsum(1), (1, 0)
        )
        rows = []
        for row, document_of in zip(embeds, changes, strict=True):
            documents_read = []
            for document in row.split(document_of.bincount().tolist()):
                chunks = self.read_chunks(
                    document[None], None, LandmarkCache(self.config), settings, kwargs
                )
                documents_read.append(_join(list(chunks)))
            rows.append(_join(documents_read))
        return merge(rows, lambda states: torch.cat(states, dim=0))

    def _check_length(self, slots: int, settings: LandmarkConfig) -> None:
        trained = settings.trained_length
        if (
            settings.mode == "retrieval"
            and settings.positions == "exact"
            and trained is not None
            and slots > trained
        ):
            raise ValueError(
                f"exact positions reach {slots}, the model was trained on {trained}: use stingy "
                "positions or less text"
            )

    def _warn_untrained(self, settings: LandmarkConfig) -> None:
        if not settings.landmark_trained and settings.mode == "retrieval" and not self._warned:
            self._warned = True
            warnings.warn(
                "this model retrieves by a landmark that was never trained: fine-tune it first "
                "(landmark train)",
                stacklevel=2,
            )


def _keys(types: tuple[str | None, ...], rotaries: dict[str | None, Any]) -> tuple[str | None, ...]:
    return tuple(kind if kind in rotaries else None for kind in types)


def _join(parts: list[Any]) -> Any:
    """Joins the outputs of consecutive columns."""
    return parts[0] if len(parts) == 1 else merge(parts, lambda states: torch.cat(states, dim=1))


def require_landmark_cache(cache: Any) -> LandmarkCache:
    """Returns a cache that can hold landmarks; raises ``ValueError`` for any other."""
    if not isinstance(cache, LandmarkCache):
        raise ValueError(
            f"expected a LandmarkCache, got {type(cache).__name__}: use "
            "LandmarkCache(model.config), or leave it out"
        )
    return cache


def text_mask(attention_mask: Tensor | None, text: Tensor, cache: Any) -> Tensor | None:
    """Returns the new columns' mask ``(B, T)`` bool, or ``None`` where there is no padding to know
    of.
    """
    if attention_mask is None:
        return None
    batch, tokens = text.shape[:2]
    past = cache.get_seq_length() if isinstance(cache, LandmarkCache) else 0
    shape = (
        tuple(attention_mask.shape)
        if isinstance(attention_mask, Tensor)
        else type(attention_mask).__name__
    )
    if shape not in ((batch, tokens), (batch, past + tokens)):
        raise ValueError(
            f"attention_mask: expected shape ({batch}, {past + tokens}), got {shape}; "
            "landmark models take the two-dimensional padding mask"
        )
    return attention_mask[:, -tokens:].bool()


def _check_balanced(attention_mask: Tensor | None, tokens: int) -> None:
    """Raises ``ValueError`` for a mask over remembered columns, which the stock balancing loss
    cannot take.
    """
    if attention_mask is not None and attention_mask.shape[1] != tokens:
        raise ValueError(
            f"output_router_logits: expected an attention_mask of the {tokens} new columns, got "
            f"{attention_mask.shape[1]}; leave the remembered columns out, or set "
            "output_router_logits=False"
        )


def _documents(
    text: Tensor,
    seq_idx: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    *,
    whole: bool,
) -> Tensor | None:
    """Returns the document of each column, ``(B, T)`` rising from 0, or ``None`` for rows of one
    document.

    ``whole`` says that there is neither a mask nor a cache.
    """
    borders = kwargs.pop("cu_seq_lens_q", None)
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    if (seq_idx is not None or borders is not None) and not whole:
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
        return torch.nn.functional.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long().cumsum(1), (1, 0))
    if borders is not None:
        if batch != 1:
            raise ValueError(
                f"cu_seq_lens_q: expected one flattened row, got {batch}; pass seq_idx for more"
            )
        return torch.searchsorted(
            borders[1:].contiguous(), torch.arange(tokens, device=borders.device), right=True
        )[None]
    return (
        documents_of(position_ids.expand(batch, -1)) if whole and position_ids is not None else None
    )


def _with_gaps(positions: Tensor, batch: int, block_size: int, largest: int) -> Tensor:
    """Lets positions jump after landmarks: ``(width,)`` or ``(B, width)`` to ``(B, width)``."""
    width = positions.shape[-1]
    device = positions.device
    reach = (torch.rand(batch, 1, device=device) * (largest + 1)).floor()
    reach = reach * (torch.rand(batch, 1, device=device) < 0.5)
    gaps = (torch.rand(batch, width // block_size + 1, device=device) * (reach + 1)).floor().long()
    total = torch.nn.functional.pad(gaps.cumsum(1), (1, 0))
    blocks = (positions // block_size).expand(batch, width)
    return positions + total.gather(1, blocks)
