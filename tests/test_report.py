"""Reports of hand-written rows (tables, goals, plots), and the comparison of two runs."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare as command
from benchmarks import report
from eft_kernels.bench import compare
from eft_kernels.bench import rows as bench_rows

ROOT = Path(__file__).resolve().parents[1]

# microseconds of a call: fixed, and for a million logits; top_p sorts
COST = {
    "cpu": {"eft": (30, 400), "combine_max": (20, 300), "eager": (900, 34000), "lean": (300, 5000)},
    "cuda": {
        "eft": (4.1, 1.5),
        "combine_max": (3.4, 1.5),
        "eager": (118, 31),
        "compiled": (21, 6),
        "lean": (64, 22),
        "flashinfer": (19, 4.6),
        "vllm": (33, 8),
    },
}
SORT = {"eft": 1.9, "combine_max": 1, "eager": 3, "lean": 16, "compiled": 12, "flashinfer": 1.6, "vllm": 3.5}


def row(
    implementation="eft",
    op="sample",
    variant="plain",
    kind="cpu",
    batch=1,
    vocab=128256,
    us=None,
    slower=1.0,
    spread=0.06,
    **more,
):
    """A row as `run` writes it, with times from a simple model."""
    sort = SORT[implementation] if variant == "top_p" and implementation in SORT else 1
    fixed, each = COST[kind].get(implementation, (10, 10))
    us = slower * (us or fixed + each * sort * batch * vocab / 1e6)
    cpu = kind == "cpu"
    moved, bandwidth = batch * vocab * 6 + 8 * batch, 11.8 if cpu else 4300.0
    floor = moved / bandwidth / 1e3
    return dict(
        dict(
            schema=1,
            status="measured",
            why=None,
            op=op,
            variant=variant,
            implementation=implementation,
            backend=("cpu" if cpu else "triton") if implementation in ("eft", "combine_max") else None,
            batch=batch,
            vocab=vocab,
            models=3,
            draft_tokens=None,
            dtype="bfloat16",
            logits="peaked",
            launch="eager" if cpu else "graph",
            threads=1 if cpu else None,
            median_us=us,
            p20_us=us * (1 - spread / 2),
            p80_us=us * (1 + spread),
            repetitions=15,
            bytes=moved,
            bandwidth_gbs=bandwidth,
            copy_gbs=bandwidth,
            floor_us=floor,
            fraction=floor / us,
            issue_slots=12,
            issue_us=None,
            launches=1,
            peak_memory=batch * 64,
            tokens_per_s=None,
            acceptance=None,
            new_tokens=None,
            device="AMD EPYC" if cpu else "NVIDIA H200",
            device_kind=kind,
            driver=None if cpu else "580.95",
            isa="avx2" if cpu else None,
            cores=2,
            os="Linux 6.8",
            python="3.11.7",
            torch="2.13.0",
            triton=None if cpu else "3.6.0",
            transformers="5.3.0",
            eft_kernels="0.1.0",
            commit="0123456789ab",
            dirty=False,
            source="f" * 64,
            command=f"python -m benchmarks run --suite {kind}",
            date="2026-01-02T03:04:05",
            run="r1",
        ),
        **more,
    )


def missing(status, why, **more):
    return dict(row(**more), status=status, why=why, median_us=None, p20_us=None, p80_us=None, fraction=None)


def suite(kind="cpu"):
    """The rows of a whole run."""
    names = list(COST[kind])
    batches = (1, 8, 64) if kind == "cpu" else (1, 8, 64, 256, 512)
    hows = [dict(threads=n) for n in (1, 2)] if kind == "cpu" else [dict(launch=h) for h in ("graph", "eager")]
    rows = [
        row(n, variant=v, kind=kind, batch=b, slower=how.get("threads", 1) ** -0.7 if b > 1 else 1, **how)
        for n, v, b, how in itertools.product(names, ("plain", "top_p"), batches, hows)
    ]
    rows += [
        row(n, kind=kind, batch=b, vocab=v)
        for n in ("eft", "eager", "lean")
        for b in batches
        for v in (32000, 151936, 256000)
    ]
    rows += [row(n, variant="min_p", kind=kind, batch=b) for n in ("eft", "eager") for b in (1, 8)]
    rows += [
        row(n, "verify", m, kind, 8, draft_tokens=k, us=90 * k)
        for n in ("eft", "eager")
        for m in ("coupled", "token", "block")
        for k in (1, 4, 8)
    ]
    rows += [row("eft", op, kind=kind, batch=8) for op in ("logprobs", "token_logprobs")]
    text = dict(
        op="generate",
        kind=kind,
        vocab=4096,
        batch=4,
        launch="eager",
        bytes=None,
        floor_us=None,
        fraction=None,
        launches=None,
        peak_memory=None,
        logits="family",
        new_tokens=64,
    )
    rows.append(row(variant="plain", us=2e6, tokens_per_s=128.0, **text))
    for m, (share, gain) in {"coupled": (0.62, 1.25), "token": (0.80, 1.6), "block": (0.83, 1.7)}.items():
        for k in (1, 2, 4, 8):
            faster = 1 + (gain - 1) * (k / 4) ** 0.5 * (1 if k < 8 else 0.6)
            rows.append(
                row(
                    variant=m,
                    us=2e6 / faster,
                    draft_tokens=k,
                    acceptance=share ** (k**0.4),
                    tokens_per_s=128 * faster,
                    **text,
                )
            )
    rows += [row("assisted", variant="token", us=5e6, draft_tokens=k, tokens_per_s=51.2, **text) for k in (1, 2, 4, 8)]
    rows.append(row("stateless", variant="plain", us=4e6, tokens_per_s=64.0, **text))
    rows.append(missing("absent", "no module named sglang", implementation="sglang", kind=kind))
    rows.append(missing("disagrees", "p = 1e-9 | draws token 7", implementation="vllm", variant="min_p", kind=kind))
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The pages of a CPU and a GPU folder, written twice."""
    pytest.importorskip("matplotlib")
    pages = {}
    for kind, turn in itertools.product(COST, range(2)):
        folder = tmp_path_factory.mktemp(kind)
        write(folder / "rows.jsonl", suite(kind))
        (folder / "stale.png").write_bytes(b"of rows that are gone")
        assert report.main([str(folder)]) == 0
        pages[kind, turn] = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".jsonl"}
    return pages


