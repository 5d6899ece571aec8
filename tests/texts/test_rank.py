"""Ranking by landmarks, against the definition in loops."""

import math

import numpy as np
import pytest
import torch
from tokenizers import normalizers, pre_tokenizers

import oracle
from chats import CHATML
from chats import chat as messages_of
from landmark.blocks import slot_of
from landmark.data.asking import Turn, asked_row, frame_of
from landmark.data.tokenizer import encode
from landmark.hf.cache import LandmarkCache
from landmark.hf.gate_loss import CONTRAST_TOKENS
from landmark.memory import retrieval
from landmark.texts import rank
from landmark.texts.loading import LoadedModel, load
from landmark.train.gate import evidence_queries
from small_text import sentences
from tiny import BLOCK, talking_tokenizer, tiny_landmark, tiny_llama, tiny_tokenizer

TEXT = BLOCK - 1


def ids_of(count, seed):
    return torch.randint(0, 290, (count,), generator=torch.Generator().manual_seed(seed))


def layers_of(model, ids, monkeypatch):
    """The definition's layers of a text that is read without retrieval: unrotated queries and keys
    of all slots.
    """
    found = []
    attend = oracle.Layer.attend
    monkeypatch.setattr(oracle.Layer, "attend", lambda self: found.append(self) or attend(self))
    embedding = model.base_model.landmark_embedding.weight[0].detach()
    oracle.logits(tiny_llama(), embedding, ids, model.landmark, silent=range(len(ids)))
    monkeypatch.setattr(oracle.Layer, "attend", attend)
    return found


def mean_query(layer, head, config, slots=None):
    """Mean over some slots of a text, all by default, each where a query stands that has all local
    blocks and old ones before it.
    """
    own = (config.top_k + 1 + config.local_blocks) * BLOCK
    turned = [
        layer.rotated(layer.query[head, slot], own + slot % BLOCK)
        for slot in (range(layer.query.shape[1]) if slots is None else slots)
    ]
    return sum(turned) / len(turned) * layer.scale


