"""Times LoRA tuning by `landmark train` for models of 135M, 1B and 8B parameters.

    python benchmarks/tuning.py --out out/results/tuning.json
    python benchmarks/tuning.py --processes 4 --out out/results/tuning-4.json

Rows are of Python's reference, three in ten of them episodes, by the bundled model's tokenizer.
With several processes there is one for each GPU, and a step has the same rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
from shapes import SHAPES, random_model
from transformers import AutoTokenizer

from landmark.eval.fillers import pydoc_text
from landmark.hf.bundled import model_path
from landmark.train.summary import SUMMARY
from landmark.versions import made_with

VOCAB = {"135M": 49152, "1B": 128256, "8B": 128256}
TIED = ("135M", "1B")  # output weights are those of the token embedding
# Rows that one GPU takes at once.
MICRO_BATCH = {"135M": 4, "1B": 2, "8B": 1}
CHARACTERS = 80  # of text for each position of a row
KEPT = ("parameters", "steps", "tokens", "tokens_per_second_median", "seconds", "peak_bytes")


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; replaced")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="with commas")
    parser.add_argument("--processes", type=int, default=1, help="GPUs")
    parser.add_argument("--length", type=int, default=4096, help="positions of a row")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step, on all GPUs")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    names = options.shapes.split(",")
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        parser.error(f"--shapes: expected some of {', '.join(SHAPES)}, got {', '.join(unknown)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = made_with(device, "torch", "triton", "transformers", "peft")
    rows = []
    for name in names:
        rows.append(measure(name, options, device))
        print(json.dumps(rows[-1]), flush=True)
    record.write(options.out, made, {"rows": rows})


def measure(name: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Trains a model of one shape for some steps, and returns what its summary says.

    Raises:
        subprocess.CalledProcessError: the training failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(name, folder / "model", device)
        text = pydoc_text()[: options.length * CHARACTERS]
        (folder / "text.txt").write_text(text, encoding="utf-8")
        command = [*launcher(options.processes), *arguments(name, folder, options)]
        subprocess.run(command, check=True)
        summary = json.loads((folder / "tuned" / SUMMARY).read_text(encoding="utf-8"))
    losses = [round(each["loss"], 4) for each in summary["losses"]]
    row = {"shape": name, "processes": options.processes, "length": options.length}
    row |= {"batch": options.batch, "micro_batch": MICRO_BATCH[name]}
    return row | {key: summary[key] for key in KEPT} | {"losses": losses}


def launcher(processes: int) -> list[str]:
    """Returns the command that starts so many processes of a module."""
    if processes == 1:
        return [sys.executable, "-m"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    return [*launch, "--num_processes", str(processes), "-m"]


def arguments(name: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Returns the module and its arguments."""
    settings = (
        f"--lora 16 --weights bfloat16 --episodes 0.3 --length {options.length} "
        f"--batch {options.batch} --micro-batch {MICRO_BATCH[name]} --steps {options.steps} "
        "--warmup 0 --held-out 0 --log-every 5"
    )
    files = {"--data": "text.txt", "--model": "model", "--out": "tuned"}
    named = [word for option, file in files.items() for word in (option, str(folder / file))]
    return ["landmark.cli.app", "train", *settings.split(), *named]


def save_model(name: str, folder: Path, device: str) -> None:
    """Saves a model of a shape with random weights, and the bundled model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = random_model(
        name,
        device,
        vocab_size=VOCAB[name],
        max_position_embeddings=8192,
        tie_word_embeddings=name in TIED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
