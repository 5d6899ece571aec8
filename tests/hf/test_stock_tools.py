"""Tools that load a model by its name and never import this package: the stub in a saved folder
does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import landmark
import models
import tiny
from landmark.hf.families import family

PROMPT = "The grass is green. What is the pass key? The pass key is " * 4
STUB = "landmark_stub.py"

# Loads a folder as a stranger's program does; says what happened as JSON.
STRANGER = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

folder, again, prompt = sys.argv[1:]
said = {}
def in_pipeline(folder):
    return pipeline("text-generation", folder)

for name, load in (("config", AutoConfig.from_pretrained), ("pipeline", in_pipeline)):
    try:
        load(folder)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
assert "landmark" not in sys.modules
made = pipeline("text-generation", model=folder, trust_remote_code=True)
said["text"] = made(prompt, max_new_tokens=9, do_sample=False)[0]["generated_text"]
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    loaded = auto.from_pretrained(folder, trust_remote_code=True)
    said[auto.__name__] = f"{type(loaded).__module__}.{type(loaded).__name__}"
loaded.save_pretrained(again)
print("", json.dumps(said), sep="\\n")  # behind the question whether to trust the folder
"""

# The same where this package is missing, and where another one is called landmark.
WITHOUT_PACKAGE = """
import json, sys, types
from transformers import AutoConfig

said = []
for module in (None, types.ModuleType("landmark")):
    sys.modules["landmark"] = module
    try:
        AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a landmark model with its tokenizer as ``marked``."""
    folder = tmp_path_factory.mktemp("stock-tools")
    tiny.save_models(folder)
    return folder


