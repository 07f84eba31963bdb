"""Speculation on pairs of models that behave like real ones, in wall clock, beside what arithmetic says.

`python -m benchmarks pairs` makes the pairs (pair_models.py), or measures checkpoints (--models BASE TUNED REF). In one
process, in turns, with the same prompts and seeds, they write texts of random prompts by every way of `VARIANTS`.

Predicted is what follows from two measurements alone: how often a draft is accepted on the texts of plain decoding, and
how long a pass of each model over n tokens takes by itself. A round of a chain costs K + 1 passes of tuned and one of
base and ref over K + 1 tokens. What is accepted says how many rounds a text needs; with several rows the slowest row
counts. For "block" and trees the rounds and passes are those that were made. Outside is what of a round is no model's
forward: sampling, verifying, caches, masks, Python.

--contexts measures what is outside the models against the length of the text, with models of almost no weights.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
import inspect
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import eft_kernels as eft
from eft_kernels.bench import device as machine
from eft_kernels.bench.rows import newest
from eft_kernels.bench.run import MEASURED, WrongTokens, error_line, on_stderr, statistics_of, write_rows
from eft_kernels.cli import demo
from eft_kernels.cli import models as checkpoints
from eft_kernels.cli.files import check_writable
from eft_kernels.parameters import MAX_RUNNERS_UP

from . import generate, pair_models, provenance, report
from .pair_models import ACCEPTANCES, RATIOS, SIZES, STRENGTHS, Models

PROMPT, GATE = 8, 12  # tokens: of a prompt (its pass costs about what any other does), of the gate's texts
SAMPLED = dict(do_sample=True, temperature=1.0, top_k=0)
NAMES = ("base", "tuned", "ref")
LENGTHS = (1, 2, 4, 8, 16)  # tokens of the passes that are timed alone, beside those that the variants make
CONTEXTS = (256, 1024, 4096, 16384)

# (name, options of eft.hf.generate); K stands for each number of drafts that the command is asked for
K = "K"
VARIANTS = (
    ("plain", {}),
    ("coupled", dict(verify="coupled", draft_tokens=K)),
    ("token", dict(verify="token", draft_tokens=4)),
    ("block", dict(verify="block", draft_tokens=4)),
    ("tree of 2", dict(verify="coupled", draft_tokens=4, draft_width=2, draft_budget=16)),
    ("auto", dict(verify="coupled", draft_tokens="auto", draft_width=2)),
)
ASSISTED = 4  # drafts of transformers' assisted generation


class Variant(NamedTuple):
    name: str
    options: dict
    implementation: str = "eft"

    @property
    def drafts(self) -> int | None:
        """K of a number of drafts that is known beforehand."""
        k = self.options.get("draft_tokens")
        return k if isinstance(k, int) else None

    @property
    def chain(self) -> bool:
        """Whether the text says how many of its drafts would be accepted."""
        return self.name in ("coupled", "token") and self.drafts is not None and "draft_width" not in self.options

    @property
    def label(self) -> str:
        return self.name + (f", K = {self.drafts}" if self.drafts else "")


def takes(options: dict) -> bool:
    """Whether `eft.hf.generate` has these options."""
    known = inspect.signature(eft.hf.generate).parameters
    return set(options) <= set(known) and (
        options.get("draft_tokens") != "auto" or "str" in str(known["draft_tokens"].annotation)
    )


def variants(drafts, batch: int) -> list[Variant]:
    found = []
    for name, options in VARIANTS:
        for k in drafts if K in options.values() else (None,):
            given = {n: k if x is K else x for n, x in options.items()}
            if takes(given):
                found.append(Variant(name, given))
    if batch == 1:  # transformers assists one row alone
        found.append(Variant("assisted", dict(draft_tokens=ASSISTED), "assisted"))
    return found


# --- one generation ------------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """A forward of one model."""

    model: int  # of NAMES
    tokens: int
    start: float
    end: float


class Watch(contextlib.AbstractContextManager):
    """The forwards of ``models`` while it is entered, and with ``caches`` the seconds of cache updates inside them."""

    def __init__(self, models, caches: bool = False):
        self.models, self.caches = models, caches
        self.passes: list[Pass] = []
        self.updates: list[tuple[float, float]] = []  # start, seconds

    def __enter__(self):
        self.undo = contextlib.ExitStack()
        for i, model in enumerate(self.models):
            began: list[float] = []

            def before(module, args, kwargs, began=began):
                began.append(time.perf_counter())

            def after(module, args, kwargs, out, i=i, began=began):
                tokens = kwargs["input_ids"].shape[1]
                self.passes.append(Pass(i, tokens, began.pop(), time.perf_counter()))

            self.undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
            self.undo.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        if self.caches:
            self._watch_caches()
        return self

    def _watch_caches(self) -> None:
        from transformers import Cache

        classes, depth = [Cache], 0
        for cls in classes:
            classes += [c for c in cls.__subclasses__() if c not in classes]

        def timed(update):
            @functools.wraps(update)
            def call(*args, **kwargs):
                nonlocal depth
                start, depth = time.perf_counter(), depth + 1
                try:
                    return update(*args, **kwargs)
                finally:
                    depth -= 1
                    if not depth:
                        self.updates.append((start, time.perf_counter() - start))

            return call

        for cls in (c for c in classes if "update" in vars(c)):
            self.undo.callback(setattr, cls, "update", cls.update)
            cls.update = timed(cls.update)

    def __exit__(self, *error):
        self.undo.close()

    @property
    def rounds(self) -> int:
        """ref runs once a round, or a step of plain decoding."""
        return sum(p.model == 2 for p in self.passes)

    def spans(self) -> list[tuple[float, float]]:
        """From the end of each pass of ref to the end of the next: a round each, but the first and what follows."""
        ends = [p.end for p in self.passes if p.model == 2]
        return list(zip(ends, ends[1:]))

    def outside(self) -> list[float]:
        """Seconds of each of `spans` that no model's forward took."""
        return [b - a - sum(p.end - p.start for p in self.passes if a <= p.start < b) for a, b in self.spans()]

    def updating(self) -> list[float]:
        """Seconds of cache updates in each of `spans`."""
        return [sum(s for start, s in self.updates if a <= start < b) for a, b in self.spans()]


