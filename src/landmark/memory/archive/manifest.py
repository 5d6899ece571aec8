"""The manifest of a memory, checked: something else may have written a whole ``memory.json``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from landmark.memory.archive.log import REMEDY, STATE, Archive, Damaged

IDS = "text-ids"
KINDS = {
    "model": dict,
    "settings": dict,
    "dtype": str,
    "layers": list,
    "first": list,
    "tokens": int,
    "versions": dict,
    "notes": dict,
    "tail": dict,
}


def manifest_of(archive: Archive) -> dict[str, Any]:
    """Returns an archive's manifest.

    Raises:
        Damaged: it is not that of a memory; the message names what is odd.
    """
    manifest: dict[str, Any] = archive.manifest
    odd = next(_odd(manifest), None)
    if odd is None and not {IDS, manifest["tail"]["stream"]} <= archive.streams().keys():
        odd = "streams"
    if odd is not None:
        raise Damaged(
            f"{archive.folder / STATE}: expected the manifest of a memory, got another {odd!r}; "
            f"{REMEDY}"
        )
    return manifest


def damage_of(folder: str | Path) -> list[str]:
    """Returns a line where the folder's ``memory.json`` is not that of a memory; raises as
    ``Archive.open``.
    """
    try:
        manifest_of(Archive.open(folder, whole=False))
    except Damaged as error:
        return [str(error)]
    return []


def _odd(manifest: dict[str, Any]) -> Iterator[str]:
    """Yields the keys whose values are not of their kinds."""
    yield from (name for name, kind in KINDS.items() if not isinstance(manifest.get(name), kind))
    if not all(isinstance(manifest["model"].get(name), str) for name in ("type", "fingerprint")):
        yield "model"
    if not are_shapes(manifest["layers"]):
        yield "layers"
    if not _are_integers(manifest["first"], len(manifest["layers"])):
        yield "first"
    tail = manifest["tail"]
    if not isinstance(tail.get("stream"), str) or not isinstance(tail.get("tensors"), list):
        yield "tail"
    if not all(_is_tensor(each) for each in tail["tensors"]):
        yield "tail"


def are_shapes(layers: Any) -> bool:
    """Whether these are the shapes ``(G, L, D)`` of layers."""
    return isinstance(layers, list) and all(_are_integers(each, 3) for each in layers)


def _are_integers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(each) is int and each >= 0 for each in values)
    )


def _is_tensor(fields: Any) -> bool:
    named = isinstance(fields, dict) and all(
        isinstance(fields.get(name), str) for name in ("name", "dtype")
    )
    return (
        named
        and isinstance(fields.get("shape"), list)
        and _are_integers(fields["shape"], len(fields["shape"]))
    )


def sources_of(notes: dict[str, Any]) -> list[tuple[str, int]] | None:
    """Returns the names of the texts that a memory was made of and their characters; ``None`` where
    it names none.
    """
    sources = notes.get("sources")
    if not isinstance(sources, list) or not all(isinstance(each, dict) for each in sources):
        return None
    found = [(each.get("name"), each.get("characters")) for each in sources]
    whole = all(
        isinstance(name, str) and type(count) is int and count >= 0 for name, count in found
    )
    return found if whole else None
