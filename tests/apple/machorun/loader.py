"""Import a macOS wheel in arm64 Linux Python: ``anellm._anellm`` comes out of the Mach-O file, by libmachorun.so."""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(library: Path, image: Path, function: str) -> ModuleType:
    """Return what ``function`` (PyInit_NAME) of the image returns; ImportError says why there is none."""
    open_image = ctypes.CDLL(str(library)).machorun_open
    open_image.restype = ctypes.c_void_p
    open_image.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    error = ctypes.create_string_buffer(512)
    address = open_image(bytes(image), function.encode(), error, len(error))
    if address is None:
        raise ImportError(f"{image}: {error.value.decode()}")
    return ctypes.PYFUNCTYPE(ctypes.py_object)(address)()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one extension module, in an unpacked wheel."""

    def __init__(self, library: Path, name: str, image: Path) -> None:
        self.library, self.name, self.image = library, name, image

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self, origin=str(self.image)) if name == self.name else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return load(self.library, self.image, f"PyInit_{spec.name.rpartition('.')[2]}")

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do: cffi's module is complete when it is made."""


def install(library: Path, wheel: Path) -> None:
    """Let ``import anellm`` find the wheel that is unpacked in the folder."""
    sys.meta_path.insert(0, Finder(library, "anellm._anellm", wheel / "anellm" / "_anellm.abi3.so"))
    sys.path.insert(0, str(wheel))