class Written(NamedTuple):
    texts: torch.Tensor  # int64 [B, columns of the prompt + new]
    seconds: float
    watch: Watch
    speculation: eft.decoding.Speculation | None


class Pair:
    """base, tuned and ref with prompts, and how they are called in the rows."""

    def __init__(self, name: str, models, vocab: int, prompts=None):
        """prompts: int64 [N, columns] to take turns from; None: random ids."""
        self.name, self.models, self.vocab, self.given = name, list(models), vocab, prompts
        for model in self.models:
            model.generation_config.eos_token_id = None  # every text has its full length
        self.processors = generate.stateless(*self.models[1:])

    def prompts(self, batch: int, turn: int, columns: int = PROMPT) -> torch.Tensor:
        if self.given is None:
            return pair_models.prompts(batch, columns, self.vocab, 1000 * turn + batch)
        rows = (torch.arange(batch) + turn * batch) % len(self.given)
        return self.given[rows]

    def write(
        self, v: Variant, batch: int, turn: int, new: int, sampling=SAMPLED, columns: int = PROMPT, caches: bool = False
    ) -> Written:
        ids = self.prompts(batch, turn, columns)
        options = dict(sampling, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0)
        base, tuned, ref = self.models
        if v.implementation == "eft":
            options.update(v.options, custom_generate=eft.hf.generate, tuned=tuned, ref=ref, seed=turn)
        else:
            torch.manual_seed(turn)
            options.update(generate.assistance(tuned, v.drafts), logits_processor=self.processors)
        with Watch(self.models, caches) as watch:
            start = time.perf_counter()
            out = base.generate(ids, **options, return_dict_in_generate=True)
            seconds = time.perf_counter() - start
        return Written(out.sequences, seconds, watch, getattr(out, "speculation", None))


def made(ratio: int, models: Models, acceptance: float) -> Pair:
    models.set(STRENGTHS[ratio][acceptance])
    return Pair(f"{models.size.ratio:.0f}:1, {acceptance:g}", models.all, models.size.vocab)


def loaded(names, option: str, dtype: str, title: str | None = None) -> Pair:
    """Checkpoints by path or hub id, with prompts from the example family's held-out text."""
    models = [checkpoints.load_model(str(name), option, dtype, "cpu") for name in names]
    tokenizer = checkpoints.load_tokenizer(str(names[0]), option)
    text = demo.find_family(None, None)[1]["a"][:40000]
    prompts = torch.tensor(tokenizer(text, verbose=False).input_ids).unfold(0, PROMPT, 100)
    vocab = min(model.config.get_text_config().vocab_size for model in models)
    return Pair(title or Path(names[0]).name, models, vocab, prompts)


