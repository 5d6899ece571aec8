"""The demo: keys hidden in a long real text, answers, and what was read for each.

One of the memories is saved, opened again and asked once more.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark.blocks import slot_of
from landmark.data.encoding import Progress
from landmark.eval.dense import DenseRun
from landmark.eval.episodes import Episode, build_episode, named_codes, pass_key
from landmark.eval.fillers import Filler, made_filler, pydoc_text
from landmark.eval.measure import measured
from landmark.eval.plots import save, subplots
from landmark.eval.results import FIGURES, PasskeyRow, read
from landmark.hf.bundled import model_path
from landmark.hf.cache import LandmarkCache
from landmark.texts.explain import block_shares
from landmark.texts.files import file_text
from landmark.texts.loading import LoadedModel
from landmark.texts.reading import read_into_memory

LENGTHS = (1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536)
DENSE_LENGTH = 32768
DISTRACTORS = 4
_WARM_UP = 256  # tokens read before anything is timed


@dataclass(frozen=True)
class BlockRead:
    """A block that was read while the answer was given.

    Attributes:
        block: its index in the document.
        place: its middle, as a share of the document.
        share: mean gate weight over layers, heads and the tokens of the answer.
        text: its text.
        has_fact: whether it holds a part of the sentence that was asked for.
    """

    block: int
    place: float
    share: float
    text: str
    has_fact: bool


@dataclass(frozen=True)
class Reopened:
    """A memory that was saved, opened on tier ``disk`` and asked the same question on a fork.

    Attributes:
        saved_bytes: of its folder.
        save_seconds: until all of it was on the disk.
        open_seconds: opening it, which reads no blocks but block 0.
        answer: what the model wrote.
        same: whether these are the tokens that it wrote before.
        answer_seconds: reading the question and writing the answer.
        fetched_bytes: blocks read from the folder for that.
    """

    saved_bytes: int
    save_seconds: float
    open_seconds: float
    answer: str
    same: bool
    answer_seconds: float
    fetched_bytes: int


@dataclass(frozen=True)
class Trial:
    """One document, its question and what came out.

    Attributes:
        length: text tokens of the document.
        place: token index of the key's sentence.
        expected: the key.
        answer: what the model wrote.
        right: whether they are the same.
        blocks: retrieved blocks, most read first.
        read_seconds: reading the document.
        answer_seconds: reading the question and writing the answer.
        peak_bytes: see ``Measure``.
        cache_bytes: keys and values remembered.
        keys_per_query: most keys that one query is compared with in each layer and head, landmarks
            included.
        reopened: what its memory did after it was saved and opened; ``None`` where that was not
            asked for.
    """

    length: int
    place: int
    expected: str
    answer: str
    right: bool
    blocks: tuple[BlockRead, ...]
    read_seconds: float
    answer_seconds: float
    peak_bytes: int | None
    cache_bytes: int
    keys_per_query: int
    reopened: Reopened | None = None


def load_text(path: Path | None, tokenizer: Any, progress: Progress | None = None) -> Filler:
    """Tokenises the user's text, or the language reference of this Python for ``None``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, no UTF-8 text, or too short to hide keys in.
    """
    text = pydoc_text() if path is None else file_text(path, "text")
    filler = made_filler("pydoc" if path is None else str(path), text, tokenizer, progress, "text")
    if len(filler.ids) < LENGTHS[0]:
        raise ValueError(
            f"text: expected a text of at least {LENGTHS[0]} tokens, got {len(filler.ids)} in "
            f"{filler.name}; pass a longer one"
        )
    return filler


def lengths_for(filler: Filler) -> tuple[int, ...]:
    """Returns the lengths of the ten documents, none longer than the text."""
    return tuple(min(length, len(filler.ids)) for length in LENGTHS)


def run_trials(
    loaded: LoadedModel, filler: Filler, seed: int, progress: Progress | None = None
) -> Iterator[Trial]:
    """Hides a pass key among other codes at a random place and asks for it, ten times.

    One of the memories is reopened.
    """
    loaded.model.read(filler.ids[None, :_WARM_UP].to(loaded.device), retrieve=False)
    for number in range(len(LENGTHS)):
        document = build_document(loaded, filler, number, seed)
        yield run_trial(
            loaded, document, reopen=number == compared_number(filler), progress=progress
        )


def compared_number(filler: Filler) -> int:
    """Returns which of the ten documents is reopened and run densely.

    It is the one nearest to 32k tokens.
    """
    lengths = lengths_for(filler)
    return min(range(len(lengths)), key=lambda number: abs(lengths[number] - DENSE_LENGTH))


def build_document(loaded: LoadedModel, filler: Filler, number: int, seed: int) -> Episode:
    """Returns document ``number`` of the ten.

    It has one pass key and some named codes at random places of the text.
    """
    rng = random.Random(f"{seed} {number}")
    length = lengths_for(filler)[number]
    codes = named_codes(rng, DISTRACTORS, digits=5)
    return build_episode(rng, loaded.tokenizer, filler, length, [pass_key(rng)], codes)


@torch.no_grad()
def run_trial(
    loaded: LoadedModel, episode: Episode, *, reopen: bool = False, progress: Progress | None = None
) -> Trial:
    """Reads a document without retrieval, then answers its question with retrieval.

    Raises:
        ValueError: the memory is to be reopened, and there is no room for it in the folder of
            temporary files.
    """
    (question,) = episode.questions
    known = len(question.ids) - question.answered
    prompt = torch.tensor([question.ids[:known]], device=loaded.device)
    document = episode.document[None].to(loaded.device)
    with measured(loaded.device) as whole:
        with measured(loaded.device) as reading:
            cache = read_into_memory(loaded, document, retrieve=False, progress=progress)
        cache_bytes = cache.nbytes()
        cache.record = True
        written = _write(loaded.model, prompt, cache, question.answered)
    expected = question.ids[known:]
    length = len(episode.document)
    settings = loaded.model.landmark
    slots = [
        slot_of(index, settings.block_size)
        for index in range(length + known - 1, length + len(question.ids) - 1)
    ]
    blocks = tuple(_blocks_read(loaded, episode, cache.retrievals, slots))
    cache.record = False
    cache.retrievals = []
    cache.crop(length)
    return Trial(
        length=length,
        place=episode.places[0].start,
        expected=loaded.tokenizer.decode(expected).strip(),
        answer=loaded.tokenizer.decode(written).strip(),
        right=written == expected,
        blocks=blocks,
        read_seconds=reading.seconds,
        answer_seconds=whole.seconds - reading.seconds,
        peak_bytes=whole.peak_bytes,
        cache_bytes=cache_bytes,
        keys_per_query=length // settings.text_per_block
        + settings.block_size * (settings.top_k + settings.local_blocks + 1),
        reopened=reopened(loaded, cache, prompt, written) if reopen else None,
    )


@torch.no_grad()
def reopened(
    loaded: LoadedModel, cache: LandmarkCache, prompt: Tensor, written: list[int]
) -> Reopened:
    """Saves a memory to a temporary folder, opens it on tier ``disk`` and asks a fork.

    Args:
        loaded: the model that it was made by.
        cache: the memory of a document, not of the question.
        prompt: ``(1, T)`` token ids of the question.
        written: what the model answered from ``cache``.

    Raises:
        ValueError: there is no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="landmark-") as folder:
        with measured(loaded.device) as saving:
            cache.save(folder)
        with measured(loaded.device) as opening:
            opened = LandmarkCache.open(folder, loaded.model, "disk")
        fork = opened.fork()
        with measured(loaded.device) as answering:
            answer = _write(loaded.model, prompt, fork, len(written))
        return Reopened(
            saved_bytes=sum(file.stat().st_size for file in Path(folder).iterdir()),
            save_seconds=saving.seconds,
            open_seconds=opening.seconds,
            answer=loaded.tokenizer.decode(answer).strip(),
            same=answer == written,
            answer_seconds=answering.seconds,
            fetched_bytes=fork.transfers.fetched_disk - opened.transfers.fetched_disk,
        )


