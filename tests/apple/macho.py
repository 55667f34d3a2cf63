"""Read what a thin 64-bit Mach-O library imports: format as in Apple's <mach-o/loader.h> and <mach-o/nlist.h>."""

from __future__ import annotations

import struct
import sys
import zipfile
from pathlib import Path, PurePosixPath

MAGIC, CPU_ARM64, DYLIB, BUNDLE = 0xFEEDFACF, 0x0100000C, 6, 8
LC_SYMTAB, LC_BUILD_VERSION = 0x2, 0x32
# Loads of libraries, in the order that symbols number them: plain, weak, re-exported, upward, lazy.
LC_LOADS = {0xC, 0x80000018, 0x8000001F, 0x80000023, 0x20}
N_STAB, N_TYPE, N_UNDF = 0xE0, 0x0E, 0x00
PROCESS = {0, 254}  # no library: looked up among all images of the process, as what the interpreter exports must be


class MachO:
    """A library: ``cpu``, ``kind``, ``libraries``, ``minimum`` macOS, ``imports`` {symbol: library}, ``exports``."""

    def __init__(self, data: bytes) -> None:
        magic, self.cpu, _, self.kind, n_commands, _, _, _ = struct.unpack_from("<8I", data)
        if magic != MAGIC:
            raise ValueError(f"not a thin 64-bit Mach-O file: magic {magic:#x}")
        self.libraries: list[str] = []
        self.imports: dict[str, str] = {}
        self.exports: set[str] = set()
        self.minimum = ""
        symbols = (0, 0, 0, 0)
        at = 32
        for _ in range(n_commands):
            command, size = struct.unpack_from("<2I", data, at)
            if command in LC_LOADS:
                (name,) = struct.unpack_from("<I", data, at + 8)
                self.libraries.append(data[at + name : at + size].split(b"\0")[0].decode())
            elif command == LC_SYMTAB:
                symbols = struct.unpack_from("<4I", data, at + 8)
            elif command == LC_BUILD_VERSION:
                _, version = struct.unpack_from("<2I", data, at + 8)
                self.minimum = f"{version >> 16}.{version >> 8 & 255}"
            at += size
        self._read_symbols(data, *symbols)

    def _read_symbols(self, data: bytes, offset: int, n: int, strings: int, size: int) -> None:
        names = data[strings : strings + size]
        for i in range(n):
            name, kind, _, description, _ = struct.unpack_from("<IBBHQ", data, offset + 16 * i)
            if kind & N_STAB or not kind & 1:  # of a debugger, or local
                continue
            symbol = names[name:].split(b"\0", 1)[0].decode()
            if kind & N_TYPE != N_UNDF:
                self.exports.add(symbol)
                continue
            ordinal = description >> 8
            self.imports[symbol] = "process" if ordinal in PROCESS else PurePosixPath(self.libraries[ordinal - 1]).name

    def listing(self) -> list[str]:
        """Return a line "library symbol" for each import, sorted."""
        return sorted(f"{library} {symbol}" for symbol, library in self.imports.items())


def extension(wheel: Path) -> MachO:
    """Return the extension module in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        return MachO(archive.read(name))


if __name__ == "__main__":  # python tests/apple/macho.py WHEEL: the lines of imports.txt
    print("\n".join(extension(Path(sys.argv[1])).listing()))
