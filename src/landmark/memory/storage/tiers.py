"""Offload configuration: where blocks may live and how many bytes of them, and what moved."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

TIERS = ("device", "host", "disk")
# The tiers that each budget is for.
USERS = {"device_bytes": TIERS[1:], "host_bytes": TIERS[1:], "spill_folder": TIERS[2:]}


@dataclass(frozen=True)
class OffloadConfig:
    """The lowest tier that blocks may be offloaded to, and the budgets of the tiers above it.

    Attributes:
        tier: ``device`` keeps all blocks on the device, ``host`` offloads them to host memory
            (pinned where there is CUDA), ``disk`` to files. Landmark keys stay on the device.
        device_bytes: of the LRU cache of blocks on the device, over all layers. ``None``: 128
            blocks for each row and key/value head; 512 at most. The window of the call and its
            local blocks comes on top, and so does scratch memory of a call that reads more blocks
            than the cache holds.
        host_bytes: of blocks in host memory, over all layers. When they are full, the oldest move
            to disk. ``None``: no limit for tier ``host``, no host memory for tier ``disk``.
        spill_folder: where the files of tier ``disk`` lie, ``None`` for the system's folder of
            temporary files. The files have no name, and are gone with the last cache that reads
            them or with the process. It is kept as an absolute path.

    Raises:
        ValueError: an unknown tier, a budget below 1, or a budget or folder that the tier has no
            use for.
        FileNotFoundError: there is no such folder.
    """

    tier: str = "device"
    device_bytes: int | None = None
    host_bytes: int | None = None
    spill_folder: str | Path | None = None

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ValueError(f"tier: expected one of {', '.join(TIERS)}, got {self.tier!r}")
        for name in ("device_bytes", "host_bytes"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"{name}: expected a number of bytes of at least 1, got {value!r}")
        for name, users in USERS.items():
            given = getattr(self, name)
            if given is not None and self.tier not in users:
                raise ValueError(
                    f"{name}: expected none for tier {self.tier!r}, got {str(given)!r}; leave it "
                    "out"
                )
        if self.spill_folder is None:
            return
        if not Path(self.spill_folder).is_dir():
            given = str(self.spill_folder)
            raise FileNotFoundError(
                f"spill_folder: expected a folder that exists, got {given!r}; make it first"
            )
        object.__setattr__(self, "spill_folder", Path(self.spill_folder).absolute())

    def share(self, layers: int) -> OffloadConfig:
        """Returns the same with the budgets of one of ``layers`` layers.

        A share may be 0 bytes: the pool that needs more says how many.
        """
        share = object.__new__(OffloadConfig)  # not checked: 0 bytes would be refused
        budgets = {name: getattr(self, name) for name in ("device_bytes", "host_bytes")}
        shares = {name: each if each is None else each // layers for name, each in budgets.items()}
        for name, value in {**vars(self), **shares}.items():
            object.__setattr__(share, name, value)
        return share


@dataclass
class TransferStats:
    """What moved between tiers. Blocks are counted for each row and key/value head.

    Attributes:
        hits: older blocks that were read and found in the LRU cache. Block 0 and blocks of the
            window count nowhere.
        misses: blocks that had to be fetched.
        fetched_host: bytes fetched from host memory.
        fetched_disk: bytes fetched from files.
        written_host: bytes offloaded to host memory.
        written_disk: bytes offloaded to files.
    """

    hits: int = 0
    misses: int = 0
    fetched_host: int = 0
    fetched_disk: int = 0
    written_host: int = 0
    written_disk: int = 0

    def __add__(self, other: TransferStats) -> TransferStats:
        """Returns the sums."""
        return TransferStats(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )

    def count(self, name: str, amount: int) -> None:
        """Adds to one of the numbers."""
        setattr(self, name, getattr(self, name) + amount)