def _write(model: Any, ids: Tensor, cache: Any, count: int) -> list[int]:
    """Returns the greedy continuation of ``ids (1, T)`` by ``count`` tokens."""
    written: list[int] = []
    while len(written) < count:
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        written.append(int(output.logits[0, -1].argmax()))
        ids = ids.new_tensor([written[-1:]])
    return written


def _blocks_read(
    loaded: LoadedModel, episode: Episode, retrievals: Sequence[Any], slots: Sequence[int]
) -> Iterator[BlockRead]:
    weights: dict[int, float] = {}
    for shares in block_shares(retrievals, slots):
        for block, share in shares.items():
            weights[block] = weights.get(block, 0.0) + share / len(slots)
    per_block = loaded.model.landmark.block_size - 1
    place = episode.places[0]
    for block in sorted(weights, key=lambda index: -weights[index]):
        first = block * per_block
        last = (block + 1) * per_block
        text = loaded.tokenizer.decode(episode.document[first:last].tolist())
        middle = (first + last) / 2 / len(episode.document)
        has_fact = first < place.stop and place.start < last
        yield BlockRead(
            block=block, place=middle, share=weights[block], text=text, has_fact=has_fact
        )


def recorded_twin(length: int) -> PasskeyRow | None:
    """Returns the recorded pass-key row of the bundled model's twin, ``None`` if there is none.

    Of several, the one whose length is nearest to ``length``.
    """
    path = model_path() / FIGURES
    if not path.is_file():
        return None
    rows = [row for row in read(path) if isinstance(row, PasskeyRow) and row.task == "passkey"]
    plain = [row for row in rows if row.attention == "full"]
    return min(plain, key=lambda row: abs(row.length - length), default=None)


def draw(trials: Sequence[Trial], dense: DenseRun | None, path: Path) -> None:
    """Draws where each document was read, and time over length beside the dense run.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    figure, (left, right) = subplots(2, (12.5, 4.8))
    for row, trial in enumerate(trials):
        left.barh(row, 1.0, height=0.7, color="0.92")
        for block in trial.blocks:
            left.plot(
                block.place,
                row,
                "o",
                color="tab:blue",
                alpha=0.6,
                markersize=3 + 12 * block.share**0.5,
            )
        color = "tab:green" if trial.right else "tab:red"
        left.plot(
            trial.place / trial.length, row, "|", color=color, markersize=18, markeredgewidth=2
        )
    left.set_yticks(range(len(trials)), [f"{trial.length:,}" for trial in trials])
    left.invert_yaxis()
    left.set(xlabel="place in the document", ylabel="text tokens", xlim=(-0.02, 1.02))
    left.set_title("bar: the key (green: answered right); dots: blocks that were read")
    lengths = [trial.length for trial in trials]
    right.plot(
        lengths, [trial.read_seconds for trial in trials], "o-", label="landmark: read the document"
    )
    right.plot(
        lengths,
        [trial.answer_seconds for trial in trials],
        "o-",
        label="landmark: question and answer",
    )
    if dense is not None:
        right.plot(
            dense.length, dense.read_seconds, "s", label="same weights, dense: read the document"
        )
        right.plot(
            dense.length,
            dense.answer_seconds,
            "D",
            label="same weights, dense: question and answer",
        )
    right.set(xscale="log", yscale="log", xlabel="text tokens", ylabel="seconds")
    right.set_title("time")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    save(figure, path)