def apart(root: Path, *command: Any) -> str:
    """Runs Python in a process of its own, with caches of its own, and returns what it prints."""
    paths = [str(Path(landmark.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "HF_HOME": str(root / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stranger(root: Path) -> dict[str, Any]:
    printed = apart(root, "-c", STRANGER, root / "marked", root / "again", PROMPT)
    said: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return said


@pytest.mark.parametrize("call", ["config", "pipeline"])
def test_without_trust_the_folder_says_what_is_wanted(stranger: dict[str, str], call: str) -> None:
    assert stranger[call].startswith("ValueError") and "trust_remote_code=True" in stranger[call]


def test_a_pipeline_by_path_says_what_the_model_says(root: Path, stranger: dict[str, str]) -> None:
    speaks = tiny.tiny_tokenizer()
    ids = speaks(PROMPT, return_tensors="pt").input_ids
    said = landmark.load(root / "marked").generate(ids, max_new_tokens=9, do_sample=False)
    assert stranger["text"] == PROMPT + speaks.decode(said[0, ids.shape[1] :])


@pytest.mark.parametrize(
    ("auto", "made"),
    [("AutoConfig", "Config"), ("AutoModel", "Model"), ("AutoModelForCausalLM", "ForCausalLM")],
)
def test_the_auto_classes_find_the_classes_of_this_package(
    stranger: dict[str, str], auto: str, made: str
) -> None:
    assert stranger[auto] == f"landmark.hf.families.LandmarkLlama{made}"


def test_transformers_serve_finds_the_class_where_it_looks(root: Path) -> None:
    import transformers

    model = landmark.load(root / "marked")
    assert getattr(transformers, model.config.architectures[0]) is type(model)


def test_what_a_stranger_saves_again_is_the_same_folder(
    root: Path, stranger: dict[str, str]
) -> None:
    saved = {path.name for path in (root / "again").iterdir()}
    assert saved == {
        path.name for path in (root / "marked").iterdir() if not path.name.startswith("tokenizer")
    }
    for name in (STUB, "config.json"):
        assert (root / "again" / name).read_text() == (root / "marked" / name).read_text()


def test_without_the_package_the_message_names_it(root: Path) -> None:
    said = json.loads(apart(root, "-c", WITHOUT_PACKAGE, root / "marked"))
    assert len(said) == 2
    for message in said:
        assert message.startswith("ImportError: this model needs landmark-attention"), message
        assert "pip install -U landmark-attention" in message and "\n" not in message


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_the_stub_of_every_family_names_its_classes(name: str, tmp_path: Path) -> None:
    made = family(name)
    made.config().save_pretrained(tmp_path)
    names: dict[str, Any] = {}
    exec((tmp_path / STUB).read_text(), names)
    found = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    expected = {
        "AutoConfig": made.config,
        "AutoModel": made.decoder,
        "AutoModelForCausalLM": made.causal_lm,
    }
    assert {
        auto: names[reference.removeprefix("landmark_stub.")] for auto, reference in found.items()
    } == expected
    assert type(AutoConfig.from_pretrained(tmp_path)) is made.config


def test_with_the_package_imported_the_stub_is_not_run(root: Path, tmp_path: Path) -> None:
    model = landmark.load(root / "marked")
    model.save_pretrained(tmp_path)
    (tmp_path / STUB).write_text("raise RuntimeError('the stub was run')")
    assert (
        type(AutoModelForCausalLM.from_pretrained(tmp_path))
        is type(landmark.load(tmp_path))
        is type(model)
    )
    model.save_pretrained(tmp_path)
    assert (tmp_path / STUB).read_text() == (root / "marked" / STUB).read_text()


def test_only_the_main_process_writes(root: Path, tmp_path: Path) -> None:
    landmark.load(root / "marked").save_pretrained(tmp_path, is_main_process=False)
    assert not {STUB, "LANDMARK.md", "config.json"} & {path.name for path in tmp_path.iterdir()}


def test_shards_and_decoders_have_it_too(root: Path, tmp_path: Path) -> None:
    model = landmark.load(root / "marked")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.base_model.save_pretrained(tmp_path / "decoder")
    for folder in (tmp_path / "shards", tmp_path / "decoder"):
        assert (folder / STUB).read_text() == (root / "marked" / STUB).read_text()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def test_a_checkpoint_of_a_trainer_has_it(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = landmark.load(root / "marked")
    model.configure_landmark(mode="all")
    rows = [{"input_ids": row, "labels": row} for row in models.text(40).view(2, 20)]
    options = {
        "report_to": [],
        "max_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows).train()
    assert (tmp_path / "checkpoint-1" / STUB).is_file()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")) is type(model)


def test_a_folder_of_an_adapter_is_left_alone(root: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(landmark.load(root / "marked"), config).save_pretrained(tmp_path)
    assert not {STUB, "LANDMARK.md", "config.json"} & {path.name for path in tmp_path.iterdir()}


def test_a_stock_model_made_of_its_config_has_no_stub(root: Path) -> None:
    """What reads weights densely drops the fields that name this package."""
    from landmark.eval.dense import dense_model

    dense = dense_model(landmark.load(root / "marked"))
    assert not hasattr(dense.config, "auto_map")


TASK = """
task: pass_keys
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def test_the_evaluation_harness_scores_a_folder_as_the_model(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lm_eval run` by folder against the same task through Python, on the model itself."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(root / "cache" / "datasets"))
    tasks = root / "tasks"
    rows = []
    tasks.mkdir()
    for index in range(12):
        choices = [f" {(index * 7919 + n * 104729) % 90000 + 10000}" for n in range(3)]
        rows.append({"text": PROMPT[: 40 + 11 * index], "choices": choices, "answer": index % 3})
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "pass_keys.yaml").write_text(TASK.format(data=tasks / "rows.jsonl"))
    arguments = [
        "--model_args",
        f"pretrained={root / 'marked'},trust_remote_code=True",
        "--tasks",
        "pass_keys",
    ]
    arguments += [
        "--include_path",
        tasks,
        "--output_path",
        root / "scores",
        "--batch_size",
        3,
        "--device",
        "cpu",
    ]
    apart(root, "-m", "lm_eval", "run", "--model", "hf", *arguments, "--log_samples")
    found = json.loads(next((root / "scores").rglob("results_*.json")).read_text())["results"][
        "pass_keys"
    ]

    model = HFLM(landmark.load(root / "marked"), tokenizer=tiny.tiny_tokenizer(), batch_size=3)
    manager = TaskManager(include_path=str(tasks))
    whole = lm_eval.simple_evaluate(
        model=model, tasks=["pass_keys"], task_manager=manager, bootstrap_iters=0
    )
    scores = whole["results"]["pass_keys"]
    assert (
        found["acc,none"] == scores["acc,none"]
        and found["acc_norm,none"] == scores["acc_norm,none"]
    )
    samples = next((root / "scores").rglob("samples_*.jsonl")).read_text().splitlines()
    likelihoods = [
        [float(answer[0]) for answer in json.loads(line)["filtered_resps"]] for line in samples
    ]
    expected = [
        [float(answer[0]) for answer in sample["filtered_resps"]]
        for sample in whole["samples"]["pass_keys"]
    ]
    assert likelihoods == expected and 0 < scores["acc,none"] < 1
