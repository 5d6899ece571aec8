"""Builds a model of other classes around the modules of a given one, which shares its tensors.

Each module is copied flat: same class, same attributes, same parameters and buffers, same hooks. So
whatever was put into the given model (quantized or fused layers, adapters, hooks, other heads) is
in the other one too. Neither changes the mode, hooks, layers or attention of the other.
"""

from __future__ import annotations

import copy
import functools
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# Attributes of torch (parameters, buffers, hooks, ...): dictionaries that modules must not share.
_TORCH_OWN = frozenset(vars(nn.Module()))


def model_around(given: PreTrainedModel, causal_lm: Any, config: Any) -> Any:
    """Returns a model of class ``causal_lm`` and of ``config`` around the modules of ``given``.

    Raises:
        ValueError: something can be kept neither by the class nor by a copy: a function put on an
            instance that may know the instance, or a compiled module. The message names the module
            and the remedy.
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
    """Returns a copy of a config as one of another class.

    It also has the fields that are not saved, such as how experts are computed.
    """
    made = copy.deepcopy(config)
    made.__class__ = config_class
    # On the instance, these two would be those of the class before.
    for name in ("model_type", "transformers_version"):
        made.__dict__.pop(name, None)
    return made


class _Copies:
    """The copies made so far: a module that the given model has twice is copied once."""

    def __init__(self, given: PreTrainedModel, config: Any) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._configs = {id(given.config): config}
        self._attention = config._attn_implementation
        self._decoder = given.base_model

    def of(self, module: nn.Module, name: str) -> nn.Module:
        """Returns the copy of ``module``, which is called ``name`` in the given model."""
        if id(module) not in self._modules:
            made = object.__new__(type(module))
            self._modules[id(module)] = made
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
        """Returns whether an attribute of the decoder would replace its landmark ``forward``."""
        if module is not self._decoder or key not in ("forward", "_old_forward"):
            return False
        return isinstance(bound, MethodType) and bound.__func__ is not type(made).forward

    def _config(self, config: Any) -> Any:
        """Returns the config of the copy for a config of the given model.

        Configs of parts of the model are copied, with the attention of the new model.
        """
        if id(config) not in self._configs:
            own = copy.copy(config)
            own._attn_implementation = self._attention
            self._configs[id(config)] = own
        return self._configs[id(config)]


def _bound_to(made: nn.Module, value: Any, module: nn.Module) -> Any:
    """Returns a method or partial function of ``module`` bound to ``made``.

    Any other value is returned as it is.
    """
    if isinstance(value, MethodType) and value.__self__ is module:
        if getattr(type(module), value.__name__, None) is value.__func__:
            return getattr(made.__class__, value.__name__).__get__(made)
        return MethodType(value.__func__, made)
    if isinstance(value, functools.partial) and value.args and value.args[0] is module:
        bound = functools.partial(value.func, made, *value.args[1:], **value.keywords)
        bound.__dict__.update(
            {key: _bound_to(made, each, module) for key, each in vars(value).items()}
        )
        return bound
    return value


def _replaces_method(module: nn.Module, key: str, value: Any) -> bool:
    """Returns whether an attribute of an instance hides a method of its class."""
    return callable(value) and callable(getattr(type(module), key, None))


def _guards(value: Any) -> bool:
    """Returns whether accelerate put this function there.

    It replaces ``to`` and ``cuda`` of a model on several devices by functions that warn.
    """
    if not isinstance(value, FunctionType):
        return False
    module: str = value.__globals__.get("__name__", "")
    return module.startswith("accelerate.")
