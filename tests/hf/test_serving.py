"""Stock tools around a landmark model: chat, pipelines, streamers, generate's options, placement,
quantization.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import landmark
import models
from landmark import LandmarkCache, LandmarkConfig

RETRIEVE = LandmarkConfig(block_size=5, top_k=2, local_blocks=1, chunk_tokens=13)
WORDS = [f"w{number}" for number in range(models.VOCAB - 4)]
CHAT = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)
PLACED = {
    "llama": ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "landmark_embedding"),
    "gpt_neox": (
        "embed_in",
        "emb_dropout",
        "final_layer_norm",
        "rotary_emb",
        "layers.0",
        "layers.1",
        "landmark_embedding",
    ),
}


def llama() -> Any:
    return models.landmark_model("llama", RETRIEVE)


def prompts() -> torch.Tensor:
    return models.text(34).view(2, 17)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {
        word: index for index, word in enumerate(["<pad>", "<unk>", "<user>", "<bot>", *WORDS])
    }
    inner = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    made.chat_template = CHAT
    return made


def words(count: int, seed: int) -> str:
    return " ".join(
        WORDS[index] for index in torch.randperm(len(WORDS), generator=_generator(seed))[:count]
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_chat_on_one_cache_equals_one_long_prompt() -> None:
    model = llama()
    speaks = tokenizer()
    cache = LandmarkCache(model.config)
    messages = []
    for turn in range(3):
        messages.append({"role": "user", "content": words(14, seed=turn)})
        ids = speaks.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        options = {"max_new_tokens": 9, "do_sample": False}
        continued = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(continued, model.generate(ids, **options))
        assert cache.get_seq_length() == continued.shape[1] - 1
        messages.append(
            {"role": "assistant", "content": speaks.decode(continued[0, ids.shape[1] :])}
        )
    assert ids.shape[1] > 60 and ids[0].tolist().count(speaks.convert_tokens_to_ids("<bot>")) >= 3


def test_pipeline_and_streamers_say_what_generate_says(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    speaks = tokenizer()
    prompt = words(23, seed=4)
    ids = speaks(prompt, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False}
    new = speaks.decode(model.generate(ids, **options)[0, ids.shape[1] :])
    said = pipeline("text-generation", model=model, tokenizer=speaks, device="cpu")
    assert (
        said(prompt, **options, return_full_text=False)[0]["generated_text"].split() == new.split()
    )
    both = said([prompt, words(9, seed=5)], batch_size=2, **options, return_full_text=False)
    assert both[0][0]["generated_text"].split() == new.split()
    chat = said([{"role": "user", "content": prompt}], **options)[0]["generated_text"]
    assert chat[-1]["role"] == "assistant" and chat[-1]["content"]

    capsys.readouterr()
    model.generate(ids, streamer=TextStreamer(speaks, skip_prompt=True), **options)
    assert capsys.readouterr().out.split() == new.split()
    streamer = TextIteratorStreamer(speaks, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, args=(ids,), kwargs={"streamer": streamer, **options}
    )
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts).split() == new.split() and len(parts) > 2


def test_a_folder_serves_a_pipeline_by_its_path(tmp_path: Path) -> None:
    model = llama()
    speaks = tokenizer()
    prompt = words(23, seed=4)
    model.save_pretrained(tmp_path)
    speaks.save_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    by_path = pipeline("text-generation", model=str(tmp_path), device="cpu")(prompt, **options)
    assert by_path == pipeline("text-generation", model=model, tokenizer=speaks, device="cpu")(
        prompt, **options
    )
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == speaks.get_vocab()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"guidance_scale": 1.5},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"num_beams": 3, "do_sample": True},
    ],
    ids=str,
)
def test_options_of_generate_are_the_same_without_a_cache(options: dict[str, Any]) -> None:
    said = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        said.append(
            llama().generate(
                prompts(), **{"do_sample": False, **options}, max_new_tokens=9, use_cache=use_cache
            )
        )
    assert torch.equal(*said) and len(said[0]) == 2 * options.get("num_return_sequences", 1)


def test_generation_from_embeddings() -> None:
    model = llama()
    ids = prompts()
    expected = model.generate(ids, max_new_tokens=9, do_sample=False)[:, 17:]
    embeds = model.get_input_embeddings()(ids)
    for more in ({}, {"use_cache": False}):
        assert torch.equal(
            model.generate(inputs_embeds=embeds, max_new_tokens=9, do_sample=False, **more),
            expected,
        )


def test_what_generate_returns_beside_the_tokens() -> None:
    model = llama()
    ids = prompts()
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(
        ids, output_scores=True, output_logits=True, output_hidden_states=True, **options
    )
    with torch.no_grad():
        logits = model(out.sequences).logits[:, 16:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits.float(), rtol=0, atol=1e-5)
    assert [tuple(states[-1].shape) for states in out.hidden_states] == [(2, 17, 32)] + [
        (2, 1, 32)
    ] * 5
    assert isinstance(out.past_key_values, LandmarkCache) and len(out.scores) == 6
    transition = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    expected = logits.log_softmax(-1).gather(2, out.sequences[:, 17:, None])[..., 0]
    torch.testing.assert_close(transition, expected.float(), rtol=0, atol=1e-4)


def test_logits_of_chosen_columns() -> None:
    model = llama()
    ids = prompts()
    with torch.no_grad():
        whole = model(ids).logits
        for keep, columns in ((torch.tensor([3, 9]), [3, 9]), (1, [16]), (5, range(12, 17))):
            kept = model(ids, logits_to_keep=keep).logits
            torch.testing.assert_close(kept, whole[:, list(columns)], rtol=0, atol=1e-12)


def test_what_would_pass_landmarks_by_is_refused() -> None:
    model = llama()
    ids = prompts()
    for name in ("static", "offloaded", "quantized", "sliding_window"):
        with pytest.raises(ValueError, match=f"'{name}' cannot hold landmarks"):
            model.generate(ids, max_new_tokens=2, cache_implementation=name)
    for call in (
        lambda: model.generate_batch([[1, 2, 3]]),
        lambda: model.init_continuous_batching(),
    ):
        with pytest.raises(AttributeError, match="continuous batching does not know landmarks"):
            call()
    with pytest.raises(ValueError, match="no attention matrix"):
        model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"expected shape \(2, 17\), got dict"):
        model(ids, attention_mask={"full_attention": torch.ones(2, 17)})


def placed(model: Any, name: str, **elsewhere: str) -> dict[str, str]:
    found = {
        f"{model.base_model_prefix}.{part}": elsewhere.get(part.replace(".", "_"), "cpu")
        for part in PLACED[name]
    }
    head = next(
        part for part, module in model.named_modules() if module is model.get_output_embeddings()
    )
    return {**found, head: "cpu"}


PLACES: list[Any] = [
    "cpu",
    {"": "cpu"},
    "auto",
    {"layers_1": "disk"},
    {"embed_tokens": "disk", "embed_in": "disk", "layers_0": "disk"},
    {"landmark_embedding": "disk"},
]


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_placement_changes_nothing(name: str, where: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    settings = {"block_size": 5, "top_k": 2, "local_blocks": 1}
    stock = models.stock_model(name, dtype=torch.float32)
    ours = landmark.convert(stock, **settings)
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    spread = isinstance(where, dict) and "" not in where
    options = {
        "device_map": placed(ours, name, **where) if spread else where,
        **({"offload_folder": str(tmp_path / "off")} if spread else {}),
    }
    ids = prompts()
    ours.configure_landmark(landmark_trained=True)
    for model in (
        landmark.convert(tmp_path / "stock", **settings, **options),
        landmark.load(tmp_path / "ours", **options),
    ):
        model.configure_landmark(landmark_trained=True)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, ours(ids).logits)
        assert model.read(ids).get_seq_length() == 17
        said = [each.generate(ids, max_new_tokens=6, do_sample=False) for each in (model, ours)]
        assert torch.equal(*said)
        if spread:
            assert "disk" in map(str, model.hf_device_map.values())


def test_dispatch_of_a_model_in_memory() -> None:
    accelerate = pytest.importorskip("accelerate")
    stock = models.stock_model("gemma3", dtype=torch.float32)
    ids = prompts()
    models_of_it = [
        landmark.convert(stock, block_size=5, top_k=2, local_blocks=1) for _ in range(2)
    ]
    for model in models_of_it:
        model.configure_landmark(landmark_trained=True)
    with torch.no_grad():
        expected = models_of_it[0](ids).logits
        accelerate.cpu_offload(models_of_it[1], torch.device("cpu"))
        assert torch.equal(models_of_it[1](ids).logits, expected)


@register_quantization_config("rounded")
class RoundedConfig(QuantizationConfigMixin):
    def __init__(self, **_: Any) -> None:
        self.quant_method = "rounded"


@register_quantizer("rounded")
class RoundedQuantizer(HfQuantizer):
    """Rounds every linear layer of a model being loaded to steps of 1/8."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_((8 * module.weight).round() / 8)
        return model


