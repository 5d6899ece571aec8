"""Documents with questions about them: SQuAD, HotpotQA, bAbI, or rows of a form of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from landmark.data.characters import without_surrogates
from landmark.data.text import Record, read_documents, read_rows

SHOWN_CHARACTERS = 60


class Evidence(NamedTuple):
    """Characters of a document that answer a question.

    Attributes:
        document: index of the document.
        begin: first character.
        end: the one after the last.
    """

    document: int
    begin: int
    end: int


@dataclass(frozen=True)
class DocumentQuestion:
    """A question about documents.

    Attributes:
        question: its words.
        answer: the answer.
        evidence: where the documents say it.
        others: further right answers.
    """

    question: str
    answer: str
    evidence: tuple[Evidence, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Documents that belong together, such as the paragraphs of an article, and questions.

    Attributes:
        where: names the set in messages.
        documents: texts.
        questions: questions about them.
        article: what neighbours of the same article have in common, ``None`` for none.
    """

    where: str
    documents: tuple[str, ...]
    questions: tuple[DocumentQuestion, ...]
    article: str | None = None


def read_question_sets(source: str | Path, *, split: str = "train") -> Iterator[QuestionSet]:
    """Reads documents with questions about them.

    Args:
        source: SQuAD JSON; rows of SQuAD as the hub has them (``context``, ``question``,
            ``answers``); rows of HotpotQA (``context``, ``question``, ``answer``,
            ``supporting_facts``); or rows (``.jsonl``, ``.json`` or a data set of the hub) with
            ``documents``, a list of texts; ``questions``, a list of strings; ``answers``, a string
            for each question, or a list of strings of which the first is learnt; and ``evidence``,
            for each question a list of ``[document, begin, end]`` with the index of a document and
            characters in it. Without ``evidence`` it is where the answer first stands. Documents
            without questions only stand among others. A ``.txt`` file that begins with a numbered
            line, or a folder of such files, is stories of bAbI.
        split: which part of a data set to read.

    Raises:
        FileNotFoundError: there is no such file or data set.
        ModuleNotFoundError: a hub name without the package ``datasets``.
        ValueError: rows of another form, an answer that is not in a document, evidence out of
            range, or no question at all.
    """
    found = False
    for each in _joined_articles(_sets(source, split)):
        found = found or len(each.questions) > 0
        yield each
    if not found:
        raise ValueError(
            f"{source}: expected at least one question with an answer, got none; name another file"
        )


def _sets(source: str | Path, split: str) -> Iterator[QuestionSet]:
    """Yields the sets of a source; a row of SQuAD from the hub is a set of one document."""
    if _holds_stories(Path(source)):
        for document in read_documents(source, split=split):
            yield from _stories(document.text, document.title)
        return
    for row in read_rows(source, split=split):
        value = row.value
        if not isinstance(value, dict):
            raise ValueError(
                f"{row.where}: expected an object, got {type(value).__name__}; write documents, "
                "questions and answers"
            )
        if isinstance(value.get("data"), list):
            yield from (_article(article, row.where) for article in value["data"])
        elif "supporting_facts" in value:
            yield _hotpot(value, row.where)
        elif isinstance(value.get("context"), str):
            yield _hub_squad(value, row.where)
        else:
            yield _question_set(row)


def _holds_stories(path: Path) -> bool:
    """Returns whether a source is a folder or a text file whose first line is numbered."""
    if path.suffix != ".txt" or not path.is_file():
        return path.is_dir()
    with path.open("rb") as file:
        return file.read(2) == b"1 "


def _stories(text: str, where: str) -> Iterator[QuestionSet]:
    """Yields each question of a file of bAbI with the story before it as its one document.

    A line is a number and a sentence, or a number and a question with its answer and the numbers of
    the lines that answer it, divided by tabs. Number 1 begins a story (Weston et al., arXiv
    1502.05698).
    """
    story = ""
    lines: dict[str, tuple[int, int]] = {}  # by number: its characters in the story
    for at, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        number, _, rest = line.partition(" ")
        parts = rest.split("\t")
        if not number.isdigit() or len(parts) not in (1, 3) or not parts[0].strip():
            raise ValueError(
                f"{where}, line {at}: expected a number and a sentence, or a number, a question, "
                f"its answer and line numbers with tabs between, got {line[:60]!r}; name a file of "
                "bAbI, or documents with questions in .json or .jsonl"
            )
        if number == "1":
            story = ""
            lines = {}
        if len(parts) == 1:
            begin = len(story)
            story += f"{rest.strip()}\n"
            lines[number] = (begin, len(story) - 1)
            continue
        question, answer, supports = (part.strip() for part in parts)
        unknown = [support for support in supports.split() if support not in lines]
        if unknown or not supports:
            raise ValueError(
                f"{where}, line {at}: expected numbers of earlier lines of the story, got "
                f"{', '.join(unknown) or 'none'}; correct the file"
            )
        spans = sorted(lines[support] for support in supports.split())
        asked = DocumentQuestion(
            question=question,
            answer=answer.replace(",", ", "),
            evidence=tuple(Evidence(0, begin, end) for begin, end in spans),
        )
        yield QuestionSet(f"{where}, line {at}", (story.rstrip(),), (asked,))


