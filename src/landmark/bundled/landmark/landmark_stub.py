"""Loads this model with the package landmark-attention; see LANDMARK.md."""

try:
    from landmark.hf.families import (
        LandmarkLlamaConfig,
        LandmarkLlamaForCausalLM,
        LandmarkLlamaModel,
    )
except ImportError as error:
    raise ImportError(
        "this model needs landmark-attention, missing or too old here: pip install -U "
        f"landmark-attention ({error})"
    ) from None
