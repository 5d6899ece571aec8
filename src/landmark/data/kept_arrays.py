"""Arrays that take long to make, kept in a file from one run to the next."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from landmark.data import outputs

KEY = "key"
Arrays = dict[str, npt.NDArray[Any]]


def kept_arrays(path: Path, key: str, make: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays of a file; makes and writes them if it has none for this key.

    A damaged file is replaced.

    Args:
        path: the ``.npz`` file.
        key: a hash of all that the arrays follow from.
        make: makes them; none is called ``key``.
    """
    found = _read(path)
    if str(found.pop(KEY, "")) == key:
        return found
    made = make()
    file = io.BytesIO()
    save: Callable[..., None] = np.savez
    save(file, **made, **{KEY: np.array(key)})
    outputs.write(path, file.getvalue())
    return made


def _read(path: Path) -> Arrays:
    """Returns the arrays of a file, none where there is no file or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile):
        return {}