def _joined_articles(sets: Iterator[QuestionSet]) -> Iterator[QuestionSet]:
    """Joins neighbours that belong to one article; a document that comes again is one."""
    waiting: list[QuestionSet] = []
    for each in sets:
        if waiting and (each.article is None or each.article != waiting[0].article):
            yield _joined(waiting)
            waiting = []
        waiting.append(each)
    if waiting:
        yield _joined(waiting)


def _joined(sets: Sequence[QuestionSet]) -> QuestionSet:
    if len(sets) == 1:
        return sets[0]
    places: dict[str, int] = {}
    questions = []
    for each in sets:
        for document in each.documents:
            places.setdefault(document, len(places))
        for asked in each.questions:
            evidence = tuple(
                span._replace(document=places[each.documents[span.document]])
                for span in asked.evidence
            )
            questions.append(replace(asked, evidence=evidence))
    return replace(sets[0], documents=tuple(places), questions=tuple(questions))


def first_questions(sets: Sequence[QuestionSet], count: int | None) -> list[QuestionSet]:
    """Returns sets with their first ``count`` questions in all, ``None`` for all of them.

    All documents stay.

    Raises:
        ValueError: a count below 1.
    """
    if count is None:
        return list(sets)
    if count < 1:
        raise ValueError(f"questions: expected at least 1, got {count}; pass for example 100")
    kept = []
    for each in sets:
        kept.append(replace(each, questions=each.questions[:count]))
        count -= len(kept[-1].questions)
    return kept


def _article(article: Any, where: str) -> QuestionSet:
    """Reads an article of SQuAD JSON, without the questions that have no answer."""
    try:
        title = str(article["title"])
        documents = tuple(str(paragraph["context"]) for paragraph in article["paragraphs"])
        questions = []
        for number, paragraph in enumerate(article["paragraphs"]):
            for asked in paragraph["qas"]:
                if asked["answers"] and not asked.get("is_impossible"):
                    answer = str(asked["answers"][0]["text"])
                    begin = int(asked["answers"][0]["answer_start"])
                    evidence = Evidence(number, begin, begin + len(answer))
                    others = tuple(str(other["text"]) for other in asked["answers"][1:])
                    questions.append(
                        DocumentQuestion(str(asked["question"]), answer, (evidence,), others)
                    )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{where}: expected SQuAD JSON (title, paragraphs with context and qas), got another "
            f"form ({type(error).__name__}: {error}); mend it"
        ) from None
    found = QuestionSet(f"{where}, {title}", documents, tuple(questions))
    _require_quotes(found)
    return found


def _hub_squad(value: dict[str, Any], where: str) -> QuestionSet:
    """Reads a row of SQuAD as the hub has it: one question, without an answer in some rows."""
    try:
        texts = [str(text) for text in value["answers"]["text"]]
        starts = [int(start) for start in value["answers"]["answer_start"]]
        questions = []
        if texts:
            evidence = Evidence(0, starts[0], starts[0] + len(texts[0]))
            asked = str(value["question"])
            questions.append(DocumentQuestion(asked, texts[0], (evidence,), tuple(texts[1:])))
        title = value.get("title")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{where}: expected a row of SQuAD (context, question, answers with text and "
            f"answer_start), got another form ({type(error).__name__}: {error}); mend it"
        ) from None
    article = None if title is None else str(title)
    found = QuestionSet(where, (value["context"],), tuple(questions), article)
    _require_quotes(found)
    return found


