"""Runs from end to end: what is saved, what the summary says, what decides the losses."""

import hashlib
import json
import os
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
from landmark.data.tokenizer import load_tokenizer
from landmark.train.prepare import prepare_rows
from landmark.train.run import compile_layers, train


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
    }
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
            str(books), tmp_path / folder.name, toy_recipe(), load_tokenizer(folder), tokens=150
        ).train
        for folder in (out, scratch[0])
    ]
    assert all((rows[0][index].input_ids == rows[1][index].input_ids).all() for index in range(16))


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
    prepared = prepare_rows(str(books), tmp_path, toy_recipe(), tokenizer, tokens=150)
    unseen = prepared.held_out["text"]
    assert len(unseen) >= 2
    end = len(prepared.train.windows.ids)
    whole = prepare_rows(
        str(books), tmp_path, toy_recipe(), tokenizer, tokens=150
    ).train.windows.ids.base
    assert (unseen[0].input_ids == whole[end : end + 150]).all()


TWO_DEVICES = """
import sys
sys.path[:0] = {paths!r}
from toy import toy_recipe
from landmark.train.run import compile_layers, train
train({data!r}, {out!r}, recipe=toy_recipe(position_gap=0), tokenizer={tokenizer!r})
"""


@pytest.mark.full
def test_two_devices_train_as_one(books, scratch, tmp_path):
    """Two processes on the CPU share each batch; means are over the whole batch."""
    options = {"recipe": toy_recipe(position_gap=0), "tokenizer": str(scratch[0]), "report": silent}
    expected = losses(train(str(books), tmp_path / "one", **options))
    here = Path(__file__).resolve().parent
    script = tmp_path / "two.py"
    paths = [str(here), str(here.parent)]
    out = tmp_path / "two"
    script.write_text(
        TWO_DEVICES.format(paths=paths, data=str(books), out=str(out), tokenizer=str(scratch[0]))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert losses(json.loads((out / "training_summary.json").read_text())) == pytest.approx(
        expected, rel=1e-5
    )
