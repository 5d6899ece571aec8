"""A tiny adapter that is merged into base weights which a package carries, as smollm2 is.

The base is a quantized GGUF file, written as llama.cpp orders its rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import landmark
from landmark.hf import bundled
from landmark.hf.base import PinnedBase
from landmark.train.lora import add_lora
from tiny import talking_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULE = "tiny_base_of_tests"
FILE = "tiny.Q4_1.gguf"
HEADS = 4
KV_HEADS = 2


def bundler() -> Any:
    """The script that makes the bundled folder."""
    spec = importlib.util.spec_from_file_location("bundling", BENCHMARKS / "bundle_adapter.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stock_llama(**fields: Any) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        **{
            "vocab_size": len(talking_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            **fields,
        }
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: Any, heads: int) -> Any:
    """Row ``i`` of the first half of each head, then row ``i`` of its second half, and so on."""
    size = len(weight) // heads
    order = [
        head * size + half * size // 2 + row
        for head in range(heads)
        for row in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write_base(root: Path, seed: int = 0) -> PinnedBase:
    """Writes the package that carries the base to ``root/site``. It cannot be imported."""
    gguf = pytest.importorskip("gguf")
    folder = root / "site" / MODULE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('its own dependency is missing')\n")
    model = stock_llama()
    with torch.no_grad():
        for norm in (weight for weight in model.parameters() if weight.ndim == 1):
            norm += 0.3 * torch.randn(norm.shape, generator=torch.Generator().manual_seed(seed))
    config = model.config
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"<{token}>" for token in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        weight = tensor.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in key:
                weight = interleaved(weight, heads)
        name = names.get_name(key, try_suffixes=(".weight",))
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            kind = getattr(gguf.GGMLQuantizationType, "Q8_0" if "embed" in key else "Q4_1")
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return PinnedBase(
        name="smollm2",
        package="tiny-base",
        version="1.2",
        module=MODULE,
        file=FILE,
        sha256=hashlib.sha256((folder / FILE).read_bytes()).hexdigest(),
        hub="some/tiny-base",
    )


def base_model(root: Path) -> Any:
    """The base as transformers reads it, as a model that can be saved."""
    read = AutoModelForCausalLM.from_pretrained(
        root / "site" / MODULE, gguf_file=FILE, dtype=torch.float32
    )
    model = stock_llama()
    model.load_state_dict(read.state_dict())
    return model


def train_adapter(root: Path, stock: Any) -> tuple[Path, Any]:
    """Saves in ``root/out`` what ``landmark train --lora 4 --lora-layers all`` does, with random
    weights in place of trained ones. Returns the folder, and the merged model in float32.
    """
    tokenizer = talking_tokenizer()
    model = landmark.convert(stock, block_size=16, top_k=2, local_blocks=1)
    model.configure_landmark(landmark_trained=True)
    adapted = add_lora(model, 4, "all")
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape)
    out = root / "out"
    adapted.save_pretrained(out / "adapter")
    merged = adapted.merge_and_unload().eval()
    merged.generation_config.max_new_tokens = 7
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out, merged


def make(root: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Makes ``root/smollm2`` and what it needs; returns the merged model that was trained."""
    pytest.importorskip("peft")
    pinned = write_base(root)
    with installed(root):
        out, merged = train_adapter(root, base_model(root))
        bundler().bundle(out, root / "smollm2", pinned, dtype)
    return merged


@contextmanager
def installed(root: Path) -> Iterator[None]:
    """Makes the package with the base and the bundled model in ``root`` known inside a ``with``."""
    found = bundled.model_path

    def model_path(name: str = "landmark") -> Path:
        return root / name if name == "smollm2" else found(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "site"))
        patch.setattr(bundled, "model_path", model_path)
        yield
