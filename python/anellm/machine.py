"""What this machine has left to give."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _field(path: Path, name: str) -> int | None:
    """Return the number behind a name in a file of ``name value`` lines."""
    try:
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            words = line.replace(":", " ").split()
            if len(words) > 1 and words[0] == name:
                return int(words[1])
    except (OSError, ValueError):
        pass
    return None


def _cgroup_folders(own: Path = Path("/proc/self/cgroup"), root: Path = _CGROUP) -> list[tuple[Path, str, str]]:
    """Return the control groups that limit this process's memory: folder, limit file, usage file."""
    try:
        lines = own.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, files = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / name.lstrip("/")
        # A limit may stand in any group above. Inside a container the name may not exist: then its root counts.
        found += [(p, *files) for p in (folder, *folder.parents) if p == base or base in p.parents]
    return found


def available_bytes() -> int | None:
    """Return the memory that this process may still take without swapping; None where the system does not tell.

    The least of the system's estimate (MemAvailable) and what is left in each control group, whose file cache counts
    as free.
    """
    room = []
    kib = _field(Path("/proc/meminfo"), "MemAvailable")
    if kib is not None:
        room.append(kib * 1024)
    for folder, limit_name, usage_name in _cgroup_folders():
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None and limit < _UNLIMITED:
            cache = _field(folder / "memory.stat", "inactive_file") or 0
            room.append(max(0, limit - max(0, usage - cache)))
    if not room:
        try:  # macOS tells only what is built in
            room.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError):
            return None
    return min(room)


def human_bytes(n: float) -> str:
    """Return a size as people read it, e.g. ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def human_count(n: float) -> str:
    """Return a count as people read it, e.g. ``15.2 M``."""
    for unit in ("", " k", " M", " G", " T"):
        if n < 1000:
            return f"{n:.0f}{unit}" if unit == "" else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f} P"