def defined_scores(model, documents, query, monkeypatch, slots=None, first=0):
    """Highest score, and its block, of each document for a query: loops over layers, heads and
    blocks, from block ``first`` on. ``slots`` are those of the query that count.
    """
    config = model.landmark
    read = [layers_of(model, ids, monkeypatch) for ids in documents]
    asked = layers_of(model, query, monkeypatch)
    best = [(-math.inf, -1)] * len(documents)
    for index in range(1, len(asked)):  # the first layer's landmarks are all one vector
        for head in range(asked[index].query.shape[0]):
            keys = {}
            for number, layers in enumerate(read):
                layer = layers[index]
                for block in range(first, layer.key.shape[1] // BLOCK):
                    slot = block * BLOCK + BLOCK - 1
                    keys[number, block] = layer.rotated(
                        layer.key[layer.head_key(head), slot], BLOCK - 1
                    )
            middle = sum(keys.values()) / len(keys)
            counts = [layers[index].query.shape[1] // BLOCK - first for layers in read]
            means = [mean_query(layers[index], head, config) for layers in read]
            common = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(
                counts
            )
            surprise = mean_query(asked[index], head, config, slots) - common
            for (number, block), key in keys.items():
                score = float(surprise @ (key - middle)) / float(np.linalg.norm(key - middle))
                best[number] = max(best[number], (score, block - first))
    return best


def test_scores_are_the_definition(marked, monkeypatch):
    documents = [ids_of(n * TEXT, n) for n in (7, 1, 12)]
    query = ids_of(2 * TEXT + 4, 99)
    index = rank.build_index([rank.read_document(marked, ids) for ids in documents])
    found = rank.search(index, rank.read_text(marked, query))
    expected = defined_scores(marked.model, documents, query, monkeypatch)
    assert [each.document for each in found] == [0, 1, 2]
    assert [each.block for each in found] == [block for _, block in expected]
    assert [each.score for each in found] == pytest.approx(
        [score for score, _ in expected], abs=1e-9
    )


def test_the_query_is_scored_as_the_model_scores_old_landmarks(marked, monkeypatch):
    """The sum of what retrieval computes for each query and old block, without centring."""
    config = marked.model.landmark
    cache = LandmarkCache(marked.model.config)
    marked.model.read(ids_of(12 * TEXT, 1)[None], cache=cache, retrieve=False)
    summed = []
    scores_of = retrieval.landmark_scores

    def kept(query, grid, marks, *rest):
        scores = scores_of(query, grid, marks, *rest)
        if not marks.equal:
            summed.append(
                scores.masked_fill(~grid.valid[:, None, None, ..., None], 0)[0].sum((2, 3))
            )
        return scores

    monkeypatch.setattr(retrieval, "landmark_scores", kept)
    queries = rank.QuerySums()
    cache.observer = queries
    marked.model.read(ids_of(2 * TEXT, 2)[None], cache=cache)
    old = 12 - config.local_blocks - config.top_k
    (memory,) = rank.deciding_layers(cache)
    keys = memory.store.landmark_keys[0][:, :old]
    ours = queries.totals[memory.layer].unflatten(0, (len(keys), -1)) @ keys.transpose(-1, -2)
    assert old > 0
    assert torch.allclose(sum(each[..., :old] for each in summed), ours, atol=1e-10)


def test_how_a_text_is_cut_into_chunks_is_rounding(marked):
    ids = ids_of(9 * TEXT + 3, 3)
    whole = rank.read_text(marked, ids)
    with marked.configured(chunk_tokens=7):
        parts = rank.read_text(marked, ids)
    for ours, theirs in zip((*whole.keys, *whole.query), (*parts.keys, *parts.query), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_no_setting_of_the_model_loses_a_landmark(marked):
    """`max_blocks` would evict, `exact` refuse a long text, `all` compute no retrieval."""
    ids = ids_of(60 * TEXT, 4)
    plain = rank.read_text(marked, ids)
    for changes in (
        {"max_blocks": 2},
        {"positions": "exact", "trained_length": 128},
        {"mode": "all"},
    ):
        with marked.configured(**changes):
            assert torch.equal(rank.read_text(marked, ids).keys[0], plain.keys[0])
    assert plain.blocks == 60


def test_the_last_block_is_filled_with_the_beginning(marked):
    for count in (4, TEXT, TEXT + 4):
        ids = ids_of(count, count)
        filled = torch.cat([ids] * 8)[: math.ceil(count / TEXT) * TEXT]
        document = rank.read_document(marked, ids)
        same = rank.read_text(marked, filled)
        assert document.blocks == math.ceil(count / TEXT)
        assert torch.equal(document.keys[0], same.keys[0])


def test_a_landmark_that_was_never_trained_is_named(marked):
    with (
        marked.configured(landmark_trained=False),
        pytest.warns(UserWarning, match="never trained"),
    ):
        rank.read_document(marked, ids_of(9, 1))


def test_the_order_of_documents_does_not_matter(marked):
    read = [rank.read_document(marked, ids_of(n, n)) for n in (40, 90, 200)]
    query = rank.read_text(marked, ids_of(30, 5))
    found = rank.search(rank.build_index(read), query)
    turned = rank.search(rank.build_index(read[::-1]), query)
    for ours, theirs in zip(found, turned[::-1], strict=True):
        assert ours.block == theirs.block
        assert ours.score == pytest.approx(theirs.score, abs=1e-9)
    assert [each.score for each in rank.best_first(found)] == sorted(
        [each.score for each in found], reverse=True
    )


def test_a_lone_block_scores_nothing(marked):
    """All that it has is common to all landmarks."""
    index = rank.build_index([rank.read_document(marked, ids_of(TEXT, 1))])
    (found,) = rank.search(index, rank.read_text(marked, ids_of(9, 2)))
    assert (found.score, found.block) == (0, 0)


def test_files_are_ranked_with_the_text_of_their_best_block(marked, tmp_path):
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(sentences(30, seed=number))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "A short one."}\n{"text": "Another short one."}\n')
    lines = rank.rank_files(marked, "The old man went to the river.", [*files, rows])
    titles = {str(file) for file in files} | {f"{rows}, line 1", f"{rows}, line 2"}
    assert {line.title for line in lines} == titles
    assert [line.score for line in lines] == sorted((line.score for line in lines), reverse=True)
    texts = {str(file): " ".join(file.read_text().split()) for file in files}
    for line in lines:
        assert line.passage and line.passage in texts.get(
            line.title, "A short one. Another short one."
        )


def test_a_document_stands_behind_what_begins_every_text(marked, monkeypatch):
    """Of a tokenizer with a bos token: the block is one token less of the text."""
    monkeypatch.setattr(rank, "row_start", lambda tokenizer: [7])
    ids = ids_of(3 * TEXT - 1, 1)
    begun = rank.read_text(marked, torch.cat((torch.tensor([7]), ids)))
    assert torch.equal(rank.read_document(marked, ids).keys[0], begun.keys[0])
    decode = marked.tokenizer.decode
    assert rank._text(marked, ids, 0) == " ".join(decode(ids[: TEXT - 1].tolist()).split())
    assert rank._text(marked, ids, 1) == " ".join(
        decode(ids[TEXT - 1 : 2 * TEXT - 1].tolist()).split()
    )


def test_the_bundled_model_ranks_the_text_with_the_key_first(tmp_path):
    """What it was trained to look for; the other texts are alike but for the key."""
    files = [tmp_path / f"{number}.txt" for number in range(4)]
    for number, file in enumerate(files):
        text = sentences(40, seed=number)
        key = " The pass key is 48213. Remember it. 48213 is the pass key. " if number == 2 else ""
        file.write_text(text[:600] + key + text[600:])
    first = rank.rank_files(load(None, "cpu"), "What is the pass key? The pass key is", files)[0]
    assert first.title == str(files[2])
    assert "48213" in first.passage


def test_a_document_without_a_token_is_left_out(tmp_path):
    """Among others with a warning; a query or files of none are refused."""
    loaded = LoadedModel("tiny", tiny_landmark(), tiny_tokenizer())
    loaded.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The grass is green."}\n{"text": "~~"}\n{"text": "The code."}\n')
    with pytest.warns(
        UserWarning, match=r"rows\.jsonl, line 2: not ranked, as the tokenizer finds no token"
    ):
        lines = rank.rank_files(loaded, "green", [rows])
    assert sorted(line.title[-1] for line in lines) == ["1", "3"]
    with pytest.raises(
        ValueError, match="query: expected a text of at least one token, got one of none"
    ):
        rank.rank_files(loaded, "~", [rows])
    rows.write_text('{"text": "~~"}\n')
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"files: .*with a token, got .*rows\.jsonl"),
    ):
        rank.rank_files(loaded, "green", [rows])


