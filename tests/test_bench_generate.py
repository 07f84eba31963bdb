"""benchmarks/generate.py: rows of whole generations behind their gate. Short texts; no test looks at a time."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import generate, report  # noqa: E402
from benchmarks.generate import GREEDY, SAMPLED, Writer  # noqa: E402
from eft_kernels.bench.run import WrongTokens  # noqa: E402


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(generate, "NEW", 8)


@pytest.fixture(scope="module")
def family():
    return generate.Family("cpu")


def test_rows():
    from test_benchmarks import FIELDS

    rows = generate.measure(rounds=2, batches=(1, 2), drafts=(3,), command="a command")
    assert {row["run"] for row in rows} == {rows[0]["run"]} and len(rows) == 2 * (1 + 3 + 1 + 1)
    for row in rows:
        assert set(row) == set(FIELDS)
        assert row["op"] == "generate" and row["command"] == "a command" and row["new_tokens"] == 8
        own, timed = row["implementation"] == "eft", row["status"] == "measured"
        assert bool(row["backend"]) == own
        assert timed or (row["implementation"], row["batch"]) == ("assisted", 2) and "batch_size = 1" in row["why"]
        assert timed == bool(row["median_us"]) == bool(row["tokens_per_s"])
        if timed:
            assert row["tokens_per_s"] == pytest.approx(8e6 * row["batch"] / row["median_us"])
            assert row["repetitions"] == 2 and row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert (row["acceptance"] is not None) == (own and row["variant"] != "plain")
        assert row["acceptance"] is None or 0 < row["acceptance"] < 1
    keys = [(r["batch"], r["implementation"], r["variant"], r["draft_tokens"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert report.generate_table(report.newest(rows))


def test_acceptance_is_that_of_the_generations(family):
    told = []
    seconds = generate.timer(family, Writer("eft", "token", 3), 2, told)
    assert seconds(1) > 0 and seconds(1) > 0
    for turn, seen in enumerate(told):
        again = family.write(Writer("eft", "token", 3), 2, turn, SAMPLED)[1]
        assert torch.equal(seen.accepted, again.accepted) and torch.equal(seen.drafted, again.drafted)
    assert not torch.equal(*(family.write(Writer("eft", "plain"), 2, turn, GREEDY)[0] for turn in (0, 1)))


def test_writers_are_what_they_say(family):
    """How often each model runs, and over how much text."""

    def widths(writer):
        seen = {name: [] for name in ("base", "tuned", "ref")}
        hooks = [
            getattr(family, name).register_forward_pre_hook(
                lambda module, args, kwargs, name=name: seen[name].append(kwargs["input_ids"].shape[1]),
                with_kwargs=True,
            )
            for name in seen
        ]
        family.write(writer, 1, 0, SAMPLED)
        for hook in hooks:
            hook.remove()
        return seen

    text = list(range(generate.PROMPT, generate.PROMPT + 8))
    plain, stateless = widths(Writer("eft", "plain")), widths(Writer("stateless", "plain"))
    assert plain["base"] == plain["tuned"] == plain["ref"] == stateless["base"] == [text[0]] + [1] * 7
    assert stateless["tuned"] == stateless["ref"] == text
    for writer in (Writer("eft", "block", 3), Writer("assisted", "token", 3)):
        base = widths(writer)["base"]
        drafts = 3 if writer.implementation == "assisted" else 0  # ours reads the prompt without any
        assert len(base) < 8 and base[0] == text[0] + drafts and base[1] == 4, writer


def test_a_baseline_that_disagrees_is_not_timed(family, monkeypatch):
    processor = family.processors[0]
    monkeypatch.setattr(family, "processors", type(family.processors)([lambda ids, scores: -processor(ids, scores)]))
    rows = generate.measure_batch(family, 1, (2,), 1)
    for row in rows:
        assert row["status"] == ("measured" if row["implementation"] == "eft" else "disagrees"), row
        assert (row["median_us"] is None) == (row["status"] == "disagrees") == bool(row["why"])


@pytest.mark.parametrize(
    "wrong, sampling",
    [
        (Writer("eft", "coupled", 2), GREEDY),
        (Writer("eft", "coupled", 2), SAMPLED),
        (Writer("eft", "block", 2), GREEDY),
    ],
)
def test_nothing_is_timed_when_ours_is_wrong(wrong, sampling, family, monkeypatch):
    right = family.write

    def write(writer, batch, turn, how):
        tokens, seen = right(writer, batch, turn, how)
        return tokens + (writer == wrong and how is sampling), seen

    monkeypatch.setattr(family, "write", write)
    with pytest.raises(WrongTokens, match=f"{wrong.variant} with K = 2 .* B=1"):
        generate.gate(family, 1, (2,))


def test_command(capsys):
    def run(*options):
        code = command.main(["run", *options])
        return code, *capsys.readouterr()

    code, out, _ = run("--suite", "generate", "--batch", "1", "--draft-tokens", "2", "--rounds", "1", "--threads", "1")
    assert code == 0 and "HF assisted | token | 2" in out and "eft-kernels | coupled | 2" in out
    for option in (["--op", "sample"], ["--vocab", "2048"], ["--against", "eager"]):
        code, _, error = run("--suite", "generate", *option)
        assert code == 2 and option[0] in error
    assert "'drafts': (2, 4)" in run("--suite", "cpu", "--list")[1]
    for option in (["--op", "sample"], ["--batch", "1"], ["--device", "cpu"]):
        assert "drafts" not in run("--suite", "cpu", "--list", *option)[1]
    if not torch.cuda.is_available():
        assert run("--suite", "generate", "--device", "cuda")[0] == 2