def section(page, title):
    """The cells of the table under a heading, as dicts."""
    text = page.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [
        [c.strip() for c in line.strip("|").replace("\\|", "\0").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


@pytest.mark.parametrize("kind", COST)
def test_report_is_the_same_bytes_every_time(rendered, kind):
    assert rendered[kind, 0] == rendered[kind, 1]
    pictures = {n for n in rendered[kind, 0] if n != "README.md"}
    page = rendered[kind, 0]["README.md"].decode()
    assert pictures == set(re.findall(r"!\[.+\]\((.+)\)", page)), "every picture is shown, and none is stale"
    how = ("threads-1", "threads-2") if kind == "cpu" else ("graph", "eager")
    assert pictures >= {f"time-sample-{v}-{h}.png" for v in ("plain", "top-p") for h in how}
    assert {n.split("-")[0] for n in pictures} == {"time", "heat", "speculation"}
    for name in pictures:
        data = rendered[kind, 0][name]
        assert data.startswith(b"\x89PNG") and b"tEXt" not in data and b"tIME" not in data
        assert 1000 < int.from_bytes(data[16:20], "big") < 1600, "the width of a README"


def test_tables_hold_the_rows(rendered):
    page = rendered["cpu", 0]["README.md"].decode()
    cells = {(c["threads"], c["V"], c["B"]): c for c in section(page, "sample, plain")}
    own, eager = row(), row("eager")
    at = cells["1", "128256", "1"]
    assert at["**ours**"] == bench_rows.us(own["median_us"]) == "81.3 µs" and at["p20..p80"] == "78.9 µs..86.2 µs"
    assert at["eager PyTorch"] == f"{bench_rows.us(eager['median_us'])} (65x)" and at["/ combine + max"] == "1.39"
    assert at["floor"] == "65.2 µs" and at["of floor"] == "80%"
    assert at["launches"] == "1" and at["peak memory"] == "64 B"
    assert {b for _, _, b in cells} == {"1", "8", "64"} and {v for _, v, _ in cells} >= {"32000", "256000"}
    assert "/ combine + max" not in section(page, "logprobs, plain")[0], "a column without a value"
    assert [c["K"] for c in section(page, "verify, token")] == ["1", "4", "8"]
    block = next(c for c in section(page, "generate") if (c["method"], c["K"]) == ("block", "4"))
    assert block["over plain"] == "1.70x" and block["accepted"] == "72%"
    others = {(c["implementation"], c["over plain"]) for c in section(page, "generate")}
    assert others >= {("eft-kernels", "-"), ("HF assisted", "0.40x"), ("HF processor", "0.50x")}
    assert "- SGLang, absent (sample plain): no module named sglang" in page
    assert "- vLLM, disagrees (sample min_p): p = 1e-9 | draws token 7" in page
    assert "commit 0123456789ab, run r1: AMD EPYC, 2 cores, avx2" in page
    assert "vLLM" not in page.split("## Not timed")[0]


@pytest.mark.parametrize("kind", COST)
def test_goals_are_computed_from_the_rows(rendered, kind):
    goals = section(rendered[kind, 0]["README.md"].decode(), "Goals")
    got = {(g["goal"], g["measured"], g["verdict"]) for g in goals}
    if kind == "cpu":
        assert ("plain: faster than eager PyTorch (B = 1, threads 1)", "65x", "missed") in got
        assert ("plain: faster than the leanest PyTorch (B = 1, threads 1)", "12x", "met") in got
        assert ("top_p: time over combine + max alone (B = 1, threads 1)", "2.2x", "missed") in got
    else:
        assert ("plain: faster than the best other sampler (launch graph, B = 256)", "3.2x", "met") in got
        assert ("plain: share of the copy bandwidth (launch graph, B = 256)", "86%", "missed") in got
        assert ("plain: time of a call (launch graph, B = 1)", "4.29 µs", "met") in got
    assert all(g["verdict"] in ("met", "missed") for g in goals)
    alone = [row(kind=kind, batch=b) for b in (1, 8)]
    assert ["no rows", "-"] in [g[2:] for g in report.goals(bench_rows.newest(alone), kind)]


def test_goals_take_the_worst_shape():
    rows = [
        row(n, kind="cuda", batch=b, us=us)
        for b, us in ((1, 1), (64, 10))
        for n in ("eft", "eager")
        for us in [us * (1 if n == "eft" else 20 if b == 1 else 14)]
    ]
    got = {g[0]: g[2:] for g in report.goals(bench_rows.newest(rows), "cuda")}
    assert got["plain: faster than eager PyTorch, every B (launch graph)"] == ["14x", "missed"]


def test_newest_run_counts_and_runs_are_not_mixed(tmp_path):
    old = [row(us=100), row("eager", us=1000), row("lean", us=500)]
    new = [row(us=80, run="r2", date="2026-02-01"), row("eager", us=1600, run="r2", date="2026-02-01")]
    later = [row("lean", us=7, run="r3", date="2026-03-01")]  # nothing of ours in it
    (group,) = bench_rows.newest([*new, *later, *old]).values()
    assert {n: r["median_us"] for n, r in group.items()} == {"eft": 80, "eager": 1600}


def test_a_line_that_is_no_row_is_named(tmp_path, capsys):
    short = {name: value for name, value in row().items() if name != "op"}
    for line in ("{", json.dumps(short), json.dumps(row(schema=2))):
        path = write(tmp_path / "rows.jsonl", [row()])
        path.write_text(path.read_text() + line + "\n")
        assert report.main([str(tmp_path)]) == 2 and "rows.jsonl:2: not a row" in capsys.readouterr().err
    assert report.main([str(tmp_path / "nowhere")]) == 2 and "nowhere: not a folder" in capsys.readouterr().err


def test_report_does_not_need_matplotlib(tmp_path):
    """One line says that there are no plots, and the Markdown is there."""
    write(tmp_path / "rows.jsonl", suite())
    code = (
        "import sys; sys.modules['matplotlib'] = None; from benchmarks import compare, report; f = sys.argv[1]; "
        "sys.exit(report.main([f]) or compare.main([f, f, '--check']))"
    )
    p = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0 and p.stderr == "", p.stderr
    assert "no plots: " in p.stdout.splitlines()[0] and "eft-kernels[bench]" in p.stdout.splitlines()[0]
    page = (tmp_path / "README.md").read_text()
    assert "## Goals" in page and "![" not in page


def verdicts(before, after):
    return {(x.shape.variant, x.implementation): (x.verdict, x.baseline) for x in compare.compare(before, after)}


def test_compare_within_and_beyond_the_noise():
    for slower, verdict in ((1.05, "same"), (0.95, "same"), (1.15, "slower"), (0.85, "faster")):
        assert verdicts([row()], [row(slower=slower)]) == {("plain", "eft"): (verdict, None)}
        assert verdicts([row("lean")], [row("lean", slower=slower)])["plain", "lean"][0] == verdict
    assert verdicts([row()], [row(slower=1.15, spread=0.4)])["plain", "eft"][0] == "same", "B's noise counts"
    assert verdicts([row(spread=0.4)], [row(slower=1.15)])["plain", "eft"][0] == "same", "A's noise counts"
    assert verdicts([row(repetitions=2)], [row(slower=9)])["plain", "eft"][0] == "unclear"


def test_a_slower_machine_is_no_regression():
    """Our time counts relative to the least noisy common baseline, whose own noise widens the interval."""
    before = [row(), row("eager", spread=0.3), row("lean", spread=0.01)]
    after = [row(slower=1.4), row("eager", spread=0.3, slower=1.4), row("lean", spread=0.01, slower=1.4)]
    got = verdicts(before, after)
    assert got["plain", "eft"] == ("same", "lean") and got["plain", "lean"] == ("slower", None)
    after = [row(slower=1.4), row("eager", spread=0.3), row("lean", spread=0.01)]
    assert verdicts(before, after)["plain", "eft"] == ("slower", "lean")
    assert verdicts(before[:2], after[:2])["plain", "eft"] == ("same", "eager")
    assert verdicts([row()] + after[2:], [row(), row("lean", spread=0.01, slower=0.5)])["plain", "eft"][0] == "same", (
        "a baseline that was disturbed in the first run"
    )
    once = [row("lean", repetitions=1)]
    assert verdicts([row(), *once], [row(slower=1.4), *once])["plain", "eft"] == ("slower", None)
    alone = [row("combine_max")]
    assert verdicts([row(), *alone], [row(slower=1.4), *alone])["plain", "eft"] == ("slower", None), "no yardstick"


OTHER = dict(
    op="verify",
    variant="top_p",
    device="other",
    launch="graph",
    threads=2,
    models=4,
    dtype="float32",
    logits="flat",
    draft_tokens=4,
    vocab=32000,
    batch=8,
)


@pytest.mark.parametrize("field", OTHER)
def test_compare_matches_only_the_same_measurement(field, tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", [row()]), write(tmp_path / "b.jsonl", [row(**{field: OTHER[field]})])
    assert command.main([str(a), str(b)]) == 2 and "no measurement in common" in capsys.readouterr().err
    both = [row(), row(**{field: OTHER[field]})]
    lines = compare.compare(both, both)
    assert len({tuple(c[:2]) for c in compare.cells(lines)[1]}) == 2, "the table tells them apart"


def test_compare_exit_codes(tmp_path, capsys):
    a, slow = (
        write(tmp_path / "a.jsonl", suite()),
        write(
            tmp_path / "b.jsonl",
            [
                r | dict(p20_us=2 * r["p20_us"], p80_us=2 * r["p80_us"], median_us=2 * r["median_us"])
                if (r["implementation"], r["variant"], r["status"]) == ("eft", "top_p", "measured")
                else r
                for r in suite()
            ],
        ),
    )
    assert command.main([str(a), str(a), "--check"]) == 0
    out = capsys.readouterr().out
    assert "slower" not in out and out.splitlines()[-1].endswith(" same")
    assert command.main([str(a), str(slow)]) == 0 and command.main([str(a), str(slow), "--check"]) == 1
    assert command.main([str(slow), str(a), "--check"]) == 0, "faster is no regression"
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("sample") and x.endswith("slower")]
    assert lines and all("top_p" in x and "eft-kernels" in x and " 2.00 " in x for x in lines)
    worse = [
        r | dict(median_us=9 * r["median_us"], p20_us=9 * r["p20_us"], p80_us=9 * r["p80_us"])
        for r in (row("lean"), row("eager"))
    ]
    b = write(tmp_path / "c.jsonl", worse)
    assert command.main([str(a), str(b), "--check"]) == 0, "a baseline that is slower is no regression of ours"
    assert command.main([str(a), str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
