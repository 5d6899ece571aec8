"""FSDP 2 on two processes of the CPU: the losses and the model of one device."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import silent, toy_recipe

import landmark
from landmark.train.run import train

CHANGES = {"position_gap": 0, "contrast": 0.5, "evaluate_every": 2, "save_every": 2}
LORA = {"position_gap": 0, "lr": 1e-2}


def run_sharded(*runs, kind="SHARDED_STATE_DICT"):
    script = str(Path(__file__).with_name("sharded_run.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", script, json.dumps(runs)]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "1",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": kind,
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, env=environment, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def summary_of(out):
    return json.loads((out / "training_summary.json").read_text())


def check_same(out, expected):
    """Losses, held-out losses and saved weights."""
    here = summary_of(out)
    there = summary_of(expected)
    for kind in ("losses", "evaluations"):
        for one, other in zip(here[kind], there[kind], strict=True):
            shared = [name for name in other if not name.endswith("_recall")]
            assert [one[name] for name in shared] == pytest.approx(
                [other[name] for name in shared], rel=1e-5
            )
    model = landmark.load(out)
    assert model.landmark.mode == "retrieval" and model.landmark.landmark_trained
    for name, weight in landmark.load(expected).named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_shards_train_as_one_device(books, scratch, twin, tmp_path, kind):
    """A model from scratch, the same resumed, and adapters."""
    options = {"tokenizer": str(scratch[0])}
    adapters = {"model": str(twin[0]), "lora": 4}
    micro = {"micro_batch": 2}  # on two devices
    train(str(books), tmp_path / "one", recipe=toy_recipe(**CHANGES), report=silent, **options)
    train(str(books), tmp_path / "lora", recipe=toy_recipe(**LORA), report=silent, **adapters)

    def on_two(name, changes, more):
        out = str(tmp_path / f"two {name}")
        return {"data": str(books), "out": out, "changes": {**changes, **micro}, **more}

    run_sharded(on_two("one", CHANGES, options), on_two("lora", LORA, adapters), kind=kind)
    check_same(tmp_path / "two one", tmp_path / "one")
    check_same(tmp_path / "two lora", tmp_path / "lora")
    file = Path("adapter", "adapter_model.safetensors")
    mine = load_file(tmp_path / "two lora" / file)
    for name, weight in load_file(tmp_path / "lora" / file).items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=1e-5)

    shutil.rmtree(tmp_path / "two one" / "checkpoints" / "checkpoint-4")
    (tmp_path / "two one" / "model.safetensors").unlink()
    run_sharded(on_two("one", CHANGES, {**options, "resume": True}), kind=kind)
    check_same(tmp_path / "two one", tmp_path / "one")
