"""A folder that Hugging Face's `kernels` package loads: ``kernels.get_local_kernel(Path(DIR))``, or uploaded, by name.

    python -m tools hub --out DIR

DIR/build.toml and, for each backend, DIR/build/torch-NAME with the package, its extensions that are built here, and
metadata.json. The extensions have no torch header and one binary serves every Python from 3.10 on, so one folder serves
every torch. A copy that is loaded so has operators of its own namespace, `torch.ops.<its module's name>`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from eft_kernels.cli.options import Parser
from eft_kernels.cli.term import Refused
from eft_kernels.version import __version__

from . import ROOT

NAME = "eft-kernels"
BACKENDS = ("cpu", "cuda")
BUILD = f"""\
[general]
name = "{NAME}"
version = 1
license = "Apache-2.0"
backends = [{", ".join(f'"{b}"' for b in BACKENDS)}]

[torch-noarch]
"""


def metadata(backend: str) -> dict:
    """What `kernels` reads beside the package."""
    return {
        "id": f"eft_kernels_{backend}_{__version__.replace('.', '_')}",
        "name": NAME,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def write(out: Path) -> list[Path]:
    """The folders written, one for each backend."""
    if out.exists() and any(out.iterdir()):
        raise Refused(f"--out {out}: is not empty")
    out.mkdir(parents=True, exist_ok=True)
    (out / "build.toml").write_text(BUILD)
    folders = []
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        shutil.copytree(ROOT / "eft_kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "metadata.json").write_text(json.dumps(metadata(backend), indent=2) + "\n")
        folders.append(folder)
    return folders


def main(argv: list[str]) -> int:
    p = Parser(prog="python -m tools hub", description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is empty or not there")
    for folder in write(p.parse_args(argv).out):
        print(folder)
    return 0
