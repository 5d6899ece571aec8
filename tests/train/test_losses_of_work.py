"""No run is lost: what can fail in the end is asked for in the beginning, and what was trained is
kept.
"""

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError
from toy import MODEL, silent, toy_recipe
from transformers import PreTrainedModel

import landmark
from landmark.cli import app as cli
from landmark.train import run
from landmark.train.run import train
from landmark.train.trainer import Trainer
from small_text import sentences

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"

MODELS = {
    "no heads": {"num_attention_heads": 0},
    "no width": {"hidden_size": 0},
    "a negative width": {"hidden_size": -4},
    "a width that is a word": {"hidden_size": "x"},
    "no key/value heads": {"num_key_value_heads": 0},
    "an unknown kind of RoPE": {"rope_parameters": {"rope_type": "bogus"}},
    "RoPE that is a number": {"rope_parameters": 5},
    "a word for theta": {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    "an unknown activation": {"hidden_act": "bogus"},
    "half a layer": {"num_hidden_layers": 1.5},
    "no layers": {"num_hidden_layers": 0},
    "no inner width": {"intermediate_size": None},
    "a word for the length": {"max_position_embeddings": "x"},
    "odd heads": {"head_dim": 7},
    "a word for epsilon": {"rms_norm_eps": "x"},
    "a negative spread": {"initializer_range": -1},
    "perhaps tied": {"tie_word_embeddings": "maybe"},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plain", [False, True])
def test_a_recipe_of_no_model_is_refused_before_anything_is_computed(
    tmp_path, monkeypatch, capsys, name, plain
):
    monkeypatch.chdir(tmp_path)
    Path("r.json").write_text(
        json.dumps({"model": {**MODEL, **MODELS[name]}, "landmark": {"block_size": 16}})
    )
    Path("a.txt").write_text(sentences(400))
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["train", "--data", "a.txt", "--out", "o", "--config", "r.json", *["--plain"] * plain]
        )
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and said.splitlines()[-1].startswith("error: r.json: model: ")
        and len(said) < 400
    )
    assert not Path("o").exists()


def test_a_short_text_is_trained_on_without_evaluation(tmp_path):
    (tmp_path / "a.txt").write_text(sentences(150))
    said = []
    summary = train(
        str(tmp_path / "a.txt"),
        tmp_path / "o",
        recipe=toy_recipe(episodes=0.0, evaluate_every=1, steps=1),
        report=said.append,
    )
    assert summary["steps"] == 1 and summary["evaluations"] == []
    assert any(
        line.startswith("nothing is evaluated: the text has fewer than 40 rows") for line in said
    )


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "wandb",
            ModuleNotFoundError,
            "report_to: wandb needs a package that is not here: pip install wandb, or",
        ),
        ("bogus", ValueError, "report_to: expected none or one of .*wandb.*, got 'bogus'"),
    ],
)
def test_what_is_reported_to_is_asked_for_first(books, tmp_path, monkeypatch, name, kind, message):
    monkeypatch.setattr(run, "get_available_reporting_integrations", list)
    with pytest.raises(kind, match=message):
        train(str(books), tmp_path / "o", recipe=toy_recipe(report_to=name), report=silent)
    assert not (tmp_path / "o").exists()


def test_a_run_that_cannot_be_saved_is_kept_elsewhere(twin, books, tmp_path, monkeypatch):
    stock = PreTrainedModel.save_pretrained

    def save(self, folder, **more):
        if ".landmark-new/o" in str(folder):
            raise SafetensorError(FULL)
        stock(self, folder, **more)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    monkeypatch.setattr(run.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=r"No space left.* what was trained is in ") as caught:
        train(
            str(books),
            tmp_path / "o",
            recipe=toy_recipe(steps=1),
            model=str(twin[0]),
            report=silent,
        )
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert kept.parent == tmp_path and landmark.load(kept).landmark.landmark_trained
    assert not list((tmp_path / "o").glob("*.safetensors")) and (kept / "tokenizer.json").is_file()


def test_a_checkpoint_that_cannot_be_saved_does_not_end_the_run(books, tmp_path, monkeypatch):
    def save(self, *arguments, **more):
        (tmp_path / "o" / "checkpoints" / f"checkpoint-{self.state.global_step}").mkdir(
            parents=True
        )
        raise SafetensorError(FULL)

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    with pytest.warns(
        UserWarning, match=r"checkpoint-1: no checkpoint, as it cannot be written \(Error while ser"
    ):
        summary = train(
            str(books),
            tmp_path / "o",
            recipe=toy_recipe(steps=2, save_every=1),
            plain=True,
            report=silent,
        )
    assert summary["steps"] == 2 and (tmp_path / "o" / "model.safetensors").is_file()
    assert list((tmp_path / "o" / "checkpoints").iterdir()) == []
