"""Every command that takes text, with tokenizers that put something before, behind or between
texts.

A spy on the embedding hears every id that reaches the model.
"""

import pytest
import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import landmark
from cutters import ENDS, TEXT, cutter
from landmark.cli import app as cli

KINDS = [
    ("words", "bos-eos"),
    ("bytes", "eos"),
    ("bytes", "two"),
    ("llama", "bos-eos"),
    ("bpe-always", "roberta"),
    ("bytes-prefix", "bert"),
    ("unigram-first", "none"),
]
QUESTION = "the river"


def save(folder, name, ends):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cutter(name, ends),
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=None,
        bos_token_id=None,
        max_position_embeddings=128,
    )
    model = landmark.convert(
        LlamaForCausalLM(config), block_size=16, top_k=2, local_blocks=2, chunk_tokens=60
    )
    model.config.landmark["landmark_trained"] = True
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def kind(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(folder, *request.param)
    return *request.param, folder


@pytest.fixture
def heard(kind, tmp_path, monkeypatch, capsys):
    """Runs a command in a folder with texts: the ids of each call of the embedding."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text(TEXT[30:], encoding="utf-8", newline="")
    calls = []
    stock = torch.nn.Embedding.forward

    def forward(self, ids):
        if self.num_embeddings > 1:  # not that of the landmark
            calls.append(ids.tolist())
        return stock(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)

    def call(*words):
        calls.clear()
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, words), "--model", str(kind[2])])
        assert ended.value.code == 0, capsys.readouterr().err
        assert not any({2, 5} & set(row) for rows in calls for row in rows)  # no end token anywhere
        return [row for rows in calls for row in rows]

    return call


def bare(name):
    """A tokenizer of the same words that was built to put nothing before a text."""
    core = cutter(name)
    if name == "llama":
        core.normalizer = normalizers.Replace(" ", "▁")
    elif name in ("bpe-always", "unigram-first"):
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    elif name == "bytes-prefix":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return core


def ids(name, text, continues=False):
    return (bare if continues else cutter)(name).encode(text, add_special_tokens=False).ids


def joined(rows):
    return [number for row in rows for number in row]


def test_generate_goes_on_from_the_prompt(heard, kind):
    name, ends, _ = kind
    prompt = heard("generate", QUESTION, "--max-new-tokens", 1)
    assert joined(prompt) == ENDS[ends][1] + ids(name, QUESTION)


def test_generate_reads_file_and_prompt_as_one_text(heard, kind):
    name, ends, _ = kind
    read = heard("generate", QUESTION, "--file", "a.txt", "--max-new-tokens", 1)
    assert joined(read) == ENDS[ends][1] + ids(name, TEXT) + ids(name, QUESTION, continues=True)


def test_explain_and_ask_read_files_and_question_as_one_text(heard, kind, tmp_path):
    name, ends, _ = kind
    texts = ENDS[ends][1] + ids(name, TEXT) + ids(name, TEXT[30:], continues=True)
    question = ids(name, QUESTION, continues=True)
    read = heard("explain", "a.txt", "b.txt", "--question", QUESTION, "--max-new-tokens", 1)
    assert joined(read) == texts + question
    assert joined(heard("remember", "a.txt", "b.txt", "--out", "memory")) == texts
    assert joined(heard("ask", "memory", QUESTION, "--max-new-tokens", 1)) == question


def test_rank_reads_each_document_as_a_row(heard, kind):
    name, ends, _ = kind
    rows = heard("rank", QUESTION * 9, "a.txt", "b.txt")
    for text in (TEXT, TEXT[30:]):
        row = ENDS[ends][1] + ids(name, text)
        assert " ".join(map(str, row)) in " ".join(map(str, joined(rows)))
    assert joined(rows)[-len(ids(name, QUESTION * 9)) :] == ids(name, QUESTION * 9)


@pytest.mark.parametrize("filler", ["paper", "a.txt"])
def test_eval_passkey_drops_facts_into_one_text(heard, kind, filler):
    name, ends, _ = kind
    rows = heard("eval", "passkey", "--lengths", 300, "--trials", 2, "--filler", filler)
    numbers = joined(rows)
    begins = ENDS[ends][1]
    assert numbers[: len(begins)] == begins
    assert sum(number in (1, 4) for number in numbers) == 2 * len(
        begins
    )  # each document is a row of its own
    question = " ".join(
        map(str, ids(name, " What is the pass key? The pass key is", continues=True)[:-1])
    )
    assert question in " ".join(map(str, numbers))


def test_eval_perplexity_measures_the_text_alone(heard, kind):
    name = kind[0]
    rows = heard("eval", "perplexity", "--data", "a.txt", "--lengths", 64, "--local", 30)
    text = " ".join(map(str, ids(name, TEXT)))
    assert rows and all(" ".join(map(str, row)) in text or len(row) < 30 for row in rows)
    assert not {1, 4} & set(joined(rows))


def test_training_rows_begin_as_the_tokenizer_begins_texts(kind):
    import numpy as np

    from landmark.data.episodes import Episodes
    from landmark.data.tokenizer import row_start

    name, ends, _ = kind
    core = cutter(name, ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    corpus = np.array(ids(name, TEXT) * 9)
    arguments = {"tokens": 400, "seed": 1, "block_tokens": 63, "prefix": row_start(tokenizer)}
    made = Episodes(core, corpus, **arguments)
    expected = Episodes(bare(name), corpus, **arguments)
    for index in range(12):
        row = made(index).input_ids.tolist()
        begins = ENDS[ends][1]
        assert row[: len(begins)] == begins and len(row) == 400
        assert not {1, 2, 4, 5} & set(row[len(begins) :])
        assert row == expected(index).input_ids.tolist()  # what is said in it goes on from the text
