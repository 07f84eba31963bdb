from __future__ import annotations

import json

from . import device


class Refused(Exception):
    """What cannot be measured, saved or added; the message says why."""


def refuse_dirty() -> None:
    """Raises `Refused` where saved rows could not be told from those of the commit."""
    if files := device.changed():
        raise Refused(f"the sources differ from the commit: {', '.join(files)}; commit them, or measure without --json")
    if newer := device.stale_extension():
        raise Refused(f"{newer} is newer than the extension built from it; build it again (make build)")


def write_rows(rows: list[dict], path) -> None:
    """One JSON object a line."""
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
