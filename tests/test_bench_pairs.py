"""benchmarks/pairs.py: pairs of models, what is measured of them and what is predicted. No test looks at a time."""

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import pair_models, pairs, report  # noqa: E402
from benchmarks.pairs import Acceptance, Variant  # noqa: E402
from eft_kernels.bench import rows as bench_rows  # noqa: E402
from eft_kernels.bench.run import WrongTokens  # noqa: E402
from eft_kernels.decoding.trees import Tree, chain  # noqa: E402

PLAIN, COUPLED = Variant("plain", {}), Variant("coupled", dict(verify="coupled", draft_tokens=3))


@pytest.fixture(scope="module")
def models():
    return pair_models.Models(pair_models.SIZES[0])


@pytest.fixture
def pair(models):
    return pairs.made(0, models, 0.8)


# --- the models ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_base_is_ref_and_what_one_number_adds(models):
    ids = pair_models.prompts(4, 32, models.size.vocab, 5)
    base, tuned, ref = (model(ids).logits for model in models.set(0.0).all)
    assert torch.equal(base, ref) and not torch.equal(tuned, ref)
    far = [float((models.set(scale).base(ids).logits - ref).std()) for scale in (1.0, 2.0, 4.0)]
    assert far == sorted(far) and far[0] > 0
    torch.testing.assert_close(models.set(0.0).base(ids).logits, ref)


def test_drafts_are_accepted_as_often_as_the_table_says(models):
    for wanted, scale in pair_models.STRENGTHS[0].items():
        assert pair_models.agreement(models, scale) == pytest.approx(wanted, abs=0.01)
    assert pair_models.strength(models, 0.8) == pytest.approx(pair_models.STRENGTHS[0][0.8], rel=0.05)
    assert set(pair_models.STRENGTHS) == set(pair_models.SIZES)
    for ratio, size in pair_models.SIZES.items():
        assert set(pair_models.STRENGTHS[ratio]) == set(pair_models.ACCEPTANCES)
        assert not ratio or size.ratio == pytest.approx(ratio, rel=0.03)


def test_texts_are_like_texts(pair):
    """Some tokens are nearly certain and some are not, and no text is a loop."""
    texts = pair.write(PLAIN, 4, 0, 64).texts
    assert min(len(set(row)) for row in texts.tolist()) > 32
    with torch.no_grad():
        z = pair.models[1](texts).logits.log_softmax(-1)
    entropy = -(z.exp() * z).sum(-1).flatten()  # nats
    assert 1 < entropy.mean() < 4 and entropy.quantile(0.1) < 1.5 and entropy.quantile(0.9) > 3


# --- what is measured ----------------------------------------------------------------------------------------------


def test_rows(pair, tmp_path):
    from test_benchmarks import FIELDS

    about = dict.fromkeys(FIELDS) | dict(schema=1, device="here", device_kind="cpu", date="2026-01-01", run="r")
    measured = [
        row
        for batch in (1, 2)
        for row in pairs.measure_batch(pair, batch, (2, 3), "float32", new=12, rounds=2, checked={})
    ]
    assert {(r["variant"], r["draft_tokens"]) for r in measured} >= {
        ("plain", None),
        *(("coupled", k) for k in (2, 3)),
        ("token", 3),
        ("block", 3),
    }
    for row in measured:
        assert row["op"] == "pairs" and row["status"] == "measured" and row["new_tokens"] == 12
        own, plain = row["implementation"] == "eft", row["variant"] == "plain"
        assert row["median_us"] > 0 and row["speedup"] > 0 and (not plain or row["speedup"] == 1)
        assert own == (row["predicted_us"] is not None) == (row["backend"] is not None)
        assert own or row["batch"] == 1  # transformers assists one row alone
        assert sum(row["ranks"]) <= 1 + 1e-6 and row["ranks"][0] == pytest.approx(row["agreement"])
        if own:
            assert 0 < row["outside_us"] < row["round_us"]
        if row["variant"] == "coupled":  # the texts are those of plain decoding, so this is no estimate
            assert row["tokens_per_round"] == pytest.approx(row["tokens_to_expect"])
        if row["variant"] == "token":  # 48 tokens at most
            assert row["tokens_per_round"] == pytest.approx(row["tokens_to_expect"], rel=0.4)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(about | dict(threads=1) | row) + "\n" for row in measured))
    shapes = bench_rows.newest(bench_rows.read(path))
    assert len(report.pairs_rows(shapes)) == len(measured)
    table = "\n".join(report.pairs_section(shapes))
    assert "HF assisted" in table and "coupled" in table and "drafting" in table
    pytest.importorskip("matplotlib")
    from benchmarks.plots import plots

    assert [file for file, _, _ in plots(shapes)] == ["speed-up-pairs-threads-1.png"]


def test_passes_and_what_is_outside_of_them(pair):
    w = pair.write(PLAIN, 2, 0, 6, caches=True)
    assert [p[:2] for p in w.watch.passes] == [(i, n) for n in (pairs.PROMPT, *[1] * 5) for i in range(3)]
    assert w.watch.rounds == 6 and len(w.watch.spans()) == 5
    inside = sum(p.end - p.start for p in w.watch.passes)
    assert 0 < inside < w.seconds and all(0 < s < w.seconds for s in w.watch.outside())
    updates = sum(s for _, s in w.watch.updates)
    layers = sum(model.config.num_hidden_layers for model in pair.models)
    assert 0 < updates < inside and len(w.watch.updates) == 6 * layers
    assert 0 < sum(w.watch.updating()) < updates  # without the first pass
    w = pair.write(COUPLED, 2, 0, 6, caches=True)
    assert [p[:2] for p in w.watch.passes[3:9]] == [(1, 1)] * 4 + [(0, 4), (2, 4)]
    seen = len(w.watch.updates)
    pair.write(PLAIN, 1, 0, 2)
    assert len(w.watch.updates) == seen, "nobody watches any more"


