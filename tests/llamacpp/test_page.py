"""The code of docs/llama.cpp.md runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from eft_kernels.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "llama.cpp.md"


def test_the_page_runs(files, tmp_path, monkeypatch, capsys):
    for name, model in (("base", "base"), ("tuned", "tuned-a"), ("ref", "ref")):
        (tmp_path / f"{name}.gguf").symlink_to(files(model))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for language, code in blocks:
        if language == "python":
            exec(code, names)  # noqa: S102
    assert len(capsys.readouterr().out.split()) > 60
    (command,) = [line for language, code in blocks for line in code.splitlines() if line.startswith("eft-kernels ")]
    assert main(shlex.split(command)[1:]) == 0
    assert len(capsys.readouterr().out) > 60
