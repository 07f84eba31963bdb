"""Which sources made a row, and rows that become results: saved and added only where they are some commit's."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import eft_kernels as eft
from eft_kernels.bench import rows as bench_rows
from eft_kernels.bench.run import write_rows
from eft_kernels.cli.term import Refused

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (":(glob)eft_kernels/**/*.py", "csrc", ":(glob)benchmarks/*.py", "setup.py")  # what makes a result


def of_a_row() -> dict:
    """The fields of a row that tell its sources."""
    files, commit = changed(), git("rev-parse", "HEAD")
    return dict(
        commit=commit.strip() if commit else os.environ.get("EFT_KERNELS_COMMIT"),
        dirty=None if files is None else bool(files),
        source=source(),
    )


def git(*args: str) -> str | None:
    """What git prints about this checkout; None where there is none (also inside somebody else's repository)."""

    def run(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    try:
        run("ls-files", "--error-unmatch", "setup.py")
        return run(*args)
    except (OSError, subprocess.CalledProcessError):
        return None


def is_source(path: str) -> bool:
    """Of a path relative to the checkout: whether it is one of `SOURCES`."""
    return (
        path == "setup.py"
        or path.startswith("csrc/")
        and not path.startswith("csrc/tests/")
        or path.endswith(".py")
        and (path.startswith("eft_kernels/") or path.rpartition("/")[0] == "benchmarks")
    )


def changed() -> list[str] | None:
    """Sources that differ from the commit, untracked ones too; None without git."""
    out = git("status", "--porcelain", "--untracked-files=all", "--no-renames", "--", *SOURCES)
    return None if out is None else [p for p in (line[3:] for line in out.splitlines()) if is_source(p)]


def _digest(blobs: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{blobs[p]} {p}\n" for p in sorted(blobs)).encode()).hexdigest()


def source() -> str | None:
    """sha256 over the sources (git's blob names and paths); None where they are not beside this file."""
    if not (ROOT / "setup.py").exists() or Path(eft.__file__).resolve().parents[1] != ROOT:
        return None
    blobs = {}
    for top in ("setup.py", "csrc/**/*.*", "eft_kernels/**/*.py", "benchmarks/*.py"):
        for path in ROOT.glob(top):
            if path.is_file() and is_source(name := path.relative_to(ROOT).as_posix()):
                data = path.read_bytes()
                blobs[name] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return _digest(blobs)


def source_of(commit: str) -> str | None:
    """`source` of a commit in this repository; None where it is unknown here."""
    tree = git("ls-tree", "-r", commit)
    if tree is None:
        return None
    entries = (line.split("\t") for line in tree.splitlines())
    return _digest({path: about.split()[2] for about, path in entries if is_source(path)})


def stale_extension() -> str | None:
    """A source of an extension that is newer than the extension built in this checkout."""
    for name in ("cpu", "cuda"):
        built = [p.stat().st_mtime for p in ROOT.glob(f"eft_kernels/_{name}*.so")]
        for source in (p for d in (name, "semantics", "bindings") for p in (ROOT / "csrc" / d).rglob("*")):
            of_another = source.name.endswith("_module.cpp") and source.name != f"{name}_module.cpp"
            if built and not of_another and source.stat().st_mtime > max(built):
                return source.relative_to(ROOT).as_posix()
    return None


def refuse_dirty() -> None:
    """Raises `Refused` where saved rows could not be told from those of the commit."""
    if files := changed():
        raise Refused(f"the sources differ from the commit: {', '.join(files)}; commit them, or measure without --json")
    if newer := stale_extension():
        raise Refused(f"{newer} is newer than the extension built from it; build it again (make build)")


def add(path, results=None) -> str:
    """Copies rows, each known to be what its commit measures, into results/<device>/; returns the path there."""
    try:
        rows = bench_rows.read(path)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from None
    slugs = {slug(row["device"]) for row in rows}
    if len(slugs) != 1:
        raise Refused(f"{path}: allowed is one device's rows, got {', '.join(sorted(slugs)) or 'none'}")
    known: dict = {}
    for number, row in enumerate(rows, 1):
        commit, source = row["commit"], row["source"]
        if row["dirty"] is False:
            continue
        if commit not in known:
            known[commit] = source_of(commit) if commit else None
        if source is None or source != known[commit]:
            why = (
                "no commit is named"
                if not commit
                else f"commit {commit} is unknown here"
                if known[commit] is None
                else f"its sources are not those of commit {commit}"
            )
            raise Refused(f"{path}:{number}: {why}")
    target = (results or ROOT / "benchmarks" / "results") / slugs.pop() / path.name
    if target.exists():
        raise Refused(f"{target} exists; give the file another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rows(rows, target)
    return str(target)


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
