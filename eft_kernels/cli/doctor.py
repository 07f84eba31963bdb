"""`eft-kernels doctor`: versions, backends and why another is not here, and whether sampling works."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import warnings
from typing import Any

from ..version import __version__
from .models import cores
from .term import BOLD, DIM, GREEN, YELLOW, paint

NEEDED_FOR = {
    "torch": "everything",
    "triton": "GPU kernels; comes with torch on GPU machines",
    "transformers": "eft.hf.generate and the commands: pip install 'eft-kernels[hf]'",
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def extension() -> tuple[bool, str]:
    """Is the C++ CPU extension built, and where; or what to do."""
    from .._backends import extension

    if extension.built("_cpu"):
        return True, extension.where("_cpu")
    return False, (
        "not built. With a C++17 compiler on the PATH (Debian: apt-get install g++) run "
        "`pip install --force-reinstall --no-deps .` in the checkout, or `make build`"
    )


def check() -> tuple[bool, str]:
    """A few rows through the default backend against the definition."""
    import torch

    from .. import row_seeds, sample, upscale

    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, 1003, generator=generator) * 3 for _ in range(3)]
    seeds = row_seeds(7, 3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = sample(logits, upscale(1.5), top_p=0.9, seed=seeds, position=0)
            want = sample(logits, upscale(1.5), top_p=0.9, seed=seeds, position=0, backend="reference")
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    if not torch.equal(got.tokens, want.tokens):
        return False, f"sampled {got.tokens.tolist()}, the definition says {want.tokens.tolist()}"
    return True, f"sampled {got.tokens.tolist()} of 1003 tokens, as the definition says"


def collect() -> dict[str, Any]:
    import torch

    from ..dispatch import backends

    built, where = extension()
    works, what = check()
    forced = os.environ.get("EFT_KERNELS_BACKEND")
    return dict(
        eft_kernels=__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        packages={name: version(name) for name in NEEDED_FOR},
        folder=os.path.dirname(os.path.dirname(__file__)),
        extension=dict(built=built, detail=where),
        threads=dict(torch=torch.get_num_threads(), cores=cores()),
        backends=backends(),
        forced_backend=forced,
        works=works,
        check=what,
    )


def run(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        print(json.dumps(found))
        return 0 if found["works"] else 1
    print(f"{paint('eft-kernels ' + found['eft_kernels'], BOLD)}  {found['folder']}")

    def row(name: str, value: str, note: str = "") -> None:
        print(f"  {name:<14}{value}{paint('  ' + note, DIM) if note else ''}")

    row("python", f"{found['python']} on {found['machine']}")
    for name, its_version in found["packages"].items():
        row(name, its_version or paint("not installed", YELLOW), "" if its_version else f"for {NEEDED_FOR[name]}")
    row(
        "extension",
        found["extension"]["detail"] if found["extension"]["built"] else paint(found["extension"]["detail"], YELLOW),
    )
    row("threads", f"{found['threads']['torch']} of {found['threads']['cores']} cores")
    forced = found["forced_backend"]
    print(paint("backends", BOLD) + (f"  EFT_KERNELS_BACKEND={forced}" if forced else ""))
    for name, b in found["backends"].items():
        state = paint("here", GREEN) if b["available"] else paint("not here", YELLOW)
        row(name, f"{state}: {b['reason']}", f"{b['summary']}; runs on {', '.join(b['devices'])}")
    verdict = paint("ok", GREEN) if found["works"] else paint("FAILED", YELLOW)
    print(f"{paint('check', BOLD)}  {verdict}: {found['check']}")
    return 0 if found["works"] else 1