@pytest.mark.parametrize("wrong", [COUPLED, Variant("block", dict(verify="block", draft_tokens=2))])
def test_nothing_is_timed_when_ours_is_wrong(wrong, pair, monkeypatch):
    right = pair.write

    def write(v, *args, **options):
        out = right(v, *args, **options)
        return out._replace(texts=out.texts + (v == wrong))

    monkeypatch.setattr(pair, "write", write)
    with pytest.raises(WrongTokens, match=f"{wrong.name}, K = .*B=1"):
        pairs.gate(pair, [PLAIN, wrong], 1, exact=True)


# --- what is predicted ---------------------------------------------------------------------------------------------


def test_rounds_by_hand():
    # the prompt's pass writes the first token
    place = torch.tensor([[9, 0, 0, 1, 0, 0, 0, 0, 0], [9, 2, 2, 2, 2, 2, 2, 2, 2]])
    # two drafts and a token, three and one more, then the last, which needs no draft
    assert pairs.rounds_of(place[:1], chain(3)) == [chain(k) for k in (0, 3, 3, 0)]
    slow = [chain(k) for k in (0, 3, 3, 3, 3, 3, 2, 1, 0)]
    assert pairs.rounds_of(place[1:], chain(3)) == pairs.rounds_of(place, chain(3)) == slow  # the slow row counts
    wide = Tree((0, 0, 1, 1, 3, 3))  # two children on the likeliest way, three levels
    assert [len(t) for t in pairs.rounds_of(place[:1], wide)] == [0, 6, 6]  # the runner-up was among the drafts
    on_text = Acceptance(place[:1], (place[:1] == 0).float())
    token = Variant("token", dict(verify="token", draft_tokens=3))
    tree = Variant("tree", dict(verify="coupled", draft_tokens=3, draft_width=2))
    assert pairs.expected(COUPLED, on_text) == pytest.approx(8 / 3) == pairs.expected(token, on_text)
    assert pairs.expected(tree, on_text) == 8 / 2
    assert pairs.expected(PLAIN, on_text) is None


class Costs(pairs.Forwards):
    """A pass over n tokens: 100 + n of base, 10 + n of the others; 9 where tuned drafts after a draft."""

    def __init__(self):
        self.seen = {(m, n): [(100 if m == "base" else 10) + n] for m in pairs.NAMES for n in pairs.LENGTHS}
        self.seen["drafting", 1] = [9]


def test_times_by_hand():
    costs, prompt = Costs(), 120 + 3 * pairs.PROMPT
    assert costs("base", 3) == 103 and costs("base", 16) == 116 and costs("ref", 20) == 30  # on the line
    assert pairs.time_of(costs, pairs.passes_of([chain(0)] * 5)) == prompt + 4 * 123
    assert pairs.time_of(costs, pairs.passes_of([chain(0), chain(3)])) == prompt + (11 + 3 * 9 + 104 + 14)
    tree = Tree((0, 0, 1, 1))  # of two levels
    assert pairs.time_of(costs, pairs.passes_of([chain(0), tree])) == prompt + (11 + 12 + 12 + 105 + 15)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_passes_that_are_predicted_are_made(pair, batch):
    new = 24
    plain = pair.write(PLAIN, batch, 1, new)
    made = [p[:2] for p in plain.watch.passes]
    assert sorted(made) == sorted(pairs.passes_of([chain(0)] * new))
    place = pairs.acceptance(pair, plain.texts, 1, new).place
    for k in (1, 3, 6):
        w = pair.write(Variant("coupled", dict(verify="coupled", draft_tokens=k)), batch, 1, new)
        assert torch.equal(w.texts, plain.texts)
        said = pairs.passes_of(pairs.rounds_of(place, chain(k)))
        assert [p[:2] for p in w.watch.passes][3:] == said[3:] and sorted(p[:2] for p in w.watch.passes) == sorted(said)


# --- the command ---------------------------------------------------------------------------------------------------


def test_command(capsys):
    def run(*options):
        code = command.main(["pairs", "--threads", "1", *options])
        return code, *capsys.readouterr()

    code, out, _ = run("--quick")
    assert code == 0 and "| coupled | 3 |" in out and "HF assisted" in out and "not saved" in out
    code, out, _ = run("--contexts", "--context", "16", "64", "--batch", "2", "--new", "8")
    assert code == 0 and "| 16 | 2 | plain |" in out and "| 64 | 2 | coupled, K = 3 |" in out
    small = ("--dtypes", "float32", "--batch", "1", "--new", "8", "--rounds", "1", "--draft-tokens", "2")
    weights = pairs.demo.find_family(None, None)[0]
    code, out, _ = run("--models", *(str(weights / name) for name in ("base", "tuned-b", "ref")), *small)
    assert code == 0 and "| base | float32 |" in out
    code, _, error = run("--models", "/nowhere", str(weights / "tuned-b"), str(weights / "ref"), *small)
    assert code == 2 and "/nowhere" in error
