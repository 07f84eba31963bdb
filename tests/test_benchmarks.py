"""The benchmarks measure what they say: gates that can fail, bytes and launches that can be counted by hand, rows that
name their commit. On tiny vocabularies; no test looks at a time."""

import json
import math
import os
import shutil
import subprocess

import pytest
import torch

import eft_kernels as eft
from benchmarks import __main__ as command
from benchmarks import provenance, registry
from eft_kernels import ops
from eft_kernels.bench import baselines, device, inputs, run, shapes
from eft_kernels.bench.baselines import BASELINES, Baseline
from eft_kernels.bench.shapes import OPS, Shape
from eft_kernels.cli.term import Refused

TINY = Shape(vocab=1000, batch=2, rounds=2)
EAGER, LEAN, COMPILED = BASELINES[:3]
CORES = device.cores()  # before anything is pinned
FIELDS = """schema status why op variant implementation backend batch vocab models draft_tokens dtype logits launch
    threads median_us p20_us p80_us repetitions bytes bandwidth_gbs copy_gbs floor_us fraction issue_slots issue_us
    launches
    peak_memory tokens_per_s acceptance new_tokens device device_kind driver isa cores os python torch triton
    transformers eft_kernels commit dirty source command date run""".split()


@pytest.fixture
def quick_rates(monkeypatch):
    """Bandwidth is measured in a test of its own."""
    monkeypatch.setattr(device, "bandwidth", lambda kind, threads: (10.0, 8.0))


def shape(op: str, variant: str, **changes) -> Shape:
    return TINY._replace(op=op, variant=variant, draft_tokens=3 if op == "verify" else None, **changes)


EVERY = [(op, variant) for op, variants in OPS.items() for variant in variants]


# --- registry and inputs -------------------------------------------------------------------------------------------


def test_every_operator_is_measured():
    assert set(OPS) == set(ops.SCHEMAS) == set(baselines.EVERYTHING)
    assert all(set(baselines.EVERYTHING[op]) == set(OPS[op]) for op in OPS)
    for b in [*shapes.OURS, *BASELINES]:
        assert all(set(variants) <= set(OPS[op]) for op, variants in b.ops.items()), b.name


def test_suites_hold_real_shapes():
    for name, suite in registry.SUITES.items():
        found = suite()
        assert found and len({s.key() for s in found}) == len(found), name
        for s in found:
            assert s.variant in OPS[s.op] and (s.draft_tokens is not None) == (s.op == "verify")
            assert (s.threads is None) == (s.device == "cuda")
            assert shapes.nbytes(s) > 0 and shapes.issue_slots(s) > 0
    assert {(s.op, s.variant) for s in registry.cpu()} == {(s.op, s.variant) for s in registry.gpu()} == set(EVERY)


def test_what_the_goals_are_about_comes_first():
    """Time may run out: a shape keeps the first of its places."""
    first, again, other = TINY, TINY._replace(rounds=9), TINY._replace(batch=3)
    assert shapes.unique([first, other, again]) == [first, other]
    goals = [("plain", 1), ("top_p", 1), ("plain", 64), ("top_p", 64), ("plain", 256), ("top_p", 256)]
    assert [(s.variant, s.batch) for s in registry.gpu()[:6]] == goals
    assert all(s.launch == "graph" and s.vocab == 128256 for s in registry.gpu()[:6])


def test_bytes_by_hand():
    z = 3 * 128256 * 2
    assert shapes.nbytes(Shape()) == z + 9  # a token and its validity
    assert shapes.nbytes(Shape(variant="with_logprobs", batch=8)) == 8 * (z + 17)
    assert shapes.nbytes(Shape(variant="masked")) == z + 9 + 128256 // 8
    assert shapes.nbytes(Shape(dtype="float32", models=4)) == 4 * 128256 * 4 + 9
    assert shapes.nbytes(Shape("verify", "token", draft_tokens=4)) == 5 * z + 4 * 8 + 5 * 8 + 9
    assert shapes.nbytes(Shape("logprobs")) == z + 4 * 128256
    assert shapes.nbytes(Shape("token_logprobs")) == z + 12
    assert shapes.issue_slots(Shape()) == 3 * (1 / 8 + 2) + 1 + shapes.RACE


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_inputs(kind):
    V = inputs.FAMILY_VOCAB
    for models, dtype in ((1, "float32"), (3, "bfloat16"), (4, "float16")):
        z, again, other = (inputs.logits(kind, 3, V, models, dtype, seed) for seed in (1, 1, 2))
        assert len(z) == models == len(inputs.WEIGHTS[models])
        assert all(x.shape == (3, V) and x.dtype == getattr(torch, dtype) and x.isfinite().all() for x in z)
        assert all(torch.equal(a, b) for a, b in zip(z, again)) and not torch.equal(z[0], other[0])
    assert inputs.logits(kind, 2, V, 3, "float32", 0, positions=4)[2].shape == (2, 4, V)
    top = eft.logprobs(z, inputs.WEIGHTS[4]).exp().amax(1)
    assert (top < 2 / V).all() if kind == "flat" else (top > 20 / V).all()


