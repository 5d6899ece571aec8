"""Loads this model with the package landmark-attention, which has its code; see LANDMARK.md."""

try:
    from landmark.hf.families import (
        LandmarkLlamaConfig,
        LandmarkLlamaForCausalLM,
        LandmarkLlamaModel,
    )
except ImportError as error:
    raise ImportError(
        f"this model needs landmark-attention, missing or too old here: pip install -U landmark-attention ({error})"
    ) from None
