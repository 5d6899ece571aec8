"""Files saved beside config.json: a stub for tools that load models by name, and a note."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Stock = Any  # the stock class that follows the mixin
else:
    Stock = object

STUB = "landmark_stub"
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
# transformers reads imports outside of try as packages to install, and the package index has
# another package called landmark.
CODE = '''"""Loads this model with the package landmark-attention; see LANDMARK.md."""

try:
    from landmark.hf.families import (
        {names},
    )
except ImportError as error:
    raise ImportError(
        "this model needs landmark-attention, missing or too old here: pip install -U "
        f"landmark-attention ({{error}})"
    ) from None
'''
NOTE = """# A landmark model

This model attends by landmarks. To load it:

    pip install landmark-attention

    import landmark
    model = landmark.load("{folder}")

or `import landmark.hf` before `AutoModelForCausalLM.from_pretrained(...)`. Tools that load a model
by its name take `trust_remote_code=True`: `{stub}.py` imports the package, where all of the
code is.
"""


class PackagedMixin(Stock):  # type: ignore[misc]
    """Keeps transformers from copying the code of this package into folders that it saves."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: the classes come from this package, not from code in the saved folder."""


class LandmarkConfigMixin(PackagedMixin):
    """A config that is saved together with the stub that loads the model.

    Attributes:
        auto_map: a name in the stub for each of ``AUTO_CLASSES``. transformers finds the classes of
            a saved folder by it in a process that has not imported this package.
    """

    auto_map: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields of the stock config and ``auto_map``."""
        return {**super().to_dict(), "auto_map": dict(type(self).auto_map)}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves config.json, the stub that it names, and a note that says what to install."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        names = ",\n        ".join(
            name.removeprefix(f"{STUB}.") for name in sorted(type(self).auto_map.values())
        )
        (folder / f"{STUB}.py").write_text(CODE.format(names=names), encoding="utf-8")
        (folder / "LANDMARK.md").write_text(
            NOTE.format(folder=folder.name, stub=STUB), encoding="utf-8", errors="replace"
        )


def auto_map(*classes: str) -> dict[str, str]:
    """Returns the ``auto_map`` of a config for the names of its ``AUTO_CLASSES``."""
    return {auto: f"{STUB}.{name}" for auto, name in zip(AUTO_CLASSES, classes, strict=True)}
