"""Joins outputs of a decoder token by token: last states, states of all layers, router logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from landmark.hf.layout import without_autocast


def merge(outputs: list[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Makes one output of one or several.

    Args:
        outputs: outputs of the stock decoder, all with the same fields.
        join: makes one tensor of a list with one ``(B, T, features)`` of each output.

    Returns:
        an output of the same class with the joined fields alone. Router logits are
        ``(B * T, experts)`` in an output, as in stock code.
    """
    groups = [_per_token(output) for output in outputs]
    with without_autocast(outputs[0].last_hidden_state.device):
        joined = {}
        for name in groups[0]:
            by_layer = zip(*(group[name] for group in groups), strict=True)
            joined[name] = tuple(join(list(parts)) for parts in by_layer)
    fields: dict[str, Any] = dict.fromkeys(outputs[0].keys())
    fields["last_hidden_state"] = joined["last_hidden_state"][0]
    if "hidden_states" in joined:
        fields["hidden_states"] = joined["hidden_states"]
    if "router_logits" in joined:
        fields["router_logits"] = tuple(logits.flatten(0, 1) for logits in joined["router_logits"])
    return type(outputs[0])(**fields)


def _per_token(output: Any) -> dict[str, tuple[Tensor, ...]]:
    """Returns the tensors ``(B, T, features)`` of an output, by field."""
    batch, tokens = output.last_hidden_state.shape[:2]
    found: dict[str, tuple[Tensor, ...]] = {"last_hidden_state": (output.last_hidden_state,)}
    for name in ("hidden_states", "router_logits"):
        layers = getattr(output, name, None)
        if layers is not None:
            found[name] = tuple(each.reshape(batch, tokens, each.shape[-1]) for each in layers)
    return found
