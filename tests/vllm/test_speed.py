"""`python -m benchmarks vllm` on small models; nothing looks at a time."""

from __future__ import annotations

from benchmarks import __main__ as command
from benchmarks import vllm_speed


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(vllm_speed, "VOCAB", 2048)
    monkeypatch.setattr(vllm_speed, "WIDTHS", {"base": (128, 2, 4), "tuned": (64, 1, 2), "ref": (64, 1, 2)})
    assert command.main("vllm --batch 2 --new 6 --rounds 1".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 2 |")]
    assert [row[1] for row in rows] == [name for name in vllm_speed.FILTERS for _ in vllm_speed.VARIANTS]
    for row, variant in zip(rows, [*vllm_speed.VARIANTS] * len(vllm_speed.FILTERS)):
        assert row[2] == variant.name and len(row) == len(vllm_speed.HEADER)
        assert all(float(row[i]) > 0 for i in (3, 4, 8)), row
        assert bool(row[6]) == variant.speculation
        assert (row[7] != "0%") == (variant.runner == "v2")