QUERY = "What is the code of the north gate?"
# Longer than two blocks before a user's message.
LONG_SYSTEM = (
    "{{ '<|im_start|>system\n" + "The pass key is green. " * 3 + "<|im_end|>\n' }}" + CHATML
)


def text_files(folder):
    """Of several lengths, one shorter than a block."""
    texts = [sentences(1, seed=1), "The grass.", sentences(3, seed=3), "The code of the gate. " * 3]
    files = [folder / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return files


def prompt(loaded, said):
    """What a user says, as the template writes it up to where the answer begins, as tokens."""
    text = loaded.tokenizer.apply_chat_template(
        messages_of(said), tokenize=False, add_generation_prompt=True
    )
    return encode(loaded.tokenizer, text).ids.tolist()


@pytest.mark.parametrize("template", [CHATML, LONG_SYSTEM], ids=["short", "long"])
def test_a_chat_template_is_the_definition(talking, template, tmp_path, monkeypatch):
    """Documents stand where a user's texts do, filled up with themselves; of the question the
    tokens count that the contrast teaches. Blocks without a token of a document do not count.
    """
    monkeypatch.setattr(talking.tokenizer, "chat_template", template)
    files = text_files(tmp_path)
    texts = [encode(talking.tokenizer, file.read_text()).ids.tolist() for file in files]
    (mark,) = encode(talking.tokenizer, "~").ids.tolist()
    whole = prompt(talking, "~")
    begin = whole[: whole.index(mark)]
    first = len(begin) // TEXT
    assert first == (0 if template == CHATML else 2)
    documents = []
    for text in texts:
        ids = begin + text
        while len(ids) % TEXT:
            ids.append(text[(len(ids) - len(begin)) % len(text)])
        documents.append(torch.tensor(ids))
    query = prompt(talking, f"\n\n{QUERY}")
    slots = slot_of(torch.arange(len(query)), BLOCK)[-CONTRAST_TOKENS - 1 :].tolist()
    expected = defined_scores(
        talking.model, documents, torch.tensor(query), monkeypatch, slots, first
    )
    lines = {line.title: line for line in rank.rank_files(talking, f" {QUERY}\n", files)}
    for file, text, (score, block) in zip(files, texts, expected, strict=True):
        line = lines[str(file)]
        assert line.score == pytest.approx(score, abs=1e-9)
        begun = (first + block) * TEXT - len(begin)
        shown = talking.tokenizer.decode(text[max(0, begun) : begun + TEXT])
        assert line.passage == " ".join(shown.split()) != ""


def test_the_tokens_that_count_are_those_the_contrast_teaches(talking, monkeypatch):
    """Up to the one that predicts the first token of the answer, in a row of training."""
    tokenizer = talking.tokenizer
    frame = frame_of(tokenizer, [Turn(QUERY, "The pass key.")], "a row")
    row = asked_row(frame, [], [[range(1)]])
    taught = [query.token for query in evidence_queries([row.questions], before=CONTRAST_TOKENS)]
    answer = row.questions[0].answer
    kept = []
    sums = rank.QuerySums
    monkeypatch.setattr(rank, "QuerySums", lambda slots: kept.append(slots) or sums(slots))
    rank.read_question(talking, QUERY)
    # What is said has a separator before the question, which a row has among its texts.
    asked = prompt(talking, f"\n\n{QUERY}")
    shift = len(asked) - answer.start
    expected = [token + shift for token in taught if token < answer.start]
    assert kept[0].tolist() == [int(slot_of(token, BLOCK)) for token in expected]


def test_how_a_question_is_cut_into_chunks_is_rounding(talking):
    whole = rank.read_question(talking, QUERY)
    with talking.configured(chunk_tokens=4):
        parts = rank.read_question(talking, QUERY)
    for ours, theirs in zip(whole.query, parts.query, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_texts_go_on_from_what_opens_the_message(monkeypatch):
    """Without the space that the tokenizer puts before a text."""
    loaded = LoadedModel("talking", tiny_landmark(), talking_tokenizer())
    core = loaded.tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    decode = loaded.tokenizer.decode
    for chat, text in ((True, "The grass"), (False, " The grass")):
        ids = rank.tokenize_document(loaded, "The grass", chat=chat)
        assert decode(ids.tolist()) == text
    read = []
    monkeypatch.setattr(rank, "read_text", lambda loaded, ids, **last: read.append(ids.tolist()))
    rank.read_question(loaded, "The grass?")
    assert "user\n\n\nThe grass?<|im_end|>" in decode(read[0])


def test_without_a_template_a_text_is_a_text(marked, talking, tmp_path):
    """To the bit, whether there is no template or it is not to be used."""
    files = text_files(tmp_path)
    read = []
    for file in files:
        ids = torch.from_numpy(encode(marked.tokenizer, file.read_text()).ids)
        count = math.ceil(len(ids) / TEXT) * TEXT
        read.append(rank.read_text(marked, ids[torch.arange(count) % len(ids)]))
    query = torch.from_numpy(encode(marked.tokenizer, QUERY).ids)
    found = rank.search(rank.build_index(read), rank.read_text(marked, query))
    expected = [(str(files[each.document]), each.score) for each in rank.best_first(found)]
    plain = rank.rank_files(marked, QUERY, files)
    assert [(line.title, line.score) for line in plain] == expected
    assert rank.rank_files(talking, QUERY, files, chat=False) == plain
    assert rank.rank_files(talking, QUERY, files) != plain
