"""`torchvision` and `sgl_kernel`, which SGLang imports everywhere and whose wheels need CUDA, as empty modules.

Every name in them is a class that does nothing. On a CPU a language model's forward pass calls none of them: SGLang has
PyTorch code for each. transformers is asked first whether torchvision is here, so that it takes no stub for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types

NAMES = ("torchvision", "sgl_kernel")


class AnyName(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Nothing(metaclass=AnyName):
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self


class Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


def install() -> None:
    from transformers.models.auto import image_processing_auto  # noqa: F401
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()
    sys.meta_path.insert(0, Finder())