def test_the_family_has_one_vocabulary():
    with pytest.raises(device.Unavailable, match="got 1000, the family's logits have 2048"):
        inputs.logits("family", 1, 1000, 3, "float32", 0)


# --- the gates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, variant", EVERY)
@pytest.mark.parametrize("implementation", [b for b in shapes.OURS if "cpu" in b.devices], ids=lambda b: b.name)
def test_gate_of_ours(op, variant, implementation):
    if variant in implementation.ops.get(op, ()):
        s = shape(op, variant, batch=9)
        run.gate(s, [shapes.arguments(s, 0)], implementation)


@pytest.mark.parametrize(
    "op, broken, says",
    [
        ("sample", lambda out, rows: out._replace(tokens=out.tokens ^ 1), "the reference"),
        ("sample", lambda out, rows: out._replace(logprobs=out.logprobs + 0.01), "the reference"),
        ("sample", lambda out, rows: out._replace(tokens=out.tokens + (torch.arange(rows) == 9)), "row 9 alone"),
        ("verify", lambda out, rows: out._replace(num_emitted=out.num_emitted + 1), "the reference"),
        ("logprobs", lambda out, rows: out + 0.01, "the reference"),
        ("token_logprobs", lambda out, rows: out * 1.01, "the reference"),
    ],
)
def test_wrong_tokens_are_not_timed(op, broken, says, monkeypatch, quick_rates):
    right = getattr(eft, op)

    def wrong(logits, *args, backend="auto", **kwargs):
        out = right(logits, *args, backend=backend, **kwargs)
        return out if backend == "reference" else broken(out, len(logits[0]))

    monkeypatch.setattr(ops, op, wrong)
    variant = dict(sample="with_logprobs", verify="token").get(op, "plain")
    with pytest.raises(run.WrongTokens, match=f"eft is not {says}.*nothing is timed"):
        run.run([shape(op, variant, batch=12)])


@pytest.mark.parametrize("op, variant", EVERY)
@pytest.mark.parametrize("other", [EAGER, LEAN], ids=lambda b: b.name)
def test_baselines_draw_from_our_distribution(op, variant, other):
    assert run.agrees(shape(op, variant), other) is None


@pytest.mark.parametrize("changes", [dict(dtype="float16"), dict(dtype="float32", models=4), dict(models=1)], ids=str)
@pytest.mark.parametrize("other", [EAGER, LEAN], ids=lambda b: b.name)
def test_baselines_of_other_types_and_models(other, changes):
    assert run.agrees(shape("sample", "all", **changes), other) is None


def test_compiled_draws_from_our_distribution():
    if why := COMPILED.absent():
        pytest.skip(why)
    assert run.agrees(TINY, COMPILED) is None


@pytest.mark.slow
@pytest.mark.parametrize("op, variant", [(op, v) for op, variants in COMPILED.ops.items() for v in variants])
def test_compiled_draws_from_our_distribution_everywhere(op, variant):
    if why := COMPILED.absent():
        pytest.skip(why)
    torch._dynamo.reset()
    assert run.agrees(shape(op, variant), COMPILED) is None


def reference_of(what):
    """A correct sampler, but for ``what`` it is told: a broken baseline."""

    def make(op, variant, q):
        return EAGER.make(op, variant, what(q))

    return Baseline("broken", "", "", baselines.EVERYTHING, make)


def accepts_all(op, variant, q):
    def verify(logits, drafts):
        tokens = torch.cat([drafts, drafts[:, :1]], 1)
        return tokens, torch.full((len(drafts),), tokens.shape[1])

    return verify


