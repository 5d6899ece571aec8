"""Runs from end to end: what is saved, what the summary says, what decides the losses."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from toy import silent, toy_recipe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

import landmark
from landmark import LandmarkConfig
from landmark.data.rows import stack
from landmark.data.tokenizer import load_tokenizer
from landmark.hf.attention import FullPass
from landmark.hf.layout import TextLayout
from landmark.hf.recall import EvidenceQuery, EvidenceRecall
from landmark.train.gate import restart_positions
from landmark.train.prepare import prepare_rows
from landmark.train.run import _arguments as training_arguments
from landmark.train.run import compile_layers, train
from landmark.train.trainer import LandmarkTrainer


def losses(summary):
    return [entry["loss"] for entry in summary["losses"]]


def test_saved_model_retrieves_and_knows_its_length(scratch):
    out, _ = scratch
    model = landmark.load(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    settings = model.landmark
    assert (settings.mode, settings.landmark_trained, settings.trained_length) == (
        "retrieval",
        True,
        160,
    )
    assert (settings.block_size, settings.top_k, settings.position_gap) == (16, 4, 8)
    assert model.dtype == torch.bfloat16 and len(list(out.glob("*.safetensors"))) > 1
    assert model.config.use_cache is True and model.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("The old man went over the river. " * 30, return_tensors="pt")
    assert (
        model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1]
        == prompt["input_ids"].shape[1] + 3
    )


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config, GPTNeoXConfig])
def test_layers_share_one_compiled_graph(kind):
    """Also more of them than torch compiles one function for; losses are those of the model as it
    is.
    """
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
    }
    torch.manual_seed(0)
    model = landmark.convert(
        AutoModelForCausalLM.from_config(kind(vocab_size=61, num_hidden_layers=10, **shape))
    )
    model.configure_landmark(mode="all")
    model.train()
    ids = torch.arange(200).view(2, 100) * 7 % 61
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    torch._dynamo.reset()
    graphs = CompileCounter()
    compile_layers(model, backend=graphs)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert graphs.frame_count == 1
    torch.testing.assert_close(loss, expected)


def test_summary(scratch, books):
    out, summary = scratch
    assert (summary["steps"], summary["tokens"]) == (4, 4 * 4 * 150)
    assert [entry["step"] for entry in summary["losses"]] == [1, 2, 3, 4]
    assert [entry["step"] for entry in summary["evaluations"]] == [2, 4]
    assert set(summary["evaluations"][0]) == {
        "step",
        "text_loss",
        "episodes_loss",
        "episodes_accuracy",
        "episodes_recall",
    }
    for layer in summary["evaluations"][0]["episodes_recall"]:
        assert len(layer["heads"]) == 2 and 0 <= max(layer["heads"]) <= layer["any_head"] <= 1
    assert [text["sha256"] for text in summary["texts"]] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(books.glob("*.txt"))
    ]
    assert (
        summary["landmark"]["mode"] == "retrieval"
        and summary["versions"]["torch"] == torch.__version__
    )
    saved = json.loads((out / "recipe.json").read_text())
    assert summary["recipe"] == {name: saved[name] for name in saved if name != "arguments"}
    assert summary["seconds"] > summary["evaluation_seconds"] > 0


def test_twin_is_a_stock_model_on_the_same_rows(twin, scratch, books, tmp_path):
    out, summary = twin
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM" and summary["landmark"] is None
    assert summary["tokens"] == scratch[1]["tokens"] and summary["texts"] == scratch[1]["texts"]
    assert (out / "tokenizer.json").read_bytes() == (scratch[0] / "tokenizer.json").read_bytes()
    rows = [
        prepare_rows(
            str(books), tmp_path / folder.name, toy_recipe(), load_tokenizer(folder), block_size=16
        ).train
        for folder in (out, scratch[0])
    ]
    for index in range(16):
        (here,) = rows[0][index]
        (there,) = rows[1][index]
        assert (here.input_ids == there.input_ids).all()


def test_losses_follow_from_the_seed(twin, books, tmp_path):
    again = train(str(books), tmp_path / "again", recipe=toy_recipe(), plain=True, report=silent)
    other = train(
        str(books), tmp_path / "other", recipe=toy_recipe(seed=6), plain=True, report=silent
    )
    assert losses(again) == losses(twin[1]) != losses(other)


def test_training_lowers_the_loss(books, tmp_path, scratch):
    recipe = toy_recipe(steps=30, lr=1e-2, episodes=0.0)
    summary = train(str(books), tmp_path, recipe=recipe, tokenizer=str(scratch[0]), report=silent)
    assert losses(summary)[-1] < 0.8 * losses(summary)[0]
    assert "episodes_loss" not in summary["evaluations"][-1]


@pytest.mark.parametrize("episodes", [0.0, 0.5])
@pytest.mark.parametrize("plain", [True, False])
def test_micro_batches_change_nothing(books, scratch, tmp_path, plain, episodes):
    """Means are over all text and all answers of a step, however its rows are cut (without random
    gaps).
    """
    found = []
    for micro in (4, 1):
        recipe = toy_recipe(episodes=episodes, micro_batch=micro, position_gap=0)
        options = {"plain": plain, "tokenizer": str(scratch[0]), "report": silent}
        found.append(losses(train(str(books), tmp_path / str(micro), recipe=recipe, **options)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_schedule_lengthens_the_rows(books, scratch, tmp_path):
    """With equally many tokens in each step; it can be resumed in the middle of a part."""
    schedule = [{"length": 32, "until": 0.34}, {"length": 80, "until": 0.67}]
    recipe = toy_recipe(steps=6, save_every=3, schedule=schedule, episodes=0.0)
    options = {"recipe": recipe, "tokenizer": str(scratch[0]), "report": silent}
    expected = train(str(books), tmp_path / "whole", **options)
    assert expected["tokens"] == 6 * 4 * 150
    prepared = prepare_rows(
        str(books), tmp_path / "rows", recipe, load_tokenizer(scratch[0]), block_size=16
    )
    shapes = [[len(row.input_ids) for row in group] for group in prepared.train]
    assert shapes == 8 * [[30] * 5] + 8 * [[75] * 2] + 8 * [[150]]
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "checkpoint-6")
    resumed = train(str(books), tmp_path / "whole", resume=True, **options)
    assert losses(resumed) == losses(expected)


def test_shorter_rows_have_fewer_facts(books, scratch, tmp_path):
    recipe = toy_recipe(
        length=640, schedule=[{"length": 160, "until": 0.5}], facts=12, questions=9, distractors=5
    )
    prepared = prepare_rows(str(books), tmp_path, recipe, load_tokenizer(scratch[0]), block_size=16)
    made = [stage.kinds[0].make for stage in prepared.train.stages]
    assert [(each.facts, each.questions, each.distractors) for each in made] == [
        (3, 2, 1),
        (12, 9, 5),
    ]


@pytest.mark.parametrize("all_blocks", [0.0, 0.5, 1.0])
def test_modes_of_the_steps(books, scratch, tmp_path, monkeypatch, all_blocks):
    """A share of the steps sees all blocks, drawn by the seed; the others the best few."""
    seen = []
    stock = FullPass.attend

    def noting(self, *args):
        seen.append((torch.is_grad_enabled(), self.settings.mode))
        return stock(self, *args)

    monkeypatch.setattr(FullPass, "attend", noting)
    recipe = toy_recipe(
        steps=12, batch=2, micro_batch=1, all_blocks=all_blocks, top_k=1, evaluate_every=12
    )
    options = {"recipe": recipe, "tokenizer": str(scratch[0]), "report": silent}
    train(str(books), tmp_path / "one", **options)
    trained = [mode for has_gradient, mode in seen if has_gradient]
    evaluated = {mode for has_gradient, mode in seen if not has_gradient}
    steps = [set(trained[first : first + 4]) for first in range(0, len(trained), 4)]
    assert len(steps) == 12 and all(len(step) == 1 for step in steps)  # micro-batches agree
    share = sum("all" in step for step in steps) / 12
    assert share == all_blocks or (0.2 < share < 0.8 and all_blocks == 0.5)
    assert evaluated == {"all" if all_blocks == 1 else "top_k"}
    model = landmark.load(tmp_path / "one")
    assert model.landmark.mode == "retrieval"
    again = len(seen)
    train(str(books), tmp_path / "two", **options)
    assert seen[:again] == seen[again:]


def test_positions_start_again_where_something_is_asked(books, scratch, tmp_path, monkeypatch):
    """Held-out rows are read with retrieval, as answers at their distances were not trained on."""
    modes = []
    asked = []
    seen = []
    evaluate = LandmarkTrainer.prediction_step
    gate = LandmarkTrainer._gate_losses
    positions = TextLayout.training_positions

    def noting_modes(self, *args, **kwargs):
        found = evaluate(self, *args, **kwargs)
        modes.append(self._unwrapped.landmark.mode)
        return found

    def noting_questions(self, inputs):
        asked.append([len(questions) > 0 for questions in inputs["questions"]])
        return gate(self, inputs)

    def noting_positions(self, batch, settings, restarts):
        drawn = positions(self, batch, settings, restarts)
        seen.append(((restarts >= 0).tolist(), (drawn.amax(1) < 112).tolist()))
        return drawn

    monkeypatch.setattr(LandmarkTrainer, "prediction_step", noting_modes)
    monkeypatch.setattr(LandmarkTrainer, "_gate_losses", noting_questions)
    monkeypatch.setattr(TextLayout, "training_positions", noting_positions)
    recipe = toy_recipe(position_span=112, position_gap=0, evaluate_every=2, all_blocks=0.5)
    options = {"recipe": recipe, "tokenizer": str(scratch[0]), "report": silent}
    summary = train(str(books), tmp_path, **options)
    assert [restarts for restarts, _ in seen] == [short for _, short in seen] == asked
    assert {True, False} == {each for row in asked for each in row}
    assert set(modes) == {"retrieval"}
    assert len(summary["evaluations"]) == 2
    model = landmark.load(tmp_path)
    assert (model.landmark.mode, model.landmark.position_span) == ("retrieval", 112)


def test_texts_alone_keep_their_distances(books, scratch, tmp_path, monkeypatch):
    """Also in a run in which nothing is asked."""
    seen = []
    positions = TextLayout.training_positions

    def noting(self, batch, settings, restarts):
        seen.append(restarts.tolist())
        return positions(self, batch, settings, restarts)

    monkeypatch.setattr(TextLayout, "training_positions", noting)
    recipe = toy_recipe(position_span=112, episodes=0.0, steps=2)
    options = {"recipe": recipe, "tokenizer": str(scratch[0]), "report": silent}
    train(str(books), tmp_path, **options)
    assert seen == 2 * [[-1, -1, -1, -1]]


def test_text_behind_a_restart_is_not_learnt(books, scratch, tmp_path):
    """Its blocks have lost the words before them; answers are learnt all the same."""
    settings = LandmarkConfig(block_size=16, local_blocks=2, position_span=64)
    recipe = toy_recipe(steps=40)
    cutter = load_tokenizer(str(scratch[0]))
    rows = prepare_rows(str(books), tmp_path, recipe, cutter, block_size=16).train
    blocks = torch.arange(150) // 15
    starts = set()
    for number in range(0, 160, 4):
        batch = stack([rows[index] for index in range(number, number + 4)], answers=True)
        labels = batch["labels"].clone()
        restart_positions(batch, settings, draw=str(number))
        for row, questions in enumerate(batch["questions"]):
            first = batch["restarts"][row].item()
            begins = range(first or 4, 10, 4) if questions else ()
            assert (first >= 0) == (len(questions) > 0)
            behind = torch.isin(blocks, torch.tensor([b + i for b in begins for i in (0, 1)]))
            silent_now = behind & ~batch["answers"][row]
            assert (batch["labels"][row][silent_now] == -100).all()
            assert (batch["labels"][row] == labels[row])[~silent_now].all()
            starts.add(first)
    assert starts == {-1, 0, 1, 2, 3}
    unchanged = dict(batch)
    restart_positions(batch, dataclasses.replace(settings, position_span=160), draw="")
    restart_positions(batch, dataclasses.replace(settings, position_span=None), draw="")
    assert batch.keys() == unchanged.keys()
    assert all(batch[name] is unchanged[name] for name in batch)


def test_the_log_says_what_is_retrieved(books, scratch, tmp_path, monkeypatch):
    """As a read with retrieval retrieves it, and the model is in its mode again afterwards."""
    from landmark.train import trainer

    made = []
    lines = []
    stock = trainer.LandmarkTrainer._recall

    def noting(self, rows):
        made.append((stock(self, rows), rows))
        assert self._unwrapped.landmark.mode == "all"
        return made[-1][0]

    monkeypatch.setattr(trainer.LandmarkTrainer, "_recall", noting)
    recipe = toy_recipe(steps=2)
    options = {"recipe": recipe, "tokenizer": str(scratch[0]), "report": lines.append}
    summary = train(str(books), tmp_path, **options)
    ((recall, rows),) = [(recall, rows) for recall, rows in made if rows]
    assert any("episodes: evidence retrieved by the best head" in line for line in lines)
    found = summary["evaluations"][-1]["episodes_recall"]
    assert found == [
        dataclasses.asdict(layer) | {"heads": list(layer.heads)} for layer in recall.layers()
    ]
    model = landmark.load(tmp_path)
    again = EvidenceRecall(model.landmark)
    for row in rows:
        cache = landmark.LandmarkCache(model.config)
        cache.record = True
        model.read(torch.from_numpy(row.input_ids)[None], cache=cache)
        asked = [
            EvidenceQuery(0, token - 1, question.evidence)
            for question in row.questions
            for token in question.answer
        ]
        again.add(cache.retrievals, asked)
    assert again.queries == recall.queries > 20
    for here, there in zip(recall.layers(), again.layers(), strict=True):
        assert here.heads == pytest.approx(there.heads, abs=0.02)  # near ties in float32


def test_the_learning_rate_rises_stays_and_falls(books, scratch, tmp_path):
    recipe = toy_recipe(steps=10, warmup=2, lr=1e-3)
    lines = []
    train(
        str(books),
        tmp_path,
        recipe=recipe,
        plain=True,
        tokenizer=str(scratch[0]),
        report=lines.append,
    )
    rates = [float(line.split("lr ")[1].split()[0]) for line in lines if " lr " in line]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert all("tokens/s" in line for line in lines if " lr " in line)


def test_stops_after_max_seconds(books, scratch, tmp_path):
    recipe = toy_recipe(steps=1000)
    summary = train(
        str(books),
        tmp_path,
        recipe=recipe,
        tokenizer=str(scratch[0]),
        max_seconds=0.5,
        report=silent,
    )
    assert 1 <= summary["steps"] < 1000 and landmark.load(tmp_path).landmark.landmark_trained


def test_only_matrices_decay(books, scratch, tmp_path, monkeypatch):
    from landmark.train import run

    made = []
    stock = run._trainer

    def noting(*args, **more):
        made.append(stock(*args, **more))
        return made[-1]

    monkeypatch.setattr(run, "_trainer", noting)
    train(
        str(books), tmp_path, recipe=toy_recipe(steps=1), tokenizer=str(scratch[0]), report=silent
    )
    names = dict(made[0].model.named_parameters())
    decayed = set(made[0].get_decay_parameter_names(made[0].model))
    assert {name for name in names if "norm" in name or "landmark_embedding" in name} == set(
        names
    ) - decayed
    decays = {
        len(group["params"]): group["weight_decay"] for group in made[0].optimizer.param_groups
    }
    assert decays == {len(decayed): 0.1, len(names) - len(decayed): 0.0}


def test_plain_model_gets_landmarks_and_is_trained_further(twin, books, tmp_path):
    folder, _ = twin
    summary = train(str(books), tmp_path, recipe=toy_recipe(), model=str(folder), report=silent)
    model = landmark.load(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(folder)
    assert model.landmark.landmark_trained and model.landmark.block_size == 16
    assert (
        AutoTokenizer.from_pretrained(tmp_path).get_vocab()
        == AutoTokenizer.from_pretrained(folder).get_vocab()
    )
    assert not torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert len(summary["losses"]) == 4 and summary["arguments"]["model"] == str(folder)


def test_landmark_model_is_trained_further(scratch, books, tmp_path):
    folder, _ = scratch
    train(str(books), tmp_path, recipe=toy_recipe(top_k=2), model=str(folder), report=silent)
    model = landmark.load(tmp_path)
    assert model.landmark.top_k == 2 and model.dtype == torch.bfloat16


def test_held_out_text_is_not_trained_on(books, scratch, tmp_path):
    tokenizer = load_tokenizer(scratch[0])
    prepared = prepare_rows(str(books), tmp_path, toy_recipe(), tokenizer, block_size=16)
    unseen = prepared.held_out["text"]
    assert len(unseen) >= 2
    trained_on = prepared.train.stages[0].kinds[-1].make.ids
    end = len(trained_on)
    whole = trained_on.base
    (first,) = unseen[0]
    assert (first.input_ids == whole[end : end + 150]).all()


@pytest.mark.parametrize("held_out", [0, 3])
def test_as_many_rows_are_held_out_as_asked_for(books, scratch, tmp_path, held_out):
    recipe = toy_recipe(held_out=held_out, steps=2)
    lines = []
    options = {"recipe": recipe, "tokenizer": str(scratch[0]), "report": lines.append}
    cutter = load_tokenizer(str(scratch[0]))
    prepared = prepare_rows(str(books), tmp_path / "tokens", recipe, cutter, block_size=16)
    counts = {kind: len(rows) for kind, rows in prepared.held_out.items()}
    assert counts == ({"text": 3, "episodes": 3} if held_out else {})
    summary = train(str(books), tmp_path / "out", **options)
    assert len(summary["evaluations"]) == bool(held_out)
    assert any("held-out" in line for line in lines) == bool(held_out)


TWO_DEVICES = """
import sys
sys.path[:0] = {paths!r}
from toy import toy_recipe
from landmark.train.run import train
train({data!r}, {out!r}, recipe=toy_recipe(**{changes!r}), tokenizer={tokenizer!r})
"""


@pytest.mark.full
def test_two_devices_train_as_one(books, scratch, tmp_path):
    """Two processes on the CPU share each batch; means are over the whole batch, and landmarks of
    both are contrasted.
    """
    changes = {"position_gap": 0, "contrast": 0.5, "block_mass": 0.2}
    recipe = toy_recipe(micro_batch=2, **changes)
    options = {"recipe": recipe, "tokenizer": str(scratch[0]), "report": silent}
    expected = losses(train(str(books), tmp_path / "one", **options))
    here = Path(__file__).resolve().parent
    script = tmp_path / "two.py"
    out = tmp_path / "two"
    script.write_text(
        TWO_DEVICES.format(
            paths=[str(here), str(here.parent)],
            data=str(books),
            out=str(out),
            changes={**changes, "micro_batch": 1},
            tokenizer=str(scratch[0]),
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert losses(json.loads((out / "training_summary.json").read_text())) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (8, 7), (64, 12)])
def test_workers_are_as_many_as_the_run_has_cores_for(cores, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    settings = training_arguments(tmp_path, toy_recipe(workers=None))
    assert settings.dataloader_num_workers == workers
    assert not settings.dataloader_persistent_workers
