"""Text of the model family: three public-domain sources, split by a rule that was fixed before any training.

    python examples/family/data.py    # writes data/{a,b,c}.{train,valid}.txt and heldout/{a,b,c}.txt beside this file

Needs Debian's apt-get and dpkg (packages are unpacked under --work, nothing is installed) and libreadline8, which
the bible reader links. Texts: a = King James Bible, b = Jane Austen's novels, c = the Jargon File and The Devil's
Dictionary.

Rule: a text is a list of units in published order (a, b: chapters; c: runs of 8 kB of whole paragraphs). Unit i is
held out for the results if i % 64 == 32, for validation (all choices of settings) if i % 64 == 0, else trained on.
"""

import argparse
import gzip
import re
import struct
import subprocess
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ["bible-kjv", "bible-kjv-text", "r-cran-janeaustenr", "jargon-text", "dict-devil"]
UNIT_END = "\n\f\n"  # between units in every file written here


def unpack(work: Path) -> Path:
    root = work / "packages"
    if not root.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=work, check=True)
        root.mkdir()
        for deb in sorted(work.glob("*.deb")):
            subprocess.run(["dpkg", "-x", deb, root], check=True)
    return root


def unwrap(text: str) -> list[str]:
    """Paragraphs on one line each; one whose lines are all indented by four or more is verse and keeps its lines."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [re.sub(r"\s+", " ", line).strip() for line in block.splitlines() if line.strip()]
        verse = len(lines) > 1 and all(line.startswith("    ") for line in block.splitlines() if line.strip())
        if lines:
            paragraphs.append(("\n" if verse else " ").join(lines))
    return paragraphs


def bible(root: Path) -> list[str]:
    text = subprocess.run(
        [root / "usr/bin/bible", "-f", "gen1:1-rev22:21"],
        cwd=root / "usr/lib",
        check=True,
        capture_output=True,
        text=True,
    ).stdout  # "Ge1:1 In the beginning ...", a verse a line
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        reference, _, verse = line.partition(" ")
        if verse:
            chapters.setdefault(reference.split(":")[0], []).append(verse)
    return ["\n".join(verses) for verses in chapters.values()]


def r_strings(data: bytes) -> list[str]:
    """The strings of one serialised R character vector (XDR, format 2 or 3)."""
    at = 14 if struct.unpack_from(">i", data, 2)[0] == 2 else 18 + struct.unpack_from(">i", data, 14)[0]
    (count,), at, strings = struct.unpack_from(">i", data, at + 4), at + 8, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", data, at + 4)
        strings.append(data[at + 8 : at + 8 + max(length, 0)].decode("utf-8"))
        at += 8 + max(length, 0)
    return strings


def austen(root: Path) -> list[str]:
    raw = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    chapters = []
    while raw:  # one block per novel: length, then a zlib stream
        stream = zlib.decompressobj()
        lines, raw = r_strings(stream.decompress(raw[4:])), stream.unused_data
        chapters += re.split(r"(?m)^(?=chapter [ivxl0-9]+\.?\s*$)", "\n".join(lines), flags=re.IGNORECASE)[1:]
    return ["\n".join(unwrap(chapter)) for chapter in chapters]


def jargon_and_devil(root: Path) -> list[str]:
    jargon = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode("utf-8")
    devil = gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("utf-8")
    jargon = "\n".join(
        line.removeprefix("   ") for line in jargon.splitlines() if not re.search("[\u2500-\u257f]", line)
    )
    units, unit = [], []
    for paragraph in unwrap(jargon) + unwrap(devil):
        unit.append(paragraph)
        if sum(map(len, unit)) > 8000:
            units.append("\n".join(unit))
            unit = []
    return units + ["\n".join(unit)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "data")
    work = parser.parse_args().work
    root = unpack(work).resolve()
    (HERE / "heldout").mkdir(exist_ok=True)
    for name, read in {"a": bible, "b": austen, "c": jargon_and_devil}.items():
        parts = {work / f"{name}.train.txt": [], work / f"{name}.valid.txt": [], HERE / "heldout" / f"{name}.txt": []}
        train, valid, heldout = parts.values()
        for i, unit in enumerate(read(root)):
            {0: valid, 32: heldout}.get(i % 64, train).append(unit)
        for path, units in parts.items():
            path.write_text(UNIT_END.join(units) + "\n", encoding="utf-8")
            print(f"{path.name}: {len(units)} units, {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
