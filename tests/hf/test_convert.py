"""A model is converted as it was given: what was put in is kept or refused, it goes on as before,
the check sees it.
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import landmark
import models
from landmark.config import LandmarkConfig
from landmark.hf import attention, compat
from landmark.hf.causal import LandmarkCausalLMMixin
from landmark.hf.check import check_conversion
from landmark.hf.model import LandmarkDecoderMixin

IDS = models.text(2 * 20).view(2, 20)


class Louder(nn.Linear):
    """Stands for any layer that somebody puts in: quantized, fused, with an adapter."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return louder(super().forward(states))


class LouderThan(nn.Module):
    """Stands for any module that somebody wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return louder(self.inner(*args, **kwargs))


def louder(output: Any) -> Any:
    """Not only louder: norms that follow would make nothing of that."""
    return (output[0] * 1.5 + 0.1, *output[1:]) if isinstance(output, tuple) else output * 1.5 + 0.1


def parent_of(model: Any, name: str) -> tuple[nn.Module, str]:
    place, _, leaf = name.rpartition(".")
    return model.get_submodule(place), leaf


def first(model: Any, kind: Callable[[nn.Module], bool]) -> str:
    """The name of the first module inside the layers that is of a kind."""
    layers = next(name for name, each in model.named_modules() if isinstance(each, nn.ModuleList))
    return next(
        name for name, each in model.named_modules() if name.startswith(f"{layers}.") and kind(each)
    )


def is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "config")


def replace_linear(model: Any) -> None:
    name = first(model, lambda module: type(module) is nn.Linear)
    old = model.get_submodule(name)
    new = Louder(
        old.in_features, old.out_features, bias=old.bias is not None, dtype=old.weight.dtype
    )
    new.load_state_dict(old.state_dict())
    setattr(*parent_of(model, name), new)


def replace_attention(model: Any) -> None:
    name = first(model, is_attention)
    old = model.get_submodule(name)
    new = object.__new__(
        type(
            "Other",
            (type(old),),
            {"forward": lambda self, *a, **k: louder(old_forward(self, *a, **k))},
        )
    )
    old_forward = type(old).forward
    new.__dict__.update(old.__dict__)
    setattr(*parent_of(model, name), new)


def replace_layer(model: Any) -> None:
    layers = model.base_model.layers
    old_forward = type(layers[0]).forward
    new = object.__new__(
        type(
            "Other",
            (type(layers[0]),),
            {"forward": lambda self, *a, **k: louder(old_forward(self, *a, **k))},
        )
    )
    new.__dict__.update(layers[0].__dict__)
    layers[0] = new


def wrap_layer(model: Any) -> None:
    model.base_model.layers[0] = LouderThan(model.base_model.layers[0])


def replace_head(model: Any) -> None:
    model.set_output_embeddings(LouderThan(model.get_output_embeddings()))


def replace_norm(model: Any) -> None:
    name = "final_layer_norm" if hasattr(model.base_model, "final_layer_norm") else "norm"
    name = "final_layernorm" if hasattr(model.base_model, "final_layernorm") else name
    setattr(model.base_model, name, LouderThan(getattr(model.base_model, name)))


def replace_tokens(model: Any) -> None:
    old = model.get_input_embeddings()
    new = object.__new__(
        type("Other", (type(old),), {"forward": lambda self, ids: old_forward(self, ids) * 1.5})
    )
    old_forward = type(old).forward
    new.__dict__.update(old.__dict__)
    model.set_input_embeddings(new)


def wrap_tokens(model: Any) -> None:
    """In a module that has no weight of its own."""
    model.set_input_embeddings(LouderThan(model.get_input_embeddings()))


def hook_inside(model: Any) -> None:
    model.base_model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: louder(output)
    )


def pre_hook_inside(model: Any) -> None:
    name = first(model, lambda module: type(module) is nn.Linear)
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def hook_on_the_layer(model: Any) -> None:
    model.base_model.layers[0].register_forward_hook(lambda module, args, output: louder(output))


def hook_on_the_decoder(model: Any) -> None:
    def louder_states(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    model.base_model.register_forward_hook(louder_states)


def hook_on_the_model(model: Any) -> None:
    def louder_logits(module: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits * 1.5
        return output

    model.register_forward_hook(louder_logits)


def method_on_the_instance(model: Any) -> None:
    mlp = model.base_model.layers[0].mlp
    old_forward = type(mlp).forward
    mlp.forward = types.MethodType(lambda self, states: louder(old_forward(self, states)), mlp)


def parametrization(model: Any) -> None:
    name = first(model, lambda module: type(module) is nn.Linear)
    nn.utils.parametrize.register_parametrization(
        model.get_submodule(name), "weight", LouderThan(nn.Identity())
    )


def lora(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(model, config)


def extra_buffer(model: Any) -> None:
    mlp = model.base_model.layers[0].mlp
    mlp.register_buffer("loudness", torch.tensor(1.5), persistent=False)
    mlp.register_forward_hook(lambda module, args, output: output * module.loudness)


PUT_IN = [
    replace_linear,
    replace_attention,
    replace_layer,
    wrap_layer,
    replace_head,
    replace_norm,
    replace_tokens,
    wrap_tokens,
    hook_inside,
    pre_hook_inside,
    hook_on_the_layer,
    hook_on_the_decoder,
    hook_on_the_model,
    method_on_the_instance,
    parametrization,
    lora,
    extra_buffer,
]
AT_ONCE = [
    replace_linear,
    replace_attention,
    replace_norm,
    replace_head,
    replace_tokens,
    wrap_tokens,
    hook_inside,
    hook_on_the_layer,
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same_function(given: Any, **settings: Any) -> Any:
    """Converts a model that is not the plain one any more, and compares both on a text within a
    block.
    """
    expected = logits(given)
    model = landmark.convert(given, block_size=64, **settings)
    torch.testing.assert_close(
        logits(model), expected, rtol=0, atol=2e-5 * float(expected.abs().max())
    )
    assert torch.equal(logits(given), expected)
    return model


@pytest.mark.parametrize("put_in", PUT_IN, ids=lambda each: each.__name__)
def test_what_was_put_in_is_kept(put_in: Any) -> None:
    given = models.family_model("llama", dtype=torch.float32)
    before = logits(given)
    put_in(given)
    assert (logits(given) - before).abs().max() > 0.01
    same_function(given)


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_what_was_put_in_is_kept_in_every_family(name: str) -> None:
    given = models.family_model(name)
    for put_in in AT_ONCE:
        before = logits(given)
        put_in(given)
        assert (logits(given) - before).abs().max() > 0.001
    same_function(given)


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_the_given_model_goes_on_as_before(name: str) -> None:
    given = models.family_model(name).train()
    given.get_input_embeddings().eval()
    given.get_input_embeddings().weight.requires_grad_(False)
    config = copy.deepcopy(given.config.__dict__)
    generation = given.generation_config.to_dict()
    modules = dict(given.named_modules())
    flags = {each: each.training for each in given.modules()}
    torch.manual_seed(0)
    random = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = landmark.convert(given, block_size=5)
    assert torch.equal(torch.get_rng_state(), random)
    assert given.config.__dict__ == config and given.generation_config.to_dict() == generation
    assert (
        dict(given.named_modules()) == modules
        and {each: each.training for each in given.modules()} == flags
    )
    assert not any(each.training for each in model.modules())
    for key, parameter in given.named_parameters():
        assert model.get_parameter(key) is parameter
    assert (
        not model.get_input_embeddings().weight.requires_grad
        and model.base_model.landmark_embedding.weight.requires_grad
    )
    assert (
        model.generation_config.to_dict() == generation
        and model.config.model_type == f"landmark_{name}"
    )
    assert set(map(id, model.modules())).isdisjoint(map(id, given.modules()))
    tied = given.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_modes_hooks_and_layers_of_the_two_are_their_own() -> None:
    given = models.family_model("llama")
    model = landmark.convert(given, block_size=64)
    before = None
    before = logits(given)
    hook_inside(model)
    replace_linear(model)
    model.train()
    assert torch.equal(logits(given), before) and not any(each.training for each in given.modules())


@pytest.mark.parametrize("asked", ["before", "after", "never"])
def test_hidden_states_and_router_logits_come_once(asked: str) -> None:
    """Newer transformers hang hooks on the modules when these are first asked for."""
    given = models.family_model("qwen3_moe", dtype=torch.float32)
    if asked == "before":
        given(IDS, output_hidden_states=True, output_router_logits=True)
    model = landmark.convert(given, block_size=64, mode="all")
    order = (given, model) if asked == "after" else (model, given)
    for each in order:
        output = each(IDS, output_hidden_states=True, output_router_logits=True, use_cache=False)
        assert len(output.hidden_states) == 3 and len(output.router_logits) == 2


def test_gradient_checkpointing_stays_on() -> None:
    given = models.family_model("llama", dtype=torch.float32)
    given.gradient_checkpointing_enable({"use_reentrant": False})
    model = landmark.convert(given, block_size=5, mode="all").train()
    assert model.is_gradient_checkpointing
    calls = []
    model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2


def test_mixed_dtypes_and_ways_to_compute_experts_are_kept() -> None:
    given = models.family_model("llama", dtype=torch.bfloat16)
    given.base_model.norm.float()
    given.get_output_embeddings().float()
    model = landmark.convert(given, block_size=64)
    assert {key: p.dtype for key, p in given.named_parameters()}.items() <= {
        key: p.dtype for key, p in model.named_parameters()
    }.items()
    assert (
        landmark.convert(
            models.family_model("mixtral"), block_size=5
        ).config._experts_implementation
        == "eager"
    )


def test_a_model_offloaded_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = logits(models.family_model("llama", dtype=torch.float32))
    given = accelerate.cpu_offload(models.family_model("llama", dtype=torch.float32), "cpu")
    model = landmark.convert(given, block_size=64)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(given), expected, rtol=0, atol=1e-5)
    assert {p.device.type for p in model.get_input_embeddings().parameters()} == {"meta"}


def test_a_model_in_several_places(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = logits(models.family_model("llama", dtype=torch.float32))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    given = models.family_model("llama", dtype=torch.float32)
    given = accelerate.dispatch_model(
        given, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    model = landmark.convert(given, block_size=64)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(given), expected, rtol=0, atol=1e-5)


def forward_of_the_decoder(model: Any) -> None:
    old = model.base_model.forward
    model.base_model.forward = types.MethodType(
        lambda self, *a, **k: old(*a, **k), model.base_model
    )


def closure_on_the_layer(model: Any) -> None:
    layer = model.base_model.layers[0]
    old = layer.forward
    layer.forward = lambda *args, **kwargs: louder(old(*args, **kwargs))


def subclassed(model: Any) -> None:
    model.__class__ = type("Mine", (type(model),), {})


def subclassed_decoder(model: Any) -> None:
    model.base_model.__class__ = type("Mine", (type(model.base_model),), {})


def adapter_loaded(model: Any) -> None:
    models.require_stock_adapters()
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))


def pre_hook_on(part: str) -> Callable[[Any], None]:
    def put_in(model: Any) -> None:
        (model if part == "model" else model.base_model).register_forward_pre_hook(
            lambda module, args: None
        )

    return put_in


REFUSED = {
    "the decoder's forward": (
        forward_of_the_decoder,
        r"^model: its forward was replaced.*register a hook$",
    ),
    "a closure": (
        closure_on_the_layer,
        r"layers.0: its forward was replaced on the instance.*register a hook$",
    ),
    "a subclass": (
        subclassed,
        "expected a LlamaForCausalLM, got Mine.*load the weights as LlamaForCausalLM$",
    ),
    "a subclass of the decoder": (subclassed_decoder, "expected a LlamaModel, got Mine"),
    "an adapter": (adapter_loaded, "has an adapter of peft loaded.*merge_and_unload"),
    "a pre-hook on the model": (
        pre_hook_on("model"),
        "LlamaForCausalLM has a forward pre-hook.*a module inside",
    ),
    "a pre-hook on the decoder": (
        pre_hook_on("decoder"),
        "LlamaModel has a forward pre-hook.*a module inside",
    ),
    "compiled in place": (
        lambda model: model.compile(),
        "LlamaForCausalLM is compiled: convert the model before",
    ),
    "a compiled layer": (
        lambda model: model.base_model.layers[0].compile(),
        r"layers.0 is compiled: convert",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_in_one_line(name: str) -> None:
    put_in, message = REFUSED[name]
    given = models.family_model("llama", dtype=torch.float32)
    put_in(given)
    with pytest.raises(ValueError, match=message) as caught:
        landmark.convert(given)
    assert "\n" not in str(caught.value)


def compiled(model: Any) -> Any:
    return torch.compile(model)


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "wrap", [compiled, adapted, nn.DataParallel, lambda model: model.base_model]
)
def test_what_stands_around_a_model_is_refused_in_one_line(wrap: Any) -> None:
    with pytest.raises(
        ValueError, match=r"expected a (transformers model or a path|LlamaForCausalLM), got"
    ) as caught:
        landmark.convert(wrap(models.family_model("llama", dtype=torch.float32)))
    assert "\n" not in str(caught.value)


def test_weights_that_are_nowhere_are_refused() -> None:
    with torch.device("meta"):
        given = transformers.AutoModelForCausalLM.from_config(models.family_config("llama"))
    with pytest.raises(ValueError, match=r"device meta.*load them first"):
        landmark.convert(given)


BIASED = {
    "qwen2": {},
    "gpt_neox": {},
    "phi": {},
    "glm4": {},
    "starcoder2": {},
    "llama": {"attention_bias": True},
}


def sharp(name: str, scale: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of large key biases, which make its attention sharp, as Qwen2.5's are."""
    given = models.family_model(name, dtype=dtype, head_dim=32, hidden_size=128, **BIASED[name])
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in given.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.5)
            if key.endswith("k_proj.bias"):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
            if key.endswith("query_key_value.bias"):  # by head: of queries, keys and values
                keys = parameter.view(models.HEADS, 3, -1)[:, 1]
                keys.copy_(scale * torch.randn(keys.shape, generator=random))
    return given


