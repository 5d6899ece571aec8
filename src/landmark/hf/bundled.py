"""The folder of the bundled model inside the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from landmark.hf.damage import ADAPTER, CONFIG

MODEL_FILES = (CONFIG, ADAPTER)
NAMES = ("landmark", "smollm2")


def model_path(name: str = "landmark") -> Path:
    """Returns the folder of a bundled model, with its tokenizer.

    Args:
        name: ``landmark``, or ``smollm2``, an adapter of SmolLM2-135M-Instruct, whose weights
            another package has.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: this installation carries no such model.
    """
    if name not in NAMES:
        raise ValueError(f"bundled model: expected one of {', '.join(NAMES)}, got {name!r}")
    folder = Path(str(resources.files("landmark"))) / "bundled" / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"expected the bundled model {name!r}, got an installation without it; install it "
            "again, or name another model"
        )
    return folder


def model_folder(name: str) -> str:
    """Returns the folder of a bundled model for one of ``NAMES``, other names as they are.

    A model in a folder of that name in the working folder comes first; another folder or file of
    that name does not count. What follows an ``@`` names another base (``landmark.hf.base``) and
    stays as it is.
    """
    bundled, at, base = name.partition("@")
    is_local = any((Path(name) / file).is_file() for file in MODEL_FILES)
    if bundled in NAMES and not is_local:
        return f"{model_path(bundled)}{at}{base}"
    return name
