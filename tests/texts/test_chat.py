"""Conversations about texts: what the model is given, that turns go on, and what is kept."""

import pytest
import torch
from transformers import GenerationConfig

from chats import chat as messages_of
from landmark import Library, explain, remember
from landmark.data.chat import chat_ends
from landmark.data.sources import Source
from landmark.data.tokenizer import encode
from landmark.texts.chat import Chat, read_for_chat
from landmark.texts.explain import explain_sources
from landmark.texts.generate import continue_text
from landmark.texts.rank import rank_files
from tiny import WORDS

TEXT = (WORDS + "\n") * 9
QUESTIONS = ("What is the pass key?", "And the grass?", "Is it green?")


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return [path]


def rendered(loaded, *turns):
    """A conversation as the template writes it, up to where the next answer begins."""
    return loaded.tokenizer.apply_chat_template(
        messages_of(*turns), tokenize=False, add_generation_prompt=len(turns) % 2 == 1
    )


def ids_of(loaded, text):
    return torch.from_numpy(encode(loaded.tokenizer, text).ids)


def test_turns_are_what_the_template_writes(talking):
    """Text, questions and answers, and nothing else, in the tokens that are read."""
    talk = read_for_chat(talking, [Source("a", TEXT)])
    said = [f"{TEXT}\n\n{QUESTIONS[0]}"]
    for number, question in enumerate(QUESTIONS):
        answer = talk.ask(question, max_new_tokens=5)
        assert answer.question == question and len(answer.steps) == 5
        known = talking.tokenizer.decode(talk._ids.tolist())
        assert known == rendered(talking, *said) + answer.answer
        assert talk.turns == number + 1
        # The last token of an answer is read with the next question.
        assert talk.memory.tokens == [len(talk._ids) - 1]
        if number < 2:
            said += [answer.answer, QUESTIONS[number + 1]]


def test_answers_are_those_of_the_whole_conversation(talking):
    """Greedy generation from all of it at once, read with retrieval."""
    talk = read_for_chat(talking, [Source("a", TEXT)], retrieve=True)
    for question in QUESTIONS:
        before = talk._ids
        answer = talk.ask(question, max_new_tokens=6)
        new = len(talk._ids) - len(before) - len(answer.steps)
        whole = talk._ids[: len(before) + new][None]
        expected = talking.model.generate(
            whole, max_new_tokens=6, do_sample=False, eos_token_id=ends_of(talking)
        )
        assert expected[0].tolist()[: len(talk._ids)] == talk._ids.tolist()


def parts(loaded):
    return loaded.model, loaded.tokenizer


def ends_of(loaded):
    return chat_ends(loaded.tokenizer, loaded.model.generation_config.eos_token_id)


def test_a_conversation_without_texts(talking):
    talk = Chat(talking)
    first = talk.ask(QUESTIONS[0], max_new_tokens=4)
    assert first.passages() == ()
    known = talking.tokenizer.decode(talk._ids.tolist())
    assert known == rendered(talking, QUESTIONS[0]) + first.answer
    talk.ask(QUESTIONS[1], max_new_tokens=4)
    known = talking.tokenizer.decode(talk._ids.tolist())
    assert known.startswith(rendered(talking, QUESTIONS[0], first.answer, QUESTIONS[1]))


def test_an_answer_comes_in_parts(talking):
    heard = []
    talk = read_for_chat(talking, [Source("a", TEXT)])
    answer = talk.ask(QUESTIONS[0], max_new_tokens=12, stream=heard.append)
    assert "".join(heard) == answer.answer and len(heard) > 1


def test_a_wrong_question_leaves_the_conversation_as_it_was(talking):
    talk = read_for_chat(talking, [Source("a", TEXT)])
    other = read_for_chat(talking, [Source("a", TEXT)])
    for bad, message in ((" ", "question: expected"), ("x", "max_new_tokens: expected")):
        with pytest.raises(ValueError, match=message):
            talk.ask(bad, max_new_tokens=0 if bad == "x" else 3)
    answers = [each.ask(QUESTIONS[0], max_new_tokens=5) for each in (talk, other)]
    assert answers[0] == answers[1] and talk.turns == 1