def family(dtype: str) -> Pair:
    folder = demo.find_family(None, None)[0]
    return loaded([folder / name for name in ("base", "tuned-a", "ref")], "--models", dtype, "family")


# --- what is measured for the prediction ---------------------------------------------------------------------------


class Forwards:
    """Seconds of a pass over n tokens after ``columns`` cached ones, for each model alone; linear in between."""

    def __init__(self, pair: Pair, batch: int, lengths, columns: int, repetitions: int = 5):
        from transformers import DynamicCache

        from eft_kernels.integrations.hf.models import cache_name

        self.points = sorted({*lengths})
        first = pair.prompts(batch, 0)[:, :1]
        caches = [DynamicCache() for _ in pair.models]
        seen: dict[tuple[str, int], list[float]] = {}

        @torch.no_grad()
        def run(i: int, n: int, times: int = 1) -> float:
            model, cache = pair.models[i], caches[i]
            known = columns if cache.get_seq_length() else 0
            tokens = first.expand(-1, n)
            start = time.perf_counter()
            for j in range(times):
                at = torch.arange(known + j * n, known + (j + 1) * n)[None].expand(batch, -1)
                model(
                    input_ids=tokens,
                    position_ids=at,
                    use_cache=True,
                    logits_to_keep=n,
                    **{cache_name(model): cache},
                )
            seconds = (time.perf_counter() - start) / times
            if known:
                cache.crop(-times * n)
            return seconds

        for i in range(3):
            run(i, columns)
        for turn in range(repetitions + 1):
            for n in self.points:
                for i in (1, 0, 2):
                    seconds = run(i, n)
                    if turn:  # the first is a warm-up
                        seen.setdefault((NAMES[i], n), []).append(seconds)
            seconds = run(1, 1, 4)  # a draft after a draft finds the weights in the caches, where they fit
            if turn:
                seen.setdefault(("drafting", 1), []).append(seconds)
        self.seconds = {key: statistics.median(times) for key, times in seen.items()}

    def __call__(self, name: str, n: int) -> float:
        if name == "drafting":
            return self.seconds[name, 1]
        low = self.points[max(bisect.bisect_right(self.points, n) - 1, 0)]
        high = self.points[min(bisect.bisect_left(self.points, n), len(self.points) - 1)]
        a, b = self.seconds[name, low], self.seconds[name, high]
        return a if low == high else a + (b - a) * (n - low) / (high - low)

    def step(self) -> float:
        """A step of plain decoding: a pass of every model."""
        return sum(self(name, 1) for name in NAMES)

    def table(self) -> dict[str, dict[int, float]]:
        """Microseconds, for the row."""
        found: dict[str, dict[int, float]] = {}
        for (name, n), seconds in self.seconds.items():
            found.setdefault(name, {})[n] = round(seconds * 1e6, 1)
        return found


class Acceptance(NamedTuple):
    """What the drafting model would have drafted at every token of a plain text, [B, T] each."""

    place: torch.Tensor  # of the text's token in its coupled draw: 0 is the draft
    chance: torch.Tensor  # that "token" accepts the text's token


@torch.no_grad()
def acceptance(pair: Pair, texts: torch.Tensor, turn: int, new: int) -> Acceptance:
    """By one pass of every model over the texts of plain decoding, int64 [B, columns + new], of the turn's seeds."""
    target = texts[:, -new:]
    logits = [model(texts[:, :-1], logits_to_keep=new).logits for model in pair.models]  # 3 x [B, T, V]
    seeds, places, chances = eft.row_seeds(turn, len(texts)), [], []
    for n in range(new):
        one = [z[:, n].contiguous() for z in logits]
        draws = eft.draft(one[1], slot=0, method="coupled", seed=seeds, position=n, runners_up=MAX_RUNNERS_UP)
        same = torch.cat([draws.tokens[:, None], draws.runners_up], 1) == target[:, n, None]
        places.append(torch.where(same.any(1), same.int().argmax(1), MAX_RUNNERS_UP + 1))
        p = eft.token_logprobs(one, eft.upscale(), target[:, n, None])
        q = eft.token_logprobs([one[1]], [1.0], target[:, n, None])
        chances.append((q - p).clamp(max=0).exp()[:, 0])
    return Acceptance(torch.stack(places, 1), torch.stack(chances, 1))


