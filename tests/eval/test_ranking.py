"""The comparison of ranking by landmarks with BM25: passages, ranks and rows."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from landmark.data.text import Document
from landmark.eval import ranking
from landmark.eval.bm25 import Bm25
from landmark.eval.variants import Variant
from landmark.texts.rank import rank_files
from small_text import sentences
from tiny import talking_tokenizer, tiny_landmark


def test_a_passage_is_drawn_once_and_cut_out():
    task = ranking.PassageTask(passages=7, passage_tokens=10, seed=3)
    documents = [torch.arange(100), torch.arange(1000, 1080), torch.arange(2000, 2200)]
    drawn = ranking.draw_passages(documents, task)
    assert [sum(each.document == index for each in drawn) for index in range(3)] == [3, 2, 2]
    taken = [token for each in drawn for token in each.ids.tolist()]
    assert len(set(taken)) == 70
    for each in drawn:
        assert torch.equal(each.ids, documents[each.document][each.start : each.start + 10])
    left = [token for document in ranking.cut_out(documents, drawn) for token in document.tolist()]
    assert sorted(left + taken) == [token for document in documents for token in document.tolist()]
    again = ranking.draw_passages(documents, task)
    other = ranking.draw_passages(documents, dataclasses.replace(task, seed=4))
    assert (
        [each.start for each in again]
        == [each.start for each in drawn]
        != [each.start for each in other]
    )


def test_passages_come_from_every_place():
    task = ranking.PassageTask(passages=1, passage_tokens=5)
    starts = [
        ranking.draw_passages([torch.arange(20)], dataclasses.replace(task, seed=seed))[0].start
        for seed in range(300)
    ]
    assert set(starts) == set(range(16))


def test_ranks_and_their_means():
    assert [ranking.rank_of([0.5, 2.0, 0.5, -1.0], wanted) for wanted in range(4)] == [3, 1, 3, 4]
    assert ranking.rank_of([0.0] * 9, 4) == 9
    assert ranking.recall([1, 2, 1, 11]) == 0.5
    expected = (1 + 1 / math.log2(3) + 1 + 1 / math.log2(11) + 0) / 5
    assert ranking.ndcg([1, 2, 1, 10, 11]) == pytest.approx(expected, abs=1e-12)


def test_bm25_finds_the_word():
    index = Bm25(["The cat sat on the mat.", "A dog barked.", "!"])
    assert np.argmax(index.scores("Where is the dog?")) == 1
    assert index.scores("zebra") == index.scores("!?") == [0, 0, 0]
    assert index.settings()["k1"] == 1.5


def test_every_ranker_answers_the_same_passages(marked, monkeypatch):
    documents = [
        Document(f"d{seed}", sentences(60, seed=seed) + f" name{seed} " * 9, "")
        for seed in range(3)
    ]
    others = [Document("other", sentences(60, seed=9), "")]
    searched = []
    build = ranking.build_index
    index = ranking.Bm25
    monkeypatch.setattr(
        ranking, "build_index", lambda read: searched.append(len(read)) or build(read)
    )
    monkeypatch.setattr(ranking, "Bm25", lambda texts: searched.append(len(texts)) or index(texts))
    task = ranking.PassageTask(passages=9, passage_tokens=40, max_tokens=400)
    told = []
    rows = ranking.run(marked, task, documents, others, "made up", told.append)
    assert told == rows
    assert searched == [4, 4, 4, 4]
    assert [(row.text, row.ranker, row.documents, row.passages) for row in rows] == [
        ("cut", "landmark", 4, 9),
        ("cut", "bm25", 4, 9),
        ("whole", "landmark", 4, 9),
        ("whole", "bm25", 4, 9),
    ]
    assert [row.tokens for row in rows] == [1600 - 360, 1600 - 360, 1600, 1600]
    assert rows[0].settings["positions"] == "stingy" and "k1" in rows[1].settings
    assert rows[3].recall_at_1 == 1, "a passage that stands in its document has all its words there"


def test_a_chat_template_ranks_as_the_command_does(tmp_path):
    """A passage is asked as a question; without the template, and by BM25, as a text."""
    talking = Variant("talking", tiny_landmark(), talking_tokenizer())
    documents = [Document(f"d{seed}", sentences(4, seed=seed), "") for seed in range(4)]
    files = [tmp_path / f"{document.title}.txt" for document in documents]
    for file, document in zip(files, documents, strict=True):
        file.write_text(document.text)
    found = {}
    for chat in (None, False):
        task = ranking.PassageTask(passages=4, passage_tokens=20, chat=chat)
        rows = ranking.run(talking, task, documents, [], "made up", lambda row: None)
        found[chat] = next(row for row in rows if (row.text, row.ranker) == ("whole", "landmark"))
        assert [row.chat for row in rows] == [chat is None, False] * 2
        ids = [
            ranking.tokenize_document(talking, document.text, chat=chat is None)
            for document in documents
        ]
        ranks = []
        for passage in ranking.draw_passages(ids, task):
            query = talking.tokenizer.decode(passage.ids.tolist())
            lines = rank_files(talking, query, files, chat=chat)
            titles = [line.title for line in lines]
            ranks.append(1 + titles.index(str(files[passage.document])))
        assert found[chat].ndcg_at_10 == ranking.ndcg(ranks)
    assert found[None].ndcg_at_10 != found[False].ndcg_at_10
