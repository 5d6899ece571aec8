"""What rows are made of: texts, conversations, or documents with questions, read once for a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from landmark.blocks import tokens_for
from landmark.data.cloze import Cloze
from landmark.data.conversations import (
    EncodedConversation,
    PackedConversations,
    digest_of,
    kept_conversations,
    read_conversations,
)
from landmark.data.encoding import Progress
from landmark.data.episodes import Episodes, Row
from landmark.data.haystacks import Haystacks
from landmark.data.kept_arrays import Arrays, kept_arrays
from landmark.data.questions import QuestionSet, read_question_sets
from landmark.data.rows import Share, Windows, plain_row
from landmark.data.text import has_split, kind_of, read_documents
from landmark.data.tokenizer import backend, encode, fingerprint, row_start
from landmark.data.tokens import DocumentSpan, Ids, tokenize
from landmark.train.answers import TeacherAnswers
from landmark.train.recipe import Recipe
from landmark.train.settings import DataSettings

LEAST_ROWS = 40  # of a corpus, from which on a part of it is held out
HELD_OUT_SHARE = 20  # one in so many
EVALUATION_SEED = 1 << 32  # added to the seed of a run for held-out episodes


@dataclass(frozen=True)
class RowSettings:
    """What all corpora of a run have in common.

    Attributes:
        data: the rows of the recipe.
        seed: seed of the run.
        block_size: positions of a block.
        tokenizer: the tokenizer.
    """

    data: DataSettings
    seed: int
    block_size: int
    tokenizer: PreTrainedTokenizerFast

    @property
    def tokens(self) -> int:
        """Text tokens of the longest rows."""
        return tokens_for(self.data.length, self.block_size)

    def holds_out(self, tokens: int) -> bool:
        """Returns whether a part of a corpus of so many tokens is held out."""
        return self.data.held_out > 0 and tokens >= LEAST_ROWS * self.tokens


class Corpus(Protocol):
    """A source of rows.

    Attributes:
        documents: what it was made from, for the summary of the run.
        greatest_id: its greatest token id.
        has_answers: whether any of its rows have answers.
    """

    documents: list[DocumentSpan]
    greatest_id: int
    has_answers: bool

    def kinds(self, length: int) -> list[Share]:
        """Returns the kinds of its rows of ``length`` positions; their shares sum up to 1."""

    def held_out(self) -> dict[str, list[Row]]:
        """Returns rows of the greatest length that are not trained on, by kind.

        There are at most ``held_out`` of a kind.
        """


class TextCorpus:
    """Texts: windows of them and, where the recipe has any, episodes and inverse cloze.

    Held-out text is the ``validation`` split, or else the last twentieth of the text, which is then
    not trained on.

    Args:
        source: the texts, as ``read_documents`` takes them.
        settings: the settings.
        folder: the folder of the token files.
        name: name of the token file; the held-out one is called ``validation`` behind it.
        progress: called while texts are tokenised.
    """

    def __init__(
        self,
        source: str,
        settings: RowSettings,
        folder: Path,
        name: str,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings
        self.has_answers = settings.data.episodes + settings.data.cloze > 0
        self.prefix = row_start(settings.tokenizer)

        def ids_of(split: str, name: str) -> tuple[Ids, list[DocumentSpan]]:
            read = partial(read_documents, source, split=split, field=settings.data.field)
            file = tokenize(read, settings.tokenizer, folder, name, progress)
            return file.ids, file.documents

        self.ids, self.documents = ids_of("train", name)
        self.greatest_id = int(self.ids.max(initial=0))
        self.held_out_ids = self.ids[:0]
        tokens = settings.tokens
        if has_split(source, "validation"):
            file_name = "validation" if name == "train" else f"{name}-validation"
            self.held_out_ids, _ = ids_of("validation", file_name)
        elif settings.holds_out(len(self.ids)):
            cut = len(self.ids) - max(len(self.ids) // HELD_OUT_SHARE, 2 * tokens)
            self.held_out_ids = self.ids[cut:]
            self.ids = self.ids[:cut]

    def kinds(self, length: int) -> list[Share]:
        """See ``Corpus.kinds``."""
        tokens = tokens_for(length, self.settings.block_size)
        seed = self.settings.seed
        windows = Windows(self.ids, tokens=tokens, seed=seed, prefix=self.prefix)
        data = self.settings.data
        kinds = []
        if data.episodes:
            kinds.append(Share(self._episodes(self.ids, length, seed), data.episodes))
        if data.cloze:
            kinds.append(Share(self._cloze(self.ids, length, seed), data.cloze))
        return [*kinds, Share(windows, 1 - data.episodes - data.cloze)]

    def held_out(self) -> dict[str, list[Row]]:
        """See ``Corpus.held_out``: ``text``, where there is enough, ``episodes`` and ``cloze``."""
        count = self.settings.data.held_out
        if count == 0:
            return {}
        found = {}
        tokens = self.settings.tokens
        has_text = len(self.held_out_ids) > tokens
        if has_text:
            found["text"] = self._spaced_rows()
        filler = self.held_out_ids if has_text else self.ids
        seed = self.settings.seed + EVALUATION_SEED
        length = self.settings.data.length
        if self.settings.data.episodes:
            episodes = self._episodes(filler, length, seed)
            found["episodes"] = [episodes(number) for number in range(count)]
        if self.settings.data.cloze:
            filler = filler if len(filler) >= 2 * tokens else self.ids
            cloze = self._cloze(filler, length, seed)
            found["cloze"] = [cloze(number) for number in range(count)]
        return found

    def _spaced_rows(self) -> list[Row]:
        """Returns rows at equal distances over the held-out text."""
        ids = self.held_out_ids
        width = self.settings.tokens - len(self.prefix)
        count = min(self.settings.data.held_out, len(ids) // width)
        step = (len(ids) - width) // (count - 1) if count > 1 else 0
        starts = [number * step for number in range(count)]
        return [plain_row(ids[start : start + width], self.prefix) for start in starts]

    def _cloze(self, text: Ids, length: int, seed: int) -> Cloze:
        data = self.settings.data
        return Cloze(
            self.settings.tokenizer,
            text,
            tokens=tokens_for(length, self.settings.block_size),
            seed=seed,
            questions=max(1, data.questions // (data.length // length)),
        )

    def _episodes(self, filler: Ids, length: int, seed: int) -> Episodes:
        """Returns what makes episodes of so many positions, with as many facts in proportion."""
        data = self.settings.data
        shorter = data.length // length
        return Episodes(
            backend(self.settings.tokenizer),
            filler,
            tokens=tokens_for(length, self.settings.block_size),
            seed=seed,
            block_tokens=self.settings.block_size - 1,
            prefix=self.prefix,
            facts=max(1, data.facts // shorter),
            questions=max(1, data.questions // shorter),
            distractors=data.distractors // shorter,
        )


class ConversationCorpus:
    """Conversations, packed in rows; the last twentieth of 40 rows and more is held out.

    Args:
        source: the conversations, as ``read_conversations`` takes them.
        settings: the settings.
        folder: the folder of the token files.
        name: name of the file of tokens.
        answers: answers those that end with what a user says; ``None`` to leave them as they are.
        progress: called while they are answered and tokenised.
    """

    def __init__(
        self,
        source: str,
        settings: RowSettings,
        folder: Path,
        name: str,
        answers: TeacherAnswers | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings
        self.has_answers = False
        conversations = list(read_conversations(source))
        if answers is not None:
            conversations = answers(conversations, progress)
        file = folder / f"{name}.npz"
        encoded = kept_conversations(file, conversations, settings.tokenizer, progress)
        tokens = sum(len(conversation.ids) for conversation in encoded)
        self.documents = [DocumentSpan(source, digest_of(conversations), start=0, tokens=tokens)]
        self.greatest_id = max(int(conversation.ids.max()) for conversation in encoded)
        order = np.random.default_rng(settings.seed).permutation(len(encoded)).tolist()
        count = 0
        if settings.holds_out(tokens):
            count = max(1, len(encoded) // HELD_OUT_SHARE)
        self._held_out = [encoded[number] for number in order[:count]]
        self._trained_on = [encoded[number] for number in order[count:]]

    def kinds(self, length: int) -> list[Share]:
        """See ``Corpus.kinds``."""
        tokens = tokens_for(length, self.settings.block_size)
        return [Share(self._packed(self._trained_on, tokens), 1.0)]

    def held_out(self) -> dict[str, list[Row]]:
        """See ``Corpus.held_out``: ``conversations``, each of them once, if there is room."""
        if not self._held_out:
            return {}
        tokens = self.settings.tokens
        rows = self._packed(self._held_out, tokens)
        taken = sum(len(conversation.ids) for conversation in self._held_out)
        count = min(self.settings.data.held_out, max(1, taken // tokens))
        return {"conversations": [rows(number) for number in range(count)]}

    def _packed(
        self, conversations: Sequence[EncodedConversation], tokens: int
    ) -> PackedConversations:
        return PackedConversations(conversations, tokens=tokens, seed=self.settings.seed)


class QuestionCorpus:
    """Documents with questions; one set in twenty is held out where there are 40 rows and more.

    Args:
        source: the documents and questions, as ``read_question_sets`` takes them.
        settings: the settings.
        folder: the folder of the token files.
        name: name of the file that keeps what was counted.
        progress: called while they are tokenised.
    """

    def __init__(
        self,
        source: str,
        settings: RowSettings,
        folder: Path,
        name: str,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings
        self.has_answers = True
        sets = list(read_question_sets(source))
        content = hashlib.sha256()
        for each in sets:
            content.update(repr((each.documents, each.questions)).encode())
        digest = content.hexdigest()

        def make() -> Arrays:
            tokens = 0
            greatest = 0
            for number, each in enumerate(sets):
                for document in each.documents:
                    ids = encode(settings.tokenizer, document).ids
                    tokens += len(ids)
                    greatest = max(greatest, int(ids.max(initial=0)))
                if progress is not None:
                    progress("documents tokenised", number + 1, len(sets))
            return {"tokens": np.array(tokens), "greatest_id": np.array(greatest)}

        key = f"{fingerprint(settings.tokenizer)} {digest}"
        counts = kept_arrays(folder / f"{name}.npz", key, make)
        tokens = int(counts["tokens"])
        self.greatest_id = int(counts["greatest_id"])
        self.documents = [DocumentSpan(source, digest, start=0, tokens=tokens)]
        asked = [each for each in sets if each.questions]
        others = [each for each in sets if not each.questions]
        order = np.random.default_rng(settings.seed).permutation(len(asked)).tolist()
        count = len(asked) // HELD_OUT_SHARE if settings.holds_out(tokens) else 0
        # Documents without questions stand among those of both.
        self._held_out = [asked[number] for number in order[:count]]
        if self._held_out:
            self._held_out += others
        self._trained_on = [asked[number] for number in order[count:]] + others

    def kinds(self, length: int) -> list[Share]:
        """See ``Corpus.kinds``."""
        return [Share(self._rows(self._trained_on, length, self.settings.seed), 1.0)]

    def held_out(self) -> dict[str, list[Row]]:
        """See ``Corpus.held_out``: ``questions``."""
        if not self._held_out:
            return {}
        seed = self.settings.seed + EVALUATION_SEED
        rows = self._rows(self._held_out, self.settings.data.length, seed)
        count = self.settings.data.held_out
        return {"questions": [rows(number) for number in range(count)]}

    def _rows(self, sets: Sequence[QuestionSet], length: int, seed: int) -> Haystacks:
        shorter = self.settings.data.length // length
        return Haystacks(
            sets,
            self.settings.tokenizer,
            tokens=tokens_for(length, self.settings.block_size),
            seed=seed,
            questions=max(1, self.settings.data.questions // shorter),
        )


def corpora(
    data: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    block_size: int,
    answers: TeacherAnswers | None = None,
    progress: Progress | None = None,
) -> list[tuple[Corpus, float]]:
    """Returns the corpora of a run and the share of rows that each of them gives.

    Args:
        data: where the rows are from that no source of the recipe's mixture gives.
        recipe: the settings.
        tokenizer: the tokenizer.
        folder: the folder of the token files.
        block_size: positions of a block.
        answers: has a teacher answer conversations that end with what a user says.
        progress: called while texts are tokenised.

    Raises:
        ValueError: episodes without texts, or as reading and tokenising the sources.
        FileNotFoundError: as reading the sources.
    """
    settings = RowSettings(recipe.data, recipe.run.seed, block_size, tokenizer)
    mixture = recipe.data.mixture
    sources = [(data, 1 - sum(part.share for part in mixture), "train")]
    sources += [
        (part.source, part.share, f"mixture-{number}")
        for number, part in enumerate(mixture, start=1)
    ]
    found: list[tuple[Corpus, float]] = []
    for source, share, name in sources:
        if share > 0:
            found.append((_corpus(source, settings, folder, name, answers, progress), share))
    has_texts = any(isinstance(corpus, TextCorpus) for corpus, _ in found)
    for name, share in {"episodes": recipe.data.episodes, "cloze": recipe.data.cloze}.items():
        if share and not has_texts:
            raise ValueError(
                f"{name}: expected texts to make {name} of, got other rows only; give {name}=0 or "
                "a source with texts"
            )
    return found


def _corpus(
    source: str,
    settings: RowSettings,
    folder: Path,
    name: str,
    answers: TeacherAnswers | None,
    progress: Progress | None,
) -> Corpus:
    makers: dict[str, Callable[[], Any]] = {
        "text": lambda: TextCorpus(source, settings, folder, name, progress),
        "messages": lambda: ConversationCorpus(source, settings, folder, name, answers, progress),
        "questions": lambda: QuestionCorpus(source, settings, folder, name, progress),
    }
    corpus: Corpus = makers[kind_of(source)]()
    return corpus
