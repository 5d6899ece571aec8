"""`landmark eval recall`: its counts, beside what the same documents retrieve when asked again."""

import dataclasses

import pytest
import torch

from landmark.blocks import slot_of
from landmark.eval import passkey, recall, results
from landmark.eval.fillers import load_filler
from tiny import BLOCK

TASK = passkey.PasskeyTask(lengths=(300,), trials=5, facts=(3,), top_k=(1, 2), seed=4)


def far_queries(variant, episode, number):
    """The tokens of question ``number`` that predict its answer, and the blocks to be retrieved,
    where none of these blocks is local.
    """
    settings = variant.model.landmark
    question = episode.questions[number]
    blocks = {t // settings.text_per_block for tokens in episode.evidence[number] for t in tokens}
    last = len(question.ids) - 1
    for token in range(last - question.answered, last):
        own = (len(episode.document) + token) // settings.text_per_block
        if max(blocks) < own - settings.local_blocks:
            yield token, blocks


@pytest.mark.parametrize("read", passkey.READS)
def test_rows_count_what_is_retrieved(tokenizer, marked, read):
    seen = []
    task = dataclasses.replace(TASK, read=read)
    rows = recall.run(marked, task, seen.append)
    assert rows == seen and [row.top_k for row in rows] == [1, 2]
    filler = load_filler("paper", tokenizer)
    for row in rows:
        hits = {}
        queries = 0
        right = []
        with marked.configured(top_k=row.top_k):
            for trial in range(5):
                episode = passkey.episode_of(marked, task, filler, length=300, facts=3, trial=trial)
                right += passkey.answers_right(marked, [episode], read)[0]
                for number, question in enumerate(episode.questions):
                    cache = marked.model.read(episode.document[None], retrieve=read == "retrieve")
                    cache.record = True
                    marked.model(torch.tensor([question.ids]), past_key_values=cache)
                    for token, blocks in far_queries(marked, episode, number):
                        queries += 1
                        slot = slot_of(300 + token, BLOCK)  # of landmarks there are queries too
                        for found in cache.retrievals:
                            column = found.positions[0].tolist().index(slot)
                            heads = found.blocks[0, :, column].tolist()
                            hit = [bool(blocks & set(selected)) for selected in heads]
                            hits.setdefault(found.layer, []).append(hit)
        assert (row.queries, row.asked, row.correct) == (queries, 15, sum(right))
        assert queries > 40 and [layer["layer"] for layer in row.layers] == sorted(hits)
        for layer in row.layers:
            found = torch.tensor(hits[layer["layer"]])
            assert layer["heads"] == pytest.approx(found.float().mean(0).tolist())
            assert layer["any_head"] == pytest.approx(float(found.any(-1).float().mean()))


def test_rows_come_back_from_a_file(marked, tmp_path):
    rows = recall.run(marked, TASK, results.Recorder(tmp_path / "rows.json", "cpu", print))
    assert results.read(tmp_path / "rows.json") == rows


def test_a_plain_model_retrieves_nothing(plain):
    with pytest.raises(ValueError, match="model: expected a landmark model, got tiny"):
        recall.run(plain, TASK, print)