class Predicted(NamedTuple):
    seconds: float
    tokens_a_round: float


def predict_plain(forwards: Forwards, new: int) -> Predicted:
    return Predicted(sum(forwards(name, PROMPT) for name in NAMES) + (new - 1) * forwards.step(), 1.0)


def predict_chain(forwards: Forwards, accepted: torch.Tensor, k: int) -> Predicted:
    """Of chains of k drafts; accepted: bool [B, T], whether a draft is accepted at each token of the texts."""
    new = accepted.shape[1]
    at, seconds, rounds, first = [0] * len(accepted), 0.0, 0, True
    rows = accepted.tolist()
    while any(n < new for n in at):
        drafts = min(k, max(new - n for n in at if n < new) - 1)  # a token more is emitted than accepted
        fed = PROMPT if first else 1
        seconds += forwards("tuned", fed) + drafts * forwards("drafting", 1)
        seconds += sum(forwards(name, fed + drafts) for name in ("base", "ref"))
        for b, n in enumerate(at):
            if n < new:
                most = min(drafts, new - 1 - n)
                got = next((j for j in range(most) if not rows[b][n + j]), most)
                at[b], rounds = n + got + 1, rounds + 1
        first = False
    return Predicted(seconds, len(accepted) * new / rounds)


def predict(v: Variant, forwards: Forwards, on_text: Acceptance, written: Written) -> Predicted | None:
    """None where nothing is predicted."""
    new = on_text.place.shape[1]
    if v.name == "plain":
        return predict_plain(forwards, new)
    if v.implementation != "eft":
        return None
    if not v.chain:  # the passes that were made
        firsts, seconds = set(), 0.0
        for p in written.watch.passes:
            follows = p.model == 1 and p.tokens == 1 and last == 1
            seconds += forwards("drafting" if follows else NAMES[p.model], p.tokens)
            last = p.model
        return Predicted(seconds, written.speculation.tokens_per_round)
    if v.name == "coupled":
        return predict_chain(forwards, on_text.place == 0, v.drafts)
    g = torch.Generator().manual_seed(0)
    runs = [
        predict_chain(forwards, torch.rand(on_text.chance.shape, generator=g) < on_text.chance, v.drafts)
        for _ in range(64)
    ]
    return Predicted(*(statistics.fmean(x) for x in zip(*runs)))


# --- a pair at a batch ---------------------------------------------------------------------------------------------


def gate(pair: Pair, found: list[Variant], batch: int, exact: bool) -> dict[str, dict]:
    """Each variant's status by its label. Raises `WrongTokens` where ours is wrong: greedily all write plain's tokens,
    with noise the coupled ones do. That is checked where ``exact``: bfloat16 rounds a longer pass in another order."""
    ours = Variant("plain", {})
    greedy, sampled = (pair.write(ours, batch, 0, GATE, s).texts for s in (generate.GREEDY, SAMPLED))
    states = {}
    for v in found:
        states[v.label] = dict(status="measured", why=None)
        try:
            same = torch.equal(pair.write(v, batch, 0, GATE, generate.GREEDY).texts, greedy)
            if v.options.get("verify") == "coupled":
                same = torch.equal(pair.write(v, batch, 0, GATE).texts, sampled) and same
        except ValueError as error:  # transformers refuses
            if v.implementation == "eft":
                raise
            states[v.label] = dict(status="absent", why=error_line(error))
            continue
        if exact and not same and v.implementation == "eft":
            raise WrongTokens(f"{v.label} does not write plain's tokens at {pair.name}, B={batch}: nothing is timed")
        if exact and not same:
            states[v.label] = dict(status="disagrees", why="greedily it writes other tokens than ours")
    return states


def take_turns(pair: Pair, found: list[Variant], batch: int, new: int, rounds: int) -> dict[str, list[Written]]:
    """Generations of every variant by its label, one a turn, with the same prompts and seeds; the order rotates."""
    written: dict[str, list[Written]] = {v.label: [] for v in found}
    for turn in range(rounds):
        at = turn % len(found)
        for v in found[at:] + found[:at]:
            written[v.label].append(pair.write(v, batch, turn, new))
    return written


