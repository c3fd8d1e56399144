"""Has obstore work in a forked process."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

NATIVE = "obstore._obstore"


def import_anew() -> None:
    """Imports obstore from a copy of its library. The threads of the old one did not come along into this process, and it would
    wait for them forever (0.12). Takes 0.1 s and 15 MB."""
    for name in [name for name in sys.modules if name.split(".")[0] == "obstore" or name == "imagefeed.dataset.objects"]:
        del sys.modules[name]
    package = importlib.util.find_spec("obstore")
    found = importlib.machinery.PathFinder.find_spec(NATIVE, package.submodule_search_locations if package else None)
    assert found and found.origin
    with open(os.memfd_create("obstore"), "wb") as copy:
        copy.write(Path(found.origin).read_bytes())
        copy.flush()
        # By the process's id, as the system's loader knows libraries by their paths: a parent may have one of the same number.
        loader = importlib.machinery.ExtensionFileLoader(NATIVE, f"/proc/{os.getpid()}/fd/{copy.fileno()}")
        finder = _Finder(loader)
        sys.meta_path.insert(0, finder)
        try:
            importlib.import_module("obstore.store")
        finally:
            sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the library in the copy."""

    def __init__(self, loader: importlib.machinery.ExtensionFileLoader):
        self.loader = loader

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self.loader) if name == NATIVE else None
