"""Loading the compiled modules, and saying why one is not here."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = __package__.rpartition(".")[0]  # whatever this copy is called


def built(name: str) -> bool:
    """There is a file of the package's module ``name``, one that this Python would load or not."""
    full_name = f"{PACKAGE}.{name}"
    return sys.modules[full_name] is not None if full_name in sys.modules else bool(_files(name))


def _files(name: str) -> list[Path]:
    folders = importlib.import_module(PACKAGE).__path__
    return sorted(
        p for folder in folders for p in Path(folder).glob(f"{name}.*") if p.suffix in (".so", ".pyd", ".dylib")
    )


def where(name: str) -> str:
    """The file of the module ``name``, which is built."""
    module = sys.modules.get(f"{PACKAGE}.{name}")
    return str(getattr(module, "__file__", None) or _files(name)[0])


def load(name: str, what: str, why_not: str) -> ModuleType:
    """The package's module ``name``, attached to torch. ImportError: it was not built (``why_not``), or the loader's
    words."""
    full_name = f"{PACKAGE}.{name}"
    if not built(name):  # an editable install of another checkout may have one by this name
        raise ModuleNotFoundError(f"the {what} extension is not built: {why_not}", name=full_name)
    try:
        module = importlib.import_module(full_name)
    except ImportError as error:
        if importlib.util.find_spec(full_name) is not None:
            raise ImportError(f"the {what} extension is there, but cannot be loaded: {error}") from error
        if files := _files(name):
            raise ImportError(
                f"the {what} extension is there for another Python ({', '.join(p.name for p in files)}; "
                f"this one loads *{', *'.join(importlib.machinery.EXTENSION_SUFFIXES)}); reinstall"
            ) from error
        raise ModuleNotFoundError(f"the {what} extension is not built: {why_not}", name=full_name) from error
    import torch

    try:
        module.attach(torch.Tensor, torch.nn.Parameter)
    except (AttributeError, ValueError) as error:
        raise ImportError(f"torch {torch.__version__} does not offer DLPack's C exchange interface: {error}") from error
    return module