def measure_batch(pair: Pair, batch: int, drafts, dtype: str, new: int, rounds: int) -> list[dict]:
    """Rows of op "pairs": one a variant."""
    found = variants(drafts, batch)
    states = gate(pair, found, batch, exact=dtype == "float32")
    timed = [v for v in found if states[v.label]["status"] == "measured"]
    written = take_turns(pair, timed, batch, new, rounds)
    made = {p.tokens for each in written.values() for w in each for p in w.watch.passes if p.tokens <= 32}
    forwards = Forwards(pair, batch, {*LENGTHS, *made}, PROMPT + new // 2)
    plain = written["plain"]
    on_text = [acceptance(pair, w.texts, turn, new) for turn, w in enumerate(plain)]
    place = torch.cat([a.place for a in on_text])
    simple = predict_plain(forwards, new)
    rows = []
    for v in found:
        row = dict.fromkeys(MEASURED)
        row.update(
            op="pairs",
            implementation=v.implementation,
            variant=v.name,
            draft_tokens=v.drafts,
            **states[v.label],
            batch=batch,
            vocab=pair.vocab,
            models=3,
            dtype=dtype,
            logits=pair.name,
            launch="eager",
            new_tokens=new,
            backend=machine.backend("cpu") if v.implementation == "eft" else None,
            cost_ratio=forwards("base", 1) / forwards("tuned", 1),
            agreement=float((place == 0).float().mean()),
            ranks=[float((place == m).float().mean()) for m in range(MAX_RUNNERS_UP + 1)],
            forward_us=forwards.table(),
        )
        row.update(dict.fromkeys(("speedup", "tokens_per_round", "predicted_speedup", "predicted_tokens_per_round")))
        row.update(dict.fromkeys(("outside_us", "round_us")))
        each = written.get(v.label, [])
        if each:
            seconds = [w.seconds for w in each]
            row.update(statistics_of(seconds), tokens_per_s=batch * new / statistics.median(seconds))
            row["speedup"] = statistics.median(p.seconds / w.seconds for p, w in zip(plain, each))
        if each and v.implementation == "eft":
            row["round_us"] = 1e6 * statistics.median(b - a for w in each for a, b in w.watch.spans())
            row["outside_us"] = 1e6 * statistics.median(s for w in each for s in w.watch.outside())
            counts = [w.speculation for w in each if w.speculation]
            if counts:
                row["acceptance"] = sum(int(s.accepted.sum()) for s in counts) / sum(int(s.drafted.sum()) for s in counts)
                row["tokens_per_round"] = batch * new * len(each) / sum(int(s.rounds.sum()) for s in counts)
            else:
                row["tokens_per_round"] = 1.0
            said = [predict(v, forwards, a, w) for a, w in zip(on_text, each)]
            row["predicted_speedup"] = statistics.median(simple.seconds / p.seconds for p in said)
            row["predicted_tokens_per_round"] = len(said) / sum(1 / p.tokens_a_round for p in said)
            row["predicted_us"] = 1e6 * statistics.median(p.seconds for p in said)
        rows.append(row)
    return rows


def pairs_of(args) -> list[tuple[str, str, object]]:
    """(what is measured, dtype, a function that makes its pair) of everything, in an order that makes each size once."""
    if args.models:
        return [(args.models[0], d, functools.partial(loaded, args.models, "--models", d)) for d in args.dtypes]
    todo = [] if args.ratios else [("family", d, functools.partial(family, d)) for d in args.dtypes]
    for ratio in args.ratios or RATIOS:
        held: dict[str, Models] = {}

        def make(ratio, acceptance, dtype, held=held):
            if not held:
                held["models"] = Models(SIZES[ratio])
            return made(ratio, held["models"].to(getattr(torch, dtype)), acceptance)

        for dtype in sorted(args.dtypes, reverse=True):  # float32 first: bfloat16 is made from it
            for a in args.acceptances:
                todo.append((f"{ratio}:1, {a:g}", dtype, functools.partial(make, ratio, a, dtype)))
    return todo


def measure(args, command: str, tell, keep) -> list[dict]:
    todo, rows, run_id = pairs_of(args), [], None
    for i, (what, dtype, make) in enumerate(todo):
        pair = make()
        for batch in args.batch:
            tell(i, len(todo), f"pairs {what} {dtype} B={batch}")
            about = machine.environment(command, "cpu") | provenance.of_a_row()
            run_id = about["run"] = run_id or about["run"]
            new = [
                dict(about, **row, threads=args.threads)
                for row in measure_batch(pair, batch, args.draft_tokens, dtype, args.new, args.rounds)
            ]
            keep(new)
            rows += new
    tell(len(todo), len(todo), "done")
    return rows


# --- time outside the models against the context -------------------------------------------------------------------


def measure_contexts(args, tell) -> list[list[str]]:
    """Lines of a table: context, B, variant, and medians over the rounds of a generation in ms."""
    models = Models(pair_models.TINY).set(pair_models.TINY_STRENGTH)
    pair = Pair("tiny", models.all, models.size.vocab)
    lines = []
    for batch in args.batch:
        found = [v for v in variants((4,), batch) if v.name in ("plain", "coupled", "tree of 2", "auto")]
        found = [v for v in found if v.implementation == "eft"]
        for v in found:
            pair.write(v, batch, 0, GATE)  # a warm-up
        for columns in args.context:
            for v in found:
                tell(0, 1, f"context {columns}, B={batch}, {v.label}")
                w = pair.write(v, batch, 1, args.new, columns=columns, caches=True).watch
                outside, caches = (1e3 * statistics.median(x) for x in (w.outside(), w.updating()))
                whole = 1e3 * statistics.median(b - a for a, b in w.spans())
                cells = [f"{x:.2f}" for x in (outside, caches, whole - outside - caches)]
                lines.append([str(columns), str(batch), v.label, str(w.rounds), *cells])
    return lines


CONTEXT_HEADER = [
    "context",
    "B",
    "variant",
    "rounds",
    "outside the models, ms a round",
    "caches inside them, ms a round",
    "the rest of the passes, ms a round",
]


# --- the command ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--models", nargs=3, metavar=("BASE", "TUNED", "REF"), help="checkpoints: folders or hub ids")
    what.add_argument("--ratios", type=int, nargs="+", choices=RATIOS, metavar="R", help="base : tuned, of 4, 10 and 20")
    what.add_argument("--quick", action="store_true", help="one small pair, in less than a minute")
    what.add_argument("--contexts", action="store_true", help="what is outside the models, against the context")
    what.add_argument("--find", action="store_true", help="print the scales of pair_models.STRENGTHS anew")
    p.add_argument("--acceptances", type=float, nargs="+", choices=ACCEPTANCES, default=list(ACCEPTANCES), metavar="A")
    p.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    p.add_argument("--batch", type=positive, nargs="+", default=[1, 8], metavar="B", help="rows at once")
    p.add_argument("--draft-tokens", type=positive, nargs="+", default=[4, 8], metavar="K", help="of coupled chains")
    p.add_argument("--new", type=positive, default=32, metavar="N", help="tokens that each row writes")
    p.add_argument("--rounds", type=positive, default=3, metavar="N", help="turns of every variant")
    p.add_argument("--threads", type=positive, default=len(machine.cores()), metavar="N", help="pinned CPU threads")
    p.add_argument("--context", type=positive, nargs="+", default=list(CONTEXTS), metavar="N", help="of --contexts")
    p.add_argument("--json", metavar="FILE", help="save the rows; refused where the sources are not the commit's")
    return p


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is an integer from 1 on")
    return int(text)


def main(argv: list[str] | None = None, tell=on_stderr) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    checkpoints.quiet_transformers()
    with machine.pinned(args.threads):
        if args.find:
            pair_models.find(print)
            return 0
        if args.contexts:
            print("\n".join(report.table(CONTEXT_HEADER, measure_contexts(args, tell))))
            return 0
        if args.quick:
            args.ratios, args.acceptances, args.dtypes = [0], [0.8], ["float32"]
            args.draft_tokens, args.new, args.rounds = [4], 16, 2
        if args.json:
            provenance.refuse_dirty()
            check_writable(args.json, "--json")
            Path(args.json).unlink(missing_ok=True)
        rows = measure(
            args,
            " ".join(["python -m benchmarks pairs", *argv]),
            tell,
            lambda new: write_rows(new, args.json, "a") if args.json else None,
        )
    shapes = newest(rows)
    print("\n".join(report.pairs_section(shapes)))
    if not args.json:
        print("not saved (--json FILE saves the rows)")
    return 0
