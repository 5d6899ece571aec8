"""A memory that was read before goes on in ``generate``: every way of decoding, rows that ended
early, given text.

What is expected comes from the same model without a memory, which ``test_generation.py`` holds
against the one-pass forward; of a row in a batch, from that row alone.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import models
from landmark import LandmarkCache, LandmarkConfig
from landmark.hf.compat import CACHE

pytestmark = pytest.mark.usefixtures("wide_norms")

BLOCK = 5
READ = 29
END = models.VOCAB - 1  # ends a text where a decoding of older versions needs one
TIERS = ("device", "host", "disk")
WAYS: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assistant model": {},
    "early exit": {"assistant_early_exit": 1},
}


def family(name: str = "llama") -> Any:
    return models.converted_family(name, BLOCK)


def assistant() -> Any:
    return models.family_model("llama", layers=1, seed=7)


def prompt(rows: int = 1, tokens: int = 43) -> torch.Tensor:
    return models.text(rows * tokens, seed=3).view(rows, tokens)


def greedy(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids, do_sample=False, **{"max_new_tokens": 12, **options})


def read(model: Any, ids: torch.Tensor, tier: str = "device") -> LandmarkCache:
    return model.read(ids, cache=LandmarkCache(model.config, tier))


# Assisted decoding.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_assisted_decoding_goes_on_from_what_was_read(name: str, way: str) -> None:
    if way == "early exit" and models.OLD_ASSISTED:
        pytest.skip("early exit raises in stock transformers before 5.13")
    model = family(name)
    ids = prompt()
    options = {**WAYS[way], "eos_token_id": END}
    if way == "assistant model":
        options["assistant_model"] = assistant()
    memory = read(model, ids[:, :READ])
    found = greedy(model, ids, past_key_values=memory, **options)
    expected = greedy(model, ids, eos_token_id=END)
    if models.OLD_ASSISTED:  # stock prompt lookup may go one token beyond max_new_tokens there
        assert torch.equal(found[:, : expected.shape[1]], expected)
    else:
        assert torch.equal(found, expected)
    assert memory.tokens == [found.shape[1] - 1]


@pytest.mark.parametrize("way", ["prompt lookup", "assistant model"])
def test_assisted_decoding_of_new_text_alone_is_right_or_refused(way: str) -> None:
    model = family()
    ids = prompt()
    options = {**WAYS[way], "eos_token_id": END, "attention_mask": torch.ones_like(ids)}
    if way == "assistant model":
        options["assistant_model"] = assistant()
    memory = read(model, ids[:, :READ])
    if models.OLD_ASSISTED:
        with pytest.raises(ValueError, match="pass the whole text"):
            greedy(model, ids[:, READ:], past_key_values=memory, **options)
        assert memory.tokens == [READ]
    else:
        found = greedy(model, ids[:, READ:], past_key_values=memory, **options)
        assert torch.equal(found, greedy(model, ids, eos_token_id=END)[:, READ:])


# Beams and several answers.


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 9},
        {"num_beams": 2, "do_sample": True, "top_k": 9},
    ],
    ids=["beams", "beams and answers", "answers", "sampled beams"],
)
@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_one_memory_serves_beams_and_several_answers(name: str, options: dict[str, Any]) -> None:
    model = family(name)
    ids = prompt()
    torch.manual_seed(1)
    expected = (
        greedy(model, ids) if not options else model.generate(ids, max_new_tokens=9, **options)
    )
    memory = read(model, ids[:, :READ])
    torch.manual_seed(1)
    found = model.generate(ids, past_key_values=memory, max_new_tokens=9, **options)
    assert torch.equal(found, expected)
    assert memory.batch_size == max(
        options.get("num_beams", 1), options.get("num_return_sequences", 1)
    )


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("by_hand", [False, True])
def test_rows_are_repeated_on_every_tier(tier: str, by_hand: bool) -> None:
    model = family()
    ids = prompt(2)
    memory = read(model, ids[:, :READ], tier)
    if by_hand:
        memory.batch_repeat_interleave(3)
    found = greedy(model, ids, past_key_values=memory, num_beams=3)
    assert torch.equal(found, greedy(model, ids, num_beams=3))


def test_a_refused_option_repeats_no_rows() -> None:
    model = family()
    ids = prompt()
    memory = read(model, ids[:, :READ])
    with pytest.raises(ValueError):
        model.generate(ids, past_key_values=memory, num_beams=3, max_new_tokens=-1)
    assert memory.tokens == [READ]
    assert torch.equal(greedy(model, ids, past_key_values=memory), greedy(model, ids))


# Rows that ended early, and masks over what was remembered.


def early_end(model: Any) -> tuple[torch.Tensor, int]:
    """Returns two rows, and a token that row 0 writes among its first ten and row 1 does not."""
    for seed in range(20):
        ids = models.text(2 * 27, seed).view(2, 27)
        first, second = greedy(model, ids, suppress_tokens=[0])[:, ids.shape[1] :].tolist()
        for token in first[:10]:
            if token not in second:
                return ids, token
    raise AssertionError("no early end")


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_a_row_that_ended_early_goes_on_behind_its_end(name: str) -> None:
    model = family(name)
    ids, end = early_end(model)
    options = {"eos_token_id": end, "pad_token_id": 0, "suppress_tokens": [0]}
    memory = None
    text = ids
    for turn in range(3):
        mask = (text != 0).long()
        out = greedy(
            model,
            text,
            attention_mask=mask,
            past_key_values=memory,
            return_dict_in_generate=True,
            **options,
        )
        memory = out[CACHE]
        for row, before in zip(out.sequences, text, strict=True):
            alone = greedy(model, before[before != 0][None], **options)[0]
            assert row[row != 0].tolist() == alone[alone != 0].tolist(), f"turn {turn}"
        said = models.text(2 * 6, seed=20 + turn).view(2, 6)
        text = torch.cat([out.sequences, said], dim=1)
    assert memory.tokens[0] != memory.tokens[1]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("hidden", [(0, 0), (1, 0), (0, 7), (3, 12), (BLOCK, 2 * BLOCK), (READ, 1)])
def test_a_mask_takes_back_the_last_tokens_of_each_row(tier: str, hidden: tuple[int, int]) -> None:
    model = family()
    ids = prompt(2)[:, :READ]
    more = prompt(2, 9)
    memory = read(model, ids, tier)
    mask = torch.ones(2, READ, dtype=torch.long)
    for row, count in enumerate(hidden):
        mask[row, READ - count :] = 0
    whole = torch.cat([mask, torch.ones_like(more)], dim=1)
    logits = model(more, attention_mask=whole, past_key_values=memory).logits
    assert memory.tokens == [READ - count + 9 for count in hidden]
    for row, count in enumerate(hidden):
        alone = torch.cat([ids[row, : READ - count], more[row]])
        assert (logits[row] - model(alone[None]).logits[0, -9:]).abs().max() < 1e-10
        assert memory.ids(row).tolist() == alone.tolist()


def test_read_hides_as_forward_does() -> None:
    model = family()
    ids = prompt(2)[:, :READ]
    more = prompt(2, 9)
    mask = torch.ones(2, READ + 9, dtype=torch.long)
    mask[0, READ - 4 : READ] = 0
    memory = model.read(more, attention_mask=mask, cache=read(model, ids))
    assert memory.tokens == [READ + 5, READ + 9]
    assert memory.ids(0).tolist() == [*ids[0, : READ - 4].tolist(), *more[0].tolist()]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (READ - 3, 0, "0 over a token before one that stays"),
        (1, 1, "1 over a column that was read as padding"),
    ],
)
def test_other_masks_over_what_was_read_are_refused_and_change_nothing(
    column: int, value: int, message: str
) -> None:
    model = family()
    ids = prompt(2)[:, :READ]
    more = prompt(2, 4)
    mask = torch.ones(2, READ + 4, dtype=torch.long)
    mask[1, :3] = 0
    memory = model.read(ids, attention_mask=mask[:, :READ])
    expected = model(more, past_key_values=memory.fork()).logits
    wrong = mask.clone()
    wrong[1, column] = value
    for call in (model, model.read):
        name = "past_key_values" if call is model else "cache"
        with pytest.raises(ValueError, match=message):
            call(more, attention_mask=wrong, **{name: memory})
    assert memory.tokens == [READ, READ - 3]
    assert torch.equal(model(more, attention_mask=mask, past_key_values=memory).logits, expected)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("by", ["forward", "generate", "read"])
def test_what_was_hidden_stays_hidden_when_a_layer_fails(by: str, layer: int, tier: str) -> None:
    """The layers before it have new keys in the place of the hidden tokens."""
    model = family()
    ids = prompt()[:, :READ]
    more = prompt(1, 9)
    memory = read(model, ids, tier)
    mask = torch.ones(1, READ + 9, dtype=torch.long)
    memory.record = True
    mask[:, READ - 8 : READ] = 0

    def fail(*_: Any) -> None:
        raise InterruptedError

    calls = {
        "forward": lambda: model(more, attention_mask=mask, past_key_values=memory),
        "generate": lambda: greedy(model, more, attention_mask=mask, past_key_values=memory),
        "read": lambda: model.read(more, attention_mask=mask, cache=memory),
    }
    with (
        pytest.raises(InterruptedError),
        model.base_model.layers[layer].register_forward_hook(fail),
    ):
        calls[by]()
    assert (
        memory.tokens == [READ - 8] and memory.get_seq_length() == READ and memory.retrievals == []
    )
    found = model(more, past_key_values=memory).logits
    alone = torch.cat([ids[:, : READ - 8], more], dim=1)
    assert (found - model(alone).logits[:, -9:]).abs().max() < 1e-10


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_refuses_a_mask_of_ones_over_what_was_read_as_padding(
    options: dict[str, Any],
) -> None:
    model = family()
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    memory = model.read(ids[:, :READ], attention_mask=mask[:, :READ])
    with pytest.raises(ValueError, match="1 over a column that was read as padding"):
        greedy(model, ids, attention_mask=torch.ones_like(ids), past_key_values=memory, **options)
    assert memory.tokens == [READ - 4, READ]
    found = greedy(model, ids, attention_mask=mask, past_key_values=memory, **options)
    assert torch.equal(found, greedy(model, ids, attention_mask=mask, **options))


MASKS = {
    "of the new columns, whole text": lambda ids: torch.ones_like(ids)[:, READ:],
    "too long": lambda ids: torch.ones_like(torch.cat([ids, ids], dim=1)),
    "of other rows": lambda ids: torch.ones_like(ids).repeat(3, 1),
    "a list": lambda ids: torch.ones_like(ids).tolist(),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("zero", [False, True])
def test_generate_refuses_masks_of_other_shapes_before_it_reads(name: str, zero: bool) -> None:
    model = family()
    ids = prompt(2)
    mask = MASKS[name](ids)
    mask[0][0] = 1 - int(zero)
    memory = read(model, ids[:, :READ])
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        greedy(model, ids, attention_mask=mask, past_key_values=memory)
    assert memory.tokens == [READ, READ]


# The text that is given with a memory.


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
@pytest.mark.parametrize("behind", [0, 1, 7, BLOCK - 1])
def test_text_that_begins_with_the_memory_continues_it(name: str, behind: int) -> None:
    """Behind 0: exactly what was read, so that its last token is computed again."""
    model = family(name)
    ids = prompt(tokens=READ + behind)
    memory = read(model, ids[:, :READ])
    assert torch.equal(greedy(model, ids, past_key_values=memory), greedy(model, ids))
    assert memory.tokens == [READ + behind + 11]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("tokens", [BLOCK - 1, 2 * (BLOCK - 1), 2 * BLOCK, 1, READ])
def test_exactly_the_memory_at_every_place_of_a_block(tier: str, tokens: int) -> None:
    model = family()
    ids = prompt(tokens=tokens)
    memory = read(model, ids, tier)
    assert torch.equal(greedy(model, ids, past_key_values=memory), greedy(model, ids))


def other(ids: torch.Tensor) -> torch.Tensor:
    ids = ids.clone()
    ids[0, 17] = ids[0, 17] % (models.VOCAB - 1) + 1
    return ids


GIVEN = {
    "the question alone": (lambda ids: ids[:, READ:], "column 0 on"),
    "another text": (other, "column 17 on"),
    "a shorter text": (lambda ids: ids[:, : READ - 4], f"column {READ - 4} on"),
    "rows that differ": (lambda ids: torch.cat([ids, other(ids)]), "column 17 on"),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "uncached"]
)
def test_other_text_than_the_memory_is_refused_by_its_first_column(
    given: str, options: dict[str, Any]
) -> None:
    model = family()
    ids = prompt()
    change, message = GIVEN[given]
    memory = read(model, ids[:, :READ])
    with pytest.raises(ValueError, match=message) as caught:
        greedy(model, change(ids), past_key_values=memory, **options)
    assert "\n" not in str(caught.value)
    assert memory.tokens == [READ]
    assert torch.equal(greedy(model, ids, past_key_values=memory), greedy(model, ids))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_new_text_alone_is_taken_with_a_mask_over_all_columns(
    name: str, options: dict[str, Any]
) -> None:
    model = family(name)
    ids = prompt()
    memory = read(model, ids[:, :READ])
    mask = torch.ones_like(ids)
    found = greedy(model, ids[:, READ:], attention_mask=mask, past_key_values=memory, **options)
    assert torch.equal(found, greedy(model, ids, **options)[:, READ:])


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_a_memory_is_used_without_use_cache_too(name: str) -> None:
    model = family(name)
    ids = prompt()
    memory = read(model, ids[:, :READ])
    assert torch.equal(
        greedy(model, ids, past_key_values=memory, use_cache=False), greedy(model, ids)
    )


def embedded(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.get_input_embeddings()(ids)


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_embeddings_of_the_whole_text_continue_a_memory(name: str) -> None:
    model = family(name)
    ids = prompt()
    memory = read(model, ids[:, :READ])
    found = greedy(model, None, inputs_embeds=embedded(model, ids), past_key_values=memory)
    assert torch.equal(found, greedy(model, ids)[:, ids.shape[1] :])


@pytest.mark.parametrize("begin", [READ, 1])
def test_embeddings_of_new_text_alone_are_refused_or_right(begin: int) -> None:
    model = family()
    ids = prompt(tokens=3 * READ)
    embeds = embedded(model, ids)
    memory = read(model, ids[:, :READ])
    with pytest.raises(ValueError, match="column 0 on"):
        greedy(model, None, inputs_embeds=embeds[:, begin:], past_key_values=memory)
    mask = torch.ones_like(ids)
    found = greedy(
        model, None, inputs_embeds=embeds[:, READ:], attention_mask=mask, past_key_values=memory
    )
    assert torch.equal(found, greedy(model, ids)[:, ids.shape[1] :])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "uncached"]
)
@pytest.mark.parametrize("behind", [0, 1, 9])
def test_embeddings_continue_a_memory_of_embeddings(behind: int, options: dict[str, Any]) -> None:
    model = family()
    ids = prompt(tokens=READ + behind)
    embeds = embedded(model, ids)
    expected = greedy(model, ids, **options)[:, ids.shape[1] :]
    for again in (embeds, embeds.bfloat16().double()):
        memory = LandmarkCache(model.config)
        model(inputs_embeds=embeds[:, :READ], past_key_values=memory)
        assert memory.ids().tolist() == [-1] * READ
        found = greedy(model, None, inputs_embeds=again, past_key_values=memory, **options)
        if again is embeds:  # rounded ones are taken as the same text, and say what they say
            assert torch.equal(found, expected)
    if behind:
        memory = LandmarkCache(model.config)
        model(inputs_embeds=embeds[:, :READ], past_key_values=memory)
        new = embeds[:, READ:]
        mask = torch.ones_like(ids)
        found = greedy(
            model, None, inputs_embeds=new, attention_mask=mask, past_key_values=memory, **options
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_other_text_than_a_memory_of_embeddings_is_refused(given: str, name: str) -> None:
    model = family(name)
    ids = prompt(tokens=2 * READ)
    memory = LandmarkCache(model.config)
    model(inputs_embeds=embedded(model, ids[:, :READ]), past_key_values=memory)

    def goes_on(text: torch.Tensor) -> torch.Tensor:
        if given == "ids":
            return greedy(model, text, past_key_values=memory)[:, text.shape[1] :]
        return greedy(model, None, inputs_embeds=embedded(model, text), past_key_values=memory)

    for wrong, message in ((other(ids), "column 17 on"), (ids[:, READ - 1 :], "column 0 on")):
        with pytest.raises(ValueError, match=message):
            goes_on(wrong)
    assert memory.tokens == [READ]
    assert torch.equal(goes_on(ids), greedy(model, ids)[:, ids.shape[1] :])


@pytest.mark.parametrize("mode", ["retrieval", "all"])
@pytest.mark.parametrize(
    "cache",
    [DynamicCache(), ((torch.zeros(1), torch.zeros(1)),), "none"],
    ids=["stock", "tuple", "text"],
)
def test_what_is_no_landmark_cache_is_refused(mode: str, cache: Any) -> None:
    model = family()
    ids = prompt()
    model.configure_landmark(mode=mode)
    mask = torch.ones(1, ids.shape[1] + 4)  # as prefix tuning makes it
    try:
        for call in (
            lambda: model(ids, attention_mask=mask, past_key_values=cache),
            lambda: model.read(ids, cache=cache),
            lambda: greedy(model, ids, past_key_values=cache),
        ):
            with pytest.raises(ValueError, match="expected a LandmarkCache, got"):
                call()
    finally:
        model.configure_landmark(mode="retrieval")


def test_a_memory_of_another_model_is_refused() -> None:
    config = LandmarkConfig(block_size=BLOCK, top_k=2)
    ours = models.landmark_model("llama", config)
    same = copy.deepcopy(ours)
    moved = copy.deepcopy(ours)
    with torch.no_grad():
        moved.model.layers[1].self_attn.k_proj.weight.add_(0.1)
    ids = prompt()
    deep = models.landmark_model("llama", config, layers=3)
    memory = ours.read(ids[:, :READ])
    for wrong, message in ((moved, "other weights"), (deep, "other weights")):
        with pytest.raises(ValueError, match=message):
            wrong.read(ids[:, READ:], cache=memory)
        with pytest.raises(ValueError, match=message):
            greedy(wrong, ids, past_key_values=memory)
    assert memory.tokens == [READ]
    assert torch.equal(greedy(same, ids, past_key_values=memory), greedy(ours, ids))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_are_taken(name: str) -> None:
    model = family()
    ids = prompt()
    expected = greedy(model, ids)
    given = {name: read(model, ids[:, :READ])}
    assert torch.equal(greedy(model, ids, **{name: read(model, ids[:, :READ])}), expected)
    assert torch.equal(
        model(ids[:, READ:], **given).logits[:, -1].argmax(-1), expected[:, ids.shape[1]]
    )
    states = model.base_model(ids[:, READ:], **{name: read(model, ids[:, :READ])})
    assert states[CACHE].tokens == [ids.shape[1]]


def test_a_cache_under_both_names_is_refused() -> None:
    model = family()
    ids = prompt()
    both = {"cache": read(model, ids), "past_key_values": read(model, ids)}
    for call in (model, model.base_model, model.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(ids, **both)