def tamper(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    real = attention.FullPass.attend

    def attend(self: Any, module: Any, query: Any, key: Any, value: Any, scale: float) -> Any:
        return real(self, module, query, key, value, scale * factor)

    monkeypatch.setattr(attention.FullPass, "attend", attend)


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("scale", [50.0, 200.0])
def test_sharp_attention_is_exact_as_far_as_the_stock_model_is(name: str, scale: float) -> None:
    for seed in range(2):
        landmark.convert(sharp(name, scale, seed=seed), block_size=5)


def test_the_bound_of_float32_was_too_low_for_sharp_attention() -> None:
    errors = [
        check_conversion(landmark.convert(given), given)
        for given in (sharp("qwen2", 200.0, seed=n) for n in range(3))
    ]
    assert max(errors) > 1e-5


@pytest.mark.parametrize("name", BIASED)
def test_sharp_attention_hides_no_other_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = sharp(name, 50.0)
    tamper(monkeypatch, 1.05)
    with pytest.raises(ValueError, match=r"is not exact without landmarks: error \d.* above"):
        landmark.convert(given, block_size=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_defects_of_plain_models_are_seen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = models.family_model("qwen2", dtype=dtype)
    tamper(monkeypatch, 1.0003)
    with pytest.raises(ValueError, match=r"is not exact without landmarks: error .* above 1e-05"):
        landmark.convert(given, block_size=5)


def forgets(patch: pytest.MonkeyPatch) -> None:
    """What another release may do: a step gets no memory."""
    real = LandmarkDecoderMixin.extend

    def extend(self: Any, embeds: Any, mask: Any, cache: Any, *rest: Any, **more: Any) -> Any:
        if embeds.shape[1] == 1:
            cache = landmark.LandmarkCache(self.config)
        return real(self, embeds, mask, cache, *rest, **more)

    patch.setattr(LandmarkDecoderMixin, "extend", extend)


def raises(patch: pytest.MonkeyPatch) -> None:
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("prepare() got an unexpected keyword argument 'cache'\nand more lines")

    patch.setattr(LandmarkCausalLMMixin, "generate", generate)


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_a_release_that_breaks_generation_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = models.family_model(name)
    forgets(monkeypatch)
    version = transformers.__version__
    with pytest.raises(
        ValueError, match=f"does not agree.*transformers {version}.*5.0.0 to .*: error"
    ) as caught:
        landmark.convert(given, block_size=5)
    assert "\n" not in str(caught.value)


def test_a_release_in_which_generation_raises_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    raises(monkeypatch)
    message = (
        f"with a memory fails with transformers {transformers.__version__} .*TypeError: "
        "prepare.*'cache'; install"
    )
    with pytest.raises(ValueError, match=message) as caught:
        landmark.convert(models.family_model("llama"), block_size=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_layers_and_experts_in_any_precision_generate(dtype: torch.dtype) -> None:
    for name in ("llama", "mixtral") if dtype == torch.float32 else ("llama", "granite"):
        for seed in range(2):
            landmark.convert(
                models.family_model(name, layers=6, dtype=dtype, seed=seed), block_size=5
            )


def test_what_a_model_generates_by_does_not_matter_to_the_check() -> None:
    given = models.family_model("llama")
    ways = {
        "do_sample": True,
        "num_beams": 3,
        "eos_token_id": 7,
        "max_length": 2,
        "repetition_penalty": 1.5,
    }
    given.generation_config.update(**ways, use_cache=False)
    model = landmark.convert(
        given, block_size=5, top_k=3, layers=(1,), positions="exact", max_blocks=9
    )
    assert {name: getattr(model.generation_config, name) for name in ways} == ways
    expected = LandmarkConfig(
        block_size=5, top_k=3, layers=(1,), positions="exact", max_blocks=9, trained_length=4096
    )
    assert model.landmark == expected


def test_a_later_version_than_those_tested_is_named_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(transformers, "__version__", "99.1.0.dev0")
    compat._warn_of.cache_clear()
    given = models.family_model("llama")
    with pytest.warns(
        UserWarning, match=rf"transformers 99.1.0.dev0 is newer than {compat.NEWEST_TESTED}"
    ) as warned:
        model = landmark.convert(given, block_size=5)
    assert warned[0].filename == __file__
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        landmark.convert(given, block_size=5)
        landmark.load(tmp_path)
    compat._warn_of.cache_clear()
    with pytest.warns(UserWarning, match="99.1.0"):
        landmark.load(tmp_path)


@pytest.mark.parametrize("version", [compat.OLDEST_TESTED, compat.NEWEST_TESTED, "5.24.0.dev0"])
def test_tested_versions_are_not_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    compat._warn_of.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_untested()
