"""A memory is for inference: train mode is refused, by whichever door it is entered."""

import pytest

import models
from landmark import LandmarkCache, LandmarkConfig


@pytest.mark.parametrize("mode", ["retrieval", "all"])
def test_train_mode_is_refused(mode):
    model = models.landmark_model("llama", LandmarkConfig(block_size=5, mode=mode)).train()
    ids = models.text(12)[None]
    try:
        with pytest.raises(ValueError, match=r"train mode.*model\.eval"):
            model.read(ids)
        with pytest.raises(ValueError, match=r"train mode.*model\.eval"):
            model(ids, past_key_values=LandmarkCache(model.config))
    finally:
        model.eval()
