"""Convert, save, load in another process: the same logits, bit for bit; what the folder says, and
what it needs.
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import landmark
import models

SHARD = "20KB"
SAVED = {
    **{family: (family, torch.float32, None) for family in models.FAMILIES},
    "llama-bf16": ("llama", torch.bfloat16, None),
    "gpt_neox-sharded": ("gpt_neox", torch.float32, SHARD),
    "gemma3-bf16-sharded": ("gemma3", torch.bfloat16, SHARD),
}
TOKENS = 90

ANOTHER_PROCESS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
said = {}
try:
    AutoModelForCausalLM.from_pretrained(root / "llama")
except Exception as error:
    said["without"] = f"{type(error).__name__}: {error}"
import landmark.hf
logits = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = [type(model).__name__, type(model.config).__name__]
    said[folder.name] = [*names, str(model.dtype), model.training]
    with torch.no_grad():
        ids = torch.load(root / "ids.pt")
        logits[folder.name] = model(ids).logits
        model.configure_landmark(mode="all")
        logits[folder.name + ".all"] = model(ids).logits
save_file(logits, root / "logits.safetensors")
(root / "said.json").write_text(json.dumps(said))
"""


def converted(family: str, dtype: torch.dtype):
    model = landmark.convert(
        models.stock_model(family, dtype=dtype), block_size=5, top_k=2, local_blocks=1
    )
    model.configure_landmark(landmark_trained=True, chunk_tokens=30)
    return model


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The models, the folder they were saved in, and what another process made of it."""
    root = tmp_path_factory.mktemp("saved")
    ids = models.text(2 * TOKENS).view(2, TOKENS)
    torch.save(ids, root / "ids.pt")
    made = {}
    for name, (family, dtype, shard) in SAVED.items():
        made[name] = converted(family, dtype)
        made[name].save_pretrained(root / name, **({"max_shard_size": shard} if shard else {}))
    command = [sys.executable, "-c", ANOTHER_PROCESS, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return (
        made,
        root,
        ids,
        json.loads((root / "said.json").read_text()),
        load_file(root / "logits.safetensors"),
    )


@pytest.mark.parametrize("name", SAVED)
def test_another_process_gives_the_same_logits_bit_for_bit(elsewhere, name: str) -> None:
    made, root, ids, said, logits = elsewhere
    model = made[name]
    assert said[name] == [
        type(model).__name__,
        type(model.config).__name__,
        str(model.dtype),
        False,
    ]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits[name])
        model.configure_landmark(mode="all")
        assert torch.equal(model(ids).logits, logits[name + ".all"])
        model.configure_landmark(mode="retrieval")
    assert not torch.equal(logits[name], logits[name + ".all"])
    shards = len(list((root / name).glob("*.safetensors")))
    assert shards > 1 if SAVED[name][2] else shards == 1


def test_the_folder_says_what_to_install(elsewhere) -> None:
    _, root, _, said, _ = elsewhere
    note = (root / "llama" / "LANDMARK.md").read_text()
    assert (
        "pip install landmark-attention" in note
        and "landmark.load(" in note
        and "import landmark.hf" in note
    )
    assert str(root) not in note
    assert said["without"].startswith("ValueError") and "trust_remote_code=True" in said["without"]
    assert json.loads((root / "llama" / "config.json").read_text())["landmark"]["block_size"] == 5


def test_saving_again_changes_nothing(elsewhere, tmp_path: Path) -> None:
    _, root, _, _, _ = elsewhere
    again = landmark.load(root / "gemma3")
    again.save_pretrained(tmp_path)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (root / "gemma3", tmp_path)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "config.json").read_text() == (root / "gemma3" / "config.json").read_text()


def test_no_code_but_the_stub_and_no_implementation_is_saved(elsewhere) -> None:
    _, root, _, _, _ = elsewhere
    for name in SAVED:
        fields = json.loads((root / name / "config.json").read_text())
        assert not any("attn_implementation" in field for field in fields)
        assert [path.name for path in (root / name).glob("*.py")] == ["landmark_stub.py"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype_equals_casting(elsewhere, dtype: torch.dtype) -> None:
    _, root, ids, _, _ = elsewhere
    loaded = AutoModelForCausalLM.from_pretrained(root / "gemma3", dtype=dtype)
    cast = converted("gemma3", torch.float32).to(dtype)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, cast(ids).logits)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_converting_a_folder_equals_converting_the_model(family: str, tmp_path: Path) -> None:
    stock = models.stock_model(family, dtype=torch.float32)
    stock.save_pretrained(tmp_path)
    options = {"block_size": 5, "top_k": 2, "local_blocks": 1}
    ours = landmark.convert(stock, **options)
    theirs = landmark.convert(tmp_path, **options)
    ids = models.text(60)[None]
    for model in (ours, theirs):
        model.configure_landmark(landmark_trained=True)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.landmark == theirs.landmark
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    stock_keys = set(stock.state_dict())
    assert {key.rsplit(".", 2)[-2] for key in set(ours.state_dict()) - stock_keys} == {
        "landmark_embedding"
    }


def test_a_model_shares_its_weights_with_the_one_it_was_made_of() -> None:
    stock = models.stock_model("llama", dtype=torch.float32)
    model = landmark.convert(stock, block_size=5)
    for name, parameter in stock.named_parameters():
        assert model.get_parameter(name) is parameter
    assert stock.config.model_type == "llama" and stock.config._attn_implementation != "landmark"
    with torch.no_grad():
        assert stock(models.text(9)[None]).logits.shape == (1, 9, models.VOCAB)


def test_settings_survive(tmp_path: Path) -> None:
    model = converted("qwen3", torch.float32)
    changed = {
        "top_k": 3,
        "granularity": "group",
        "positions": "exact",
        "max_blocks": 7,
        "layers": (1,),
    }
    model.configure_landmark(**changed)
    model.save_pretrained(tmp_path)
    settings = landmark.load(tmp_path).landmark
    assert settings == model.landmark
    assert {name: getattr(settings, name) for name in changed} == changed
    assert AutoConfig.from_pretrained(tmp_path).landmark == model.config.landmark


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_the_decoder_alone_attends_by_landmarks_too(elsewhere, family: str) -> None:
    made, root, ids, _, _ = elsewhere
    decoder = AutoModel.from_pretrained(root / family)
    assert type(decoder) is type(made[family].base_model)
    with torch.no_grad():
        assert torch.equal(
            decoder(ids).last_hidden_state, made[family].base_model(ids).last_hidden_state
        )


def test_copies_and_pickles_are_the_same_model() -> None:
    model = converted("qwen3", torch.float32)
    ids = models.text(60)[None]
    with torch.no_grad():
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(ids).logits, model(ids).logits)