def test_quantized_while_loading(tmp_path: Path) -> None:
    """By a quantizer of our own; those for 4 and 8 bits are packages."""
    pytest.importorskip("accelerate")
    models.stock_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    options = {"quantization_config": RoundedConfig()}
    model = landmark.convert(tmp_path, block_size=50, mode="all", **options)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.hf_quantizer is not None
    with torch.no_grad():
        torch.testing.assert_close(
            model(prompts()).logits, stock(prompts()).logits, rtol=0, atol=1e-4
        )
        assert (stock(prompts()).logits - plain(prompts()).logits).abs().max() > 0.1
    in_memory = landmark.convert(stock, block_size=50, mode="all")
    assert in_memory.hf_quantizer is stock.hf_quantizer
    with torch.no_grad():
        assert torch.equal(in_memory(prompts()).logits, model(prompts()).logits)


@pytest.mark.parametrize("quantizer", ["nf4", "int8", "torchao"])
def test_quantized_to_few_bits(quantizer: str, tmp_path: Path) -> None:
    import transformers

    package = pytest.importorskip("torchao" if quantizer == "torchao" else "bitsandbytes")
    assert package is not None
    if quantizer == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif quantizer == "nf4":
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    else:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    stock = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=models.VOCAB,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
        )
    )
    stock.save_pretrained(tmp_path / "stock")
    model = landmark.convert(tmp_path / "stock", block_size=5, top_k=2, quantization_config=config)
    model.configure_landmark(landmark_trained=True)
    model.save_pretrained(tmp_path / "ours")
    again = landmark.load(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(model(prompts()).logits, again(prompts()).logits)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_one_graph_in_mode_all(family: str) -> None:
    model = models.landmark_model(
        family, LandmarkConfig(block_size=5, mode="all"), dtype=torch.float32
    )
    ids = models.text(46).view(2, 23)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = model(ids, labels=ids, use_cache=False).loss
    found = compiled(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(found, loss, rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_training_and_evaluation_mode() -> None:
    model = llama()
    ids = prompts()
    assert not model.training
    model.train()
    try:
        with pytest.raises(ValueError, match="train mode"):
            model(ids)
        model.configure_landmark(mode="all")
        assert model(ids).logits.requires_grad
    finally:
        model.eval()
        model.configure_landmark(mode="retrieval")
    assert (
        not model(ids).logits.grad_fn or model(ids).logits.grad_fn.next_functions[0][0] is not None
    )
