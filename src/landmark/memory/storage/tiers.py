"""Where blocks may live, how many bytes of them, and how many bytes were moved."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class OffloadConfig:
    """The lowest tier that blocks may move down to, and the budgets of the tiers above.

    Attributes:
        tier: ``device`` keeps all blocks beside the computation, ``host`` in the memory of the CPU
            (pinned where there is CUDA), ``disk`` in files. Landmark keys stay on the device.
        device_bytes: of blocks beside the computation that were read lately, over all layers
            (``None``: 128 blocks for each row and key/value head; 512 at most). The blocks of the
            call in progress and the local ones come on top, as do, while a call needs them, more
            blocks than there is room for.
        host_bytes: of blocks in the memory of the CPU, over all layers; when they are full, the
            oldest move down. ``None``: no limit for tier ``host``, none at all for tier ``disk``.
        spill_folder: where the files of tier ``disk`` lie, ``None`` for the system's folder of
            temporary files. They have no name there, and are removed with the last cache that reads
            them, or by the system when the process ends. It is kept as an absolute path.

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
        for name, users in (
            ("device_bytes", TIERS[1:]),
            ("host_bytes", TIERS[1:]),
            ("spill_folder", TIERS[2:]),
        ):
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
        """Returns the same with the budgets of one of ``layers`` layers."""
        device, host = (
            None if each is None else each // layers
            for each in (self.device_bytes, self.host_bytes)
        )
        return _unchecked(self, device, host)


def _unchecked(
    tiers: OffloadConfig, device_bytes: int | None, host_bytes: int | None
) -> OffloadConfig:
    """A share may be 0 bytes; what needs one refuses it, naming how many it needs."""
    share = object.__new__(OffloadConfig)
    given = {**vars(tiers), "device_bytes": device_bytes, "host_bytes": host_bytes}
    for name, value in given.items():
        object.__setattr__(share, name, value)
    return share


@dataclass
class TransferStats:
    """What moved between tiers; blocks are those of one row and one key/value head.

    Attributes:
        hits: blocks that were asked for and found among those read lately. Local blocks and block 0
            are always near and count nowhere.
        misses: blocks that had to be fetched.
        fetched_host: bytes fetched from the memory of the CPU.
        fetched_disk: bytes fetched from files.
        written_host: bytes moved down into the memory of the CPU.
        written_disk: bytes moved down into files.
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