def no_residual(op, variant, q):
    """Accepts as it should, and after a rejection draws from the whole target."""
    right = EAGER.make(op, variant, q)

    def verify(logits, drafts):
        tokens, emitted = right(logits, drafts)
        slot, rows = emitted - 1, torch.arange(len(drafts))
        target = baselines.eager_scores(logits, q).softmax(-1)[rows, slot]
        tokens[rows, slot] = torch.multinomial(target, 1)[:, 0]
        return tokens, emitted

    return verify


BROKEN = {
    "sign": ("sample", "plain", reference_of(lambda q: q._replace(weights=(1.0, 1.0, 1.0))), "another distribution"),
    "small weight": ("sample", "plain", reference_of(lambda q: q._replace(weights=(1.0, 1.0, -0.9))), "another distr"),
    "no top-p": ("sample", "top_p", reference_of(lambda q: q._replace(params={})), "another distribution"),
    "no top-k": ("sample", "top_k", reference_of(lambda q: q._replace(params={})), "another distribution"),
    "no min-p": ("sample", "min_p", reference_of(lambda q: q._replace(params={})), "another distribution"),
    "no mask": ("sample", "masked", reference_of(lambda q: q._replace(allowed=None)), "another distribution"),
    "no up-scaling filter": ("sample", "upscale_filter", reference_of(lambda q: q._replace(params={})), "another"),
    "no temperature": (
        "sample",
        "all",
        reference_of(lambda q: q._replace(params={k: v for k, v in q.params.items() if k != "temperature"})),
        "another",
    ),
    "log-probs": (
        "sample",
        "with_logprobs",
        reference_of(lambda q: q._replace(params=dict(temperature=0.999))),
        "log-probs are off",
    ),
    "accepts all": ("verify", "token", EAGER._replace(make=accepts_all), "another distribution"),
    "no residual": ("verify", "block", EAGER._replace(make=no_residual), "another distribution"),
    "-1": ("sample", "plain", EAGER._replace(make=lambda *_: lambda z: torch.full((len(z[0]),), -1)), "a token out"),
    "scores": ("logprobs", "plain", reference_of(lambda q: q._replace(weights=(1.0, 1.0, -0.99))), "log-probs are off"),
    "ids": ("token_logprobs", "plain", reference_of(lambda q: q._replace(weights=(0.99, 1.0, -1.0))), "log-probs are"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_gate_can_fail(name):
    op, variant, broken, says = BROKEN[name]
    assert (run.agrees(shape(op, variant), broken) or "").startswith(says)


def test_p_value():
    expected = torch.tensor([500.0, 300.0, 200.0, 0.0])
    assert run.p_value(torch.tensor([510, 295, 195, 0]), expected) > 0.1
    assert run.p_value(torch.tensor([600, 250, 150, 0]), expected) < run.REJECT
    assert run.p_value(torch.tensor([500, 300, 199, 1]), expected) == 0, "a token of probability 0"
    chi2 = 100**2 / 500 + 50**2 / 300 + 50**2 / 200  # two degrees of freedom: exp(-chi2 / 2)
    assert run.p_value(torch.tensor([600, 250, 150, 0]), expected) == pytest.approx(math.exp(-chi2 / 2), rel=1e-6)
    rare = torch.tensor([990.0, *[1.0] * 10])  # pooled
    assert run.p_value(torch.tensor([990, *[0] * 9, 10]), rare) == pytest.approx(1)


# --- rows ----------------------------------------------------------------------------------------------------------


def missing(*_):
    raise ImportError("no module of that name")


def test_rows(monkeypatch, quick_rates):
    """Measured, disagreeing and absent implementations of one shape, in rows that have every field."""
    others = [
        EAGER,
        reference_of(lambda q: q._replace(params={})),
        Baseline("gone", "", "", EAGER.ops, EAGER.make, baselines.importable("a_module_that_is_not_there")),
        EAGER._replace(name="raises", make=missing),
        EAGER._replace(name="other ops", ops={"verify": ("token",)}),
    ]
    monkeypatch.setattr(run, "BASELINES", others)
    heard = []
    rows = run.run([shape("sample", "top_p")], command="the command", tell=lambda *x: heard.append(x))
    assert heard == [(0, 1, "sample top_p B=2 V=1000 J=3 bfloat16 peaked 1 thread(s)"), (1, 1, "done")]
    by = {r["implementation"]: r for r in rows}
    assert {n: r["status"] for n, r in by.items()} == dict(
        eft="measured", combine_max="measured", eager="measured", broken="disagrees", gone="absent", raises="absent"
    )
    assert all(sorted(r) == sorted(FIELDS) for r in rows)
    assert "another distribution" in by["broken"]["why"] and "no module of that" in by["raises"]["why"]
    assert "a_module_that_is_not_there" in by["gone"]["why"]
    for r in rows:
        json.dumps(r)
        assert (r["schema"], r["command"], r["threads"], r["dtype"]) == (1, "the command", 1, "bfloat16")
        assert (r["backend"] is not None) == (r["implementation"] in ("eft", "combine_max"))
        if r["status"] != "measured":
            assert r["median_us"] is r["repetitions"] is r["launches"] is r["floor_us"] is None
            continue
        assert r["why"] is None and 0 < r["p20_us"] <= r["median_us"] <= r["p80_us"] and r["repetitions"] == 2
        assert r["bytes"] == 2 * 3 * 1000 * 2 + 2 * 9 and r["floor_us"] == pytest.approx(r["bytes"] / 10e9 * 1e6)
        assert r["fraction"] == pytest.approx(r["floor_us"] / r["median_us"]) and r["issue_us"] is None
    assert len({r["run"] for r in rows}) == 1
    args, q = shapes.arguments(shape("sample", "top_p"), 0), shapes.problem(shape("sample", "top_p"))
    torch_alone = device.profile(shapes.ours("sample", "top_p", q), args, "cpu")[0]
    assert by["eager"]["launches"] > by["eft"]["launches"] == torch_alone + (by["eft"]["backend"] == "cpu")
    # ours counts what its threads keep from earlier calls
    assert by["eager"]["peak_memory"] >= 3 * 2 * 1000 * 4 and by["eft"]["peak_memory"] >= 2 * 9


def test_no_shape_is_begun_when_time_is_over(quick_rates, capsys, monkeypatch):
    clock, heard = iter([0, 1, 2, 3]), []
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    shapes = [TINY._replace(batch=b) for b in (1, 2, 3)]
    rows = run.run(shapes, [], tell=lambda *x: heard.append(x), seconds=2)
    assert {r["batch"] for r in rows} == {1} and [x[:2] for x in heard] == [(0, 3), (1, 3)]
    assert heard[1][2] == "no time left for 2 shapes: they are not measured"
    monkeypatch.undo()
    assert command.main(["run", "--seconds", "0"]) == 0
    assert "no time left for 6 shapes" in capsys.readouterr().err


def test_what_a_machine_lacks_is_absent(quick_rates):
    rows = run.run([TINY._replace(threads=len(device.cores()) + 1)], ["eager"])
    assert [r["status"] for r in rows] == ["absent"] * 3 and "the cores of this process" in rows[0]["why"]
    rows = run.run([TINY], ["flashinfer"])
    assert (rows[-1]["status"], rows[-1]["why"]) == ("absent", "it is for cuda")


def test_interleave():
    """The order rotates, a quick implementation's turn starts warm, and a slow one sits out rounds, but never has fewer
    than 3."""
    said = []

    def timer(name, seconds):
        def measure(n):
            said.append((name, n))
            return seconds

        return measure

    times = run.interleave(dict(a=timer("a", 1e-3), b=timer("b", 1e-4), slow=timer("slow", 0.9)), 10)
    assert {n: len(t) for n, t in times.items()} == dict(a=10, b=10, slow=3)
    a, b = [("a", 5), ("a", 5)], [("b", 16), ("b", 50)]
    assert said[3:12] == [*a, *b, ("slow", 1), *b, *a]


# --- the device ----------------------------------------------------------------------------------------------------


def test_bandwidth_and_pinning():
    threads = torch.get_num_threads()
    with device.pinned(1):
        assert torch.get_num_threads() == 1 and (len(device.cores()) == 1 or not hasattr(os, "sched_setaffinity"))
        read, copy = device.bandwidth("cpu", 1)
    assert 0.1 < read < 2000 and 0.1 < copy < 2000
    assert device.cores() == CORES and torch.get_num_threads() == threads
    with pytest.raises(device.Unavailable, match=f"got {len(CORES) + 1}, allowed is 1 to {len(CORES)}"):
        with device.pinned(len(CORES) + 1):
            pass


def test_profile_by_hand():
    x = torch.randn(4, 1000)
    assert device.profile(lambda z: z.exp().tanh(), (x,), "cpu") == (2, 2 * 4 * 1000 * 4)

    def three(z):
        y = z.exp()  # 16,000 bytes
        y = y.exp()  # 32,000 at once
        return y.exp()  # the first is gone

    assert device.profile(three, (x,), "cpu") == (3, 32000)


def test_timer_rotates_and_counts():
    seen = []
    measure = device.timer(seen.append, [(1,), (2,), (3,)], "cpu", "eager")
    assert measure(4) >= 0 and measure(2) >= 0
    assert seen == [1, 2, 3, 1, 2, 3]


def test_inputs_rotate_beyond_the_cache():
    sets = run.inputs_for(TINY._replace(vocab=20000))
    assert sum(z.nbytes for args in sets for z in args[0]) >= device.rotation_bytes("cpu") or len(sets) == 64
    assert len({z.data_ptr() for args in sets for z in args[0]}) == 3 * len(sets)
    assert not torch.equal(sets[0][0][0], sets[1][0][0]) and torch.equal(sets[0][0][0], sets[4][0][0])


# --- commits, saving, the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commit(tmp_path_factory):
    """A repository with the sources of this checkout and one commit."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    tree = tmp_path_factory.mktemp("checkout")
    for name in ("eft_kernels", "benchmarks", "csrc"):
        shutil.copytree(
            provenance.ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "*.o", "__pycache__", "results")
        )
    shutil.copy(provenance.ROOT / "setup.py", tree)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tree, check=True)
    return tree


@pytest.fixture
def checkout(commit, tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    shutil.copytree(commit, tree)
    monkeypatch.setattr(provenance, "ROOT", tree)
    monkeypatch.setattr(eft, "__file__", str(tree / "eft_kernels" / "__init__.py"))
    return tree


def test_environment_names_the_commit(checkout, monkeypatch):
    about = provenance.of_a_row()
    assert about["dirty"] is False and about["source"] == provenance.source_of(about["commit"])
    row = device.environment("this", "cpu")
    assert row["command"] == "this" and row["device"] and row["torch"] == torch.__version__
    assert row["commit"] is row["dirty"] is row["source"] is None and set(about) < set(row)
    assert device.environment("this", "cpu")["run"] != row["run"]
    (checkout / "csrc" / "semantics" / "noise.h").open("a").write("//\n")
    edited = provenance.of_a_row()["source"]
    (checkout / "benchmarks" / "new.py").touch()
    (checkout / "README.md").write_text("makes no result")
    changed = provenance.of_a_row()
    assert changed["dirty"] is True and changed["commit"] == about["commit"]
    assert len({about["source"], edited, changed["source"]}) == 3
    with pytest.raises(Refused, match="benchmarks/new.py") as error:
        provenance.refuse_dirty()
    assert "csrc/semantics/noise.h" in str(error.value) and "README" not in str(error.value)
    shutil.rmtree(checkout / ".git")
    monkeypatch.delenv("EFT_KERNELS_COMMIT", raising=False)
    assert provenance.of_a_row()["commit"] is provenance.of_a_row()["dirty"] is None
    monkeypatch.setenv("EFT_KERNELS_COMMIT", "abc")
    copied = provenance.of_a_row()
    assert copied["commit"] == "abc" and copied["dirty"] is None and copied["source"] == changed["source"]
    provenance.refuse_dirty()


def test_a_stale_extension_is_refused(checkout):
    extension = checkout / "eft_kernels" / "_cpu.abi3.so"
    extension.touch()
    os.utime(extension, (1, 1))
    with pytest.raises(Refused, match="newer than the extension"):
        provenance.refuse_dirty()
    extension.touch()
    provenance.refuse_dirty()


def test_add(checkout, quick_rates, capsys):
    path, target = checkout / "rows.jsonl", checkout / "benchmarks" / "results" / "amd-epyc-7b13" / "rows.jsonl"
    rows = run.run([TINY], ["lean"], more=provenance.of_a_row())
    assert len(rows) == 3 and rows[0]["dirty"] is False

    def add(**changes):
        run.write_rows([{**row, "device": "AMD EPYC 7B13", **changes} for row in rows], path)
        code = command.main(["add", str(path)])
        said = capsys.readouterr()
        return code, (said.out + said.err).strip()

    for changes, why in [
        (dict(dirty=True, source="0" * 64), "its sources are not those of commit"),
        (dict(dirty=None, commit=None), "no commit is named"),
        (dict(dirty=None, commit="f" * 40), "is unknown here"),
        (dict(dirty=None, source=None), "its sources are not"),
        (dict(schema=2), "not a row"),
        (dict(schema=1, status="guessed"), "not a row"),
    ]:
        code, said = add(**changes)
        assert code == 2 and why in said and len(said.splitlines()) == 1, said
    assert not target.exists()
    assert add(dirty=None) == (0, str(target)), "a copied tree whose sources are the commit's"
    added = [json.loads(line)["implementation"] for line in target.read_text().splitlines()]
    assert added == ["eft", "combine_max", "lean"]
    code, said = add()
    assert code == 2 and "exists" in said


def test_run_saves(checkout, quick_rates, capsys):
    path = checkout / "rows.jsonl"
    words = [
        "run",
        "--variant",
        "plain",
        "--op",
        "sample",
        "--batch",
        "1",
        "2",
        "--vocab",
        "1000",
        "--rounds",
        "2",
        "--against",
        "lean",
    ]
    assert command.main([*words, "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["batch"], r["implementation"]) for r in rows] == [
        (b, n) for b in (1, 2) for n in ("eft", "combine_max", "lean")
    ]
    assert rows[0]["command"].startswith("python -m benchmarks run --variant plain") and "[2/2] done" in err
    assert "sample, plain" in out and "not saved" not in out
    (checkout / "setup.py").open("a").write("#\n")
    assert command.main([*words, "--json", str(path)]) == 2
    assert "setup.py" in capsys.readouterr().err
    assert command.main(words) == 0 and "not saved" in capsys.readouterr().out


def test_red_gate_on_the_command_line(monkeypatch, quick_rates, capsys, tmp_path):
    right = eft.sample
    monkeypatch.setattr(
        ops,
        "sample",
        lambda *args, backend="auto", **kwargs: right(
            *args, backend=backend, **kwargs | ({} if backend == "reference" else dict(position=1))
        ),
    )
    monkeypatch.setattr(provenance, "refuse_dirty", lambda: None)
    words = ["run", "--vocab", "1000", "--rounds", "1", "--json", str(tmp_path / "rows")]
    assert command.main(words) == 1 and "nothing is timed" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (["run", "--suite", "huge"], "'quick'"),
        (["run", "--op", "simple"], "'sample', 'verify', 'logprobs', 'token_logprobs'"),
        (["run", "--variant", "top-p"], "'top_p'"),
        (["run", "--against", "numpy"], "'eager', 'lean', 'compiled', 'flashinfer', 'vllm', 'sglang'"),
        (["run", "--dtype", "int8"], "'bfloat16', 'float16', 'float32'"),
        (["run", "--logits", "round"], "'peaked', 'family', 'flat'"),
        (["run", "--models", "2"], "1, 3, 4"),
        (["run", "--batch", "0"], "from 1 on"),
        (["run", "--vocab", "999"], "from 1000 on"),
        (["run", "--draft-tokens", "2"], "no shape"),
        (["run", "--op", "verify", "--models", "1"], "no shape"),
        (["run", "--variant", "block", "--op", "sample"], "no shape"),
        (["run", "--json", "/no/where"], "--json /no/where"),
        (["sing"], "'list', 'run', 'add', 'report', 'compare'"),
        (["add", "/no/where"], "/no/where"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line(words, says, capsys, monkeypatch):
    monkeypatch.setattr(provenance, "refuse_dirty", lambda: None)
    assert command.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_suite_needs_a_gpu(capsys):
    assert command.main(["run", "--suite", "gpu"]) == 2
    assert "no CUDA device is here" in capsys.readouterr().err


def test_lists(capsys):
    assert command.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in [*registry.SUITES, *OPS, *OPS["sample"], *(b.name for b in BASELINES)])
    assert command.main(["run", "--list", "--suite", "cpu", "--op", "verify", "--dtype", "float16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 18 and all(line.startswith("verify") and "float16" in line for line in lines)


def test_vllm_is_asked_for_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [])
    assert command.main(["vllm", "--rounds", "1"]) == 2
    assert "vLLM is not installed here; `make test-vllm`" in capsys.readouterr().err