def _hotpot(value: dict[str, Any], where: str) -> QuestionSet:
    """Reads a row of HotpotQA: the evidence is the supporting sentences."""
    try:
        context = value["context"]
        if isinstance(context, dict):  # as the hub has it: lists of titles and of sentences
            context = list(zip(context["title"], context["sentences"], strict=True))
        facts = value["supporting_facts"]
        if isinstance(facts, dict):
            facts = list(zip(facts["title"], facts["sent_id"], strict=True))
        titles = [str(title) for title, _ in context]
        sentences = [[str(each) for each in said] for _, said in context]
        documents = tuple(
            f"{title}\n{''.join(said)}" for title, said in zip(titles, sentences, strict=True)
        )
        evidence = []
        for title, number in facts:
            document = titles.index(str(title))
            if number >= len(sentences[document]):
                continue  # some rows of the data set name a sentence that is not there
            begin = len(titles[document]) + 1 + sum(map(len, sentences[document][:number]))
            evidence.append(Evidence(document, begin, begin + len(sentences[document][number])))
        asked = DocumentQuestion(
            str(value["question"]).strip(), str(value["answer"]), tuple(evidence)
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{where}: expected a row of HotpotQA (context, question, answer, supporting_facts), "
            f"got another form ({type(error).__name__}: {error}); mend it"
        ) from None
    questions = (asked,) if evidence and asked.answer.strip() else ()
    found = QuestionSet(where, documents, questions)
    for each in questions:
        _require_evidence(found, each)
    return found


def _require_quotes(found: QuestionSet) -> None:
    """Raises ``ValueError`` where the evidence of a question is not its answer."""
    for asked in found.questions:
        _require_evidence(found, asked)
        (evidence,) = asked.evidence
        said = found.documents[evidence.document][evidence.begin : evidence.end]
        if said != asked.answer:
            raise ValueError(
                f"{found.where}: expected the answer {_shown(asked.answer)} at character "
                f"{evidence.begin} of its paragraph, got {_shown(said)}; mend answer_start"
            )


def _question_set(row: Record) -> QuestionSet:
    """Reads a row with documents, questions and answers."""
    value = row.value
    documents = _strings(value.get("documents"), f"{row.where}: documents")
    if not value.get("questions"):
        return QuestionSet(row.where, documents, ())
    questions = _strings(value.get("questions"), f"{row.where}: questions")
    answers = value.get("answers")
    evidence = value.get("evidence")
    for name, given in {"answers": answers, "evidence": evidence}.items():
        if name == "evidence" and given is None:
            continue
        if not isinstance(given, list) or len(given) != len(questions):
            count = len(given) if isinstance(given, list) else type(given).__name__
            raise ValueError(
                f"{row.where}: {name}: expected a list with an entry for each of the "
                f"{len(questions)} questions, got {count}; write one"
            )
    asked = []
    for number, question in enumerate(questions):
        given = answers[number] if _is_list(answers[number]) else [answers[number]]
        answer = given[0]
        others = tuple(other for other in given[1:] if isinstance(other, str))
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f"{row.where}: answers: expected a string for question {number + 1}, got "
                f"{answer!r}; write one"
            )
        if evidence is None:
            spans = _first_mention(documents, answer, row.where)
        else:
            spans = _spans(evidence[number], row.where)
        asked.append(DocumentQuestion(question, without_surrogates(answer), spans, others))
    found = QuestionSet(row.where, documents, tuple(asked))
    for each in asked:
        _require_evidence(found, each)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


def _strings(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(
            f"{what}: expected a list of at least one string, got {type(value).__name__}; write one"
        )
    return tuple(without_surrogates(text) for text in value)


def _first_mention(documents: Sequence[str], answer: str, where: str) -> tuple[Evidence, ...]:
    for number, document in enumerate(documents):
        begin = document.find(answer)
        if begin >= 0:
            return (Evidence(number, begin, begin + len(answer)),)
    raise ValueError(
        f"{where}: expected an answer that stands in a document, got {_shown(answer)}, which does "
        "not; write where the documents say it under evidence, as [document, begin, end]"
    )


def _spans(value: Any, where: str) -> tuple[Evidence, ...]:
    is_list = isinstance(value, list) and len(value) > 0
    if not is_list or not all(
        isinstance(span, list) and len(span) == 3 and all(type(number) is int for number in span)
        for span in value
    ):
        raise ValueError(
            f"{where}: evidence: expected a list of [document, begin, end], three integers each, "
            f"for each question, got {value!r}; write one"
        )
    return tuple(Evidence(*span) for span in value)


def _require_evidence(found: QuestionSet, asked: DocumentQuestion) -> None:
    """Raises ``ValueError`` for evidence that is not in the documents."""
    for span in asked.evidence:
        count = len(found.documents)
        if not 0 <= span.document < count:
            raise ValueError(
                f"{found.where}: evidence: expected a document from 0 to {count - 1}, got "
                f"{span.document}; mend it"
            )
        length = len(found.documents[span.document])
        if not 0 <= span.begin < span.end <= length:
            raise ValueError(
                f"{found.where}: evidence: expected characters in document {span.document}, which "
                f"has {length}, got {span.begin} to {span.end}; mend them"
            )


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")
