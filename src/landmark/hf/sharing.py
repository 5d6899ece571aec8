"""A model of other classes around the modules of a given one: tensors are shared, everything else
is its own.

Each module is copied flat: same class, same attributes, same parameters and buffers, hooks as they
stand. So whatever was put into the given model (quantized or fused layers, adapters, hooks, other
heads) is in the other one too, and neither changes the other's mode, hooks, layers or attention.
"""

from __future__ import annotations

import copy
import functools
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_TORCH_OWN = frozenset(
    vars(nn.Module())
)  # parameters, buffers, hooks, ...: dictionaries that a module must not share


def model_around(given: PreTrainedModel, causal_lm: Any, config: Any) -> Any:
    """Returns a model of class ``causal_lm`` and of ``config`` around the modules of ``given``.

    What neither the class nor a copy can keep is refused: another class of ``given`` than the class
    that both have in common, functions put on an instance that know the instance, and what was
    compiled.

    Raises:
        ValueError: as said, naming the module and the remedy.
    """
    with torch.device("meta"):
        model = causal_lm(config)
    decoder = model.base_model
    copies = _Copies(given, config)
    copies.fill(model, given, type(given).__name__)
    copies.fill(decoder, given.base_model, given.base_model_prefix)
    model._modules[given.base_model_prefix] = decoder
    model.generation_config = copy.deepcopy(given.generation_config)
    return model


def config_as(config: Any, config_class: Any) -> Any:
    """Returns a copy of a config as one of another class, with what is not saved, such as how
    experts are computed.
    """
    made = copy.deepcopy(config)
    made.__class__ = config_class
    for name in (
        "model_type",
        "transformers_version",
    ):  # where they lie on the instance, they are the other class's
        made.__dict__.pop(name, None)
    return made


class _Copies:
    """The copies made so far: what appears twice in the given model appears twice in the other."""

    def __init__(self, given: PreTrainedModel, config: Any) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._configs = {id(given.config): config}
        self._attention = config._attn_implementation
        self._decoder = given.base_model

    def of(self, module: nn.Module, name: str) -> nn.Module:
        """Returns the copy of ``module``, which is called ``name`` in the given model."""
        if id(module) not in self._modules:
            self._modules[id(module)] = made = object.__new__(type(module))
            self.fill(made, module, name)
        return self._modules[id(module)]

    def fill(self, made: nn.Module, module: nn.Module, name: str) -> None:
        """Gives ``made`` the attributes of ``module`` and copies of the modules below it."""
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name} is compiled: convert the model before compile(), then compile what comes "
                "out"
            )
        for key, value in vars(module).items():
            if key in _TORCH_OWN:
                made.__dict__[key] = copy.copy(value)
            elif isinstance(value, PretrainedConfig):
                made.__dict__[key] = self._config(value)
            elif not _guards(value):
                bound = _bound_to(made, value, module)
                may_know_the_given = bound is value and _replaces_method(module, key, value)
                if may_know_the_given or self._replaces_forward(made, module, key, bound):
                    raise ValueError(
                        f"{name}: its {key} was replaced on the instance and cannot be carried "
                        "over; put a module of a class of its own in its place, or register a hook"
                    )
                made.__dict__[key] = bound
        made.__dict__["_modules"] = {
            key: None
            if child is None or child is self._decoder
            else self.of(child, f"{name}.{key}")
            for key, child in module._modules.items()
        }

    def _replaces_forward(self, made: nn.Module, module: nn.Module, key: str, bound: Any) -> bool:
        """Whether an attribute of the given decoder would run in place of the forward that inserts
        landmarks.
        """
        is_forward = (
            module is self._decoder
            and key in ("forward", "_old_forward")
            and isinstance(bound, MethodType)
        )
        return is_forward and bound.__func__ is not type(made).forward

    def _config(self, config: Any) -> Any:
        """Returns the other model's config for the given one's, and for another one a copy with the
        same attention.
        """
        if id(config) not in self._configs:
            self._configs[id(config)] = own = copy.copy(config)
            own._attn_implementation = self._attention
        return self._configs[id(config)]


def _bound_to(made: nn.Module, value: Any, module: nn.Module) -> Any:
    """Returns a method or partial function of ``module`` as one of ``made``, anything else as it
    is.
    """
    if isinstance(value, MethodType) and value.__self__ is module:
        own = getattr(type(module), value.__name__, None) is value.__func__
        return (
            getattr(made.__class__, value.__name__).__get__(made)
            if own
            else MethodType(value.__func__, made)
        )
    if isinstance(value, functools.partial) and value.args and value.args[0] is module:
        bound = functools.partial(value.func, made, *value.args[1:], **value.keywords)
        bound.__dict__.update(
            {key: _bound_to(made, each, module) for key, each in vars(value).items()}
        )
        return bound
    return value


def _replaces_method(module: nn.Module, key: str, value: Any) -> bool:
    """Whether what lies on the instance stands in place of a method of its class."""
    return callable(value) and callable(getattr(type(module), key, None))


def _guards(value: Any) -> bool:
    """Whether this is what accelerate puts in place of ``to`` and ``cuda`` of a model in several
    places, to warn.
    """
    return isinstance(value, FunctionType) and value.__globals__.get("__name__", "").startswith(
        "accelerate."
    )