def test_an_answer_ends_with_the_sign_of_its_end(talking, monkeypatch):
    """Of the template, of the tokenizer, or of the model."""
    ends = ends_of(talking)
    end = talking.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends == sorted({end, talking.tokenizer.eos_token_id})
    monkeypatch.setattr(talking.model, "generation_config", GenerationConfig(eos_token_id=[7, 9]))
    assert {7, 9} < set(ends_of(talking))

    def ending(ids, *args, eos_token_id, **more):
        assert end in eos_token_id
        return torch.cat((ids, torch.tensor([[50, 51, end]])), dim=1)

    monkeypatch.setattr(talking.model, "generate", ending)
    talk = Chat(talking)
    answer = talk.ask(QUESTIONS[0])
    assert answer.answer == talking.tokenizer.decode([50, 51])
    assert talk._ids[-2:].tolist() == [50, 51]


def test_a_library_asks_and_goes_on_in_turns(talking, files, tmp_path):
    library = remember(files, tmp_path / "memory", talking)
    assert library.is_chat
    opened = Library.open(tmp_path / "memory", talking)
    assert opened.is_chat
    alone = opened.ask(QUESTIONS[0], max_new_tokens=5)
    assert library.ask(QUESTIONS[0], max_new_tokens=5) == alone
    talk = opened.chat()
    assert talk.ask(QUESTIONS[0], max_new_tokens=5) == alone
    talk.ask(QUESTIONS[1], max_new_tokens=5)
    assert opened.ask(QUESTIONS[0], max_new_tokens=5) == alone, "the memory stays as it is"
    model, tokenizer = parts(talking)
    again = explain(model, tokenizer, [(str(files[0]), TEXT)], QUESTIONS[0], max_new_tokens=5)
    assert again == alone
    before = talking.tokenizer.decode(opened.reading.ids.tolist())
    assert before == rendered(talking, "MARK").partition("MARK")[0] + TEXT


def test_a_library_is_read_further_as_it_began(talking, files, tmp_path):
    remember(files, tmp_path / "memory", talking)
    (tmp_path / "b.txt").write_text("The code of the north gate. " * 9)
    more = remember([*files, tmp_path / "b.txt"], tmp_path / "memory", talking)
    whole = remember([*files, tmp_path / "b.txt"], tmp_path / "whole", talking)
    assert more.is_chat
    assert more.ask(QUESTIONS[0], max_new_tokens=5) == whole.ask(QUESTIONS[0], max_new_tokens=5)
    with pytest.raises(ValueError, match=r"chat: expected True, as .* was remembered, got False"):
        remember(files, tmp_path / "memory", talking, chat=False)


def test_without_the_template(talking, files, tmp_path):
    """Text is text and a question what the model goes on from."""
    library = remember(files, tmp_path / "memory", talking, chat=False)
    assert not library.is_chat
    assert library.reading.ids.tolist() == ids_of(talking, TEXT).tolist()
    answer = library.ask(" What is the pass key?")
    assert len(answer.steps) <= 16
    with pytest.raises(ValueError, match="chat: expected texts that were remembered by a chat"):
        library.chat()


def test_what_is_generated(talking, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    model, tokenizer = parts(talking)
    ends = ends_of(talking)
    with_file = continue_text(
        talking, f" {QUESTIONS[0]}\n", file=tmp_path / "a.txt", read="retrieve", max_new_tokens=5
    )
    alone = continue_text(talking, QUESTIONS[0], max_new_tokens=5)
    for written, said in ((with_file, f"{TEXT}\n\n{QUESTIONS[0]}"), (alone, QUESTIONS[0])):
        ids = ids_of(talking, rendered(talking, said))[None]
        found = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=ends)
        assert tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == written
    plain = continue_text(talking, QUESTIONS[0], max_new_tokens=5, chat=False)
    ids = ids_of(talking, QUESTIONS[0])[None]
    found = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == plain


def test_no_template_to_use(marked, tmp_path, files):
    for call in (
        lambda: Chat(marked),
        lambda: read_for_chat(marked, []),
        lambda: remember(files, tmp_path / "memory", marked, chat=True),
        lambda: continue_text(marked, "hi", chat=True),
        lambda: rank_files(marked, "hi", files, chat=True),
        lambda: explain_sources(
            marked.model, marked.tokenizer, [Source("a", TEXT)], "hi", chat=True
        ),
    ):
        with pytest.raises(ValueError, match="chat: expected a model whose tokenizer has a chat"):
            call()
