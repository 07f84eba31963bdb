"""Speculation on pairs of models that behave like real ones, in wall clock, beside what arithmetic says.

`python -m benchmarks pairs` makes the pairs (pair_models.py), or measures checkpoints (--models BASE TUNED REF). In one
process, in turns, with the same prompts and seeds, they write texts of random prompts by every way of `VARIANTS`.

Predicted is what follows from two measurements alone: where in the draw of the drafting model each token of the texts
of plain decoding is, and how long a pass of each model over n tokens takes by itself. The first says how many rounds
a tree of drafts needs for a text (with several rows until the last one is done), the second how long each takes. A
variant that writes other texts than plain decoding, or chooses its drafts as it goes, is predicted from the passes
that it made; "expected" says how many tokens a round it gains on average. Outside is what of a round is no model's
forward: sampling, verifying, caches, masks, Python.

--contexts measures what is outside the models against the length of the text, with models of almost no weights.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
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
from eft_kernels.decoding.trees import Tree, best, chain, size
from eft_kernels.integrations.hf.models import _remembered, cache_name
from eft_kernels.parameters import MAX_RUNNERS_UP

from . import generate, pair_models, provenance, report
from .pair_models import ACCEPTANCES, RATIOS, SIZES, STRENGTHS, Models

PROMPT, GATE = 8, 12  # tokens: of a prompt (its pass costs about what any other does), of the gate's texts
SAMPLED = dict(do_sample=True, temperature=1.0, top_k=0)
NAMES = ("base", "tuned", "ref")
LENGTHS = (1, 2, 4, 8, 16)  # tokens of the passes that are timed alone
# what is measured where the command does not say; what takes longest is measured in fewer places
MEASURED_AT = {"float32": (0.6, 0.8), "bfloat16": ACCEPTANCES}  # acceptances
EIGHT = ("", "0.8")  # acceptances of B = 8; "": a pair that was not made here
CONTEXTS = (256, 1024, 4096, 16384)

# (name, options of eft.hf.generate); K stands for each number of drafts that the command is asked for
K = "K"
VARIANTS = (
    ("plain", {}),
    ("coupled", dict(verify="coupled", draft_tokens=K)),
    ("token", dict(verify="token", draft_tokens=3)),
    ("block", dict(verify="block", draft_tokens=3)),
    ("tree of 7", dict(verify="coupled", draft_tokens=4, draft_width=3, draft_budget=7)),
    ("tree of 15", dict(verify="coupled", draft_tokens=6, draft_width=4, draft_budget=15)),
    ("auto", dict(verify="coupled", draft_tokens="auto")),
    ("auto, block", dict(verify="block", draft_tokens="auto")),
)
ASSISTED = 3  # drafts of transformers' assisted generation


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
    def label(self) -> str:
        return self.name + (f", K = {self.drafts}" if self.drafts else "")


def variants(drafts, batch: int) -> list[Variant]:
    found = []
    for name, options in VARIANTS:
        for k in drafts if K in options.values() else (None,):
            found.append(Variant(name, {n: k if x is K else x for n, x in options.items()}))
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
    _remembered.pop(models.base, None)  # what "auto" knows of these weights as they were
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
    """Seconds of a pass over n tokens after ``columns`` cached ones, of each model alone; linear in between."""

    @torch.no_grad()
    def __init__(self, pair: Pair, batch: int, columns: int):
        from transformers import DynamicCache

        self.pair, self.batch, self.columns = pair, batch, columns
        self.caches = [DynamicCache() for _ in pair.models]
        self.token = pair.prompts(batch, 0)[:, :1]
        self.seen: dict[tuple[str, int], list[float]] = {}
        for i in range(3):
            self._run(i, columns)
        self.take()
        self.seen.clear()  # that was a warm-up

    def _run(self, i: int, n: int, times: int = 1) -> float:
        model, cache = self.pair.models[i], self.caches[i]
        known = cache.get_seq_length()
        start = time.perf_counter()
        for j in range(times):
            at = torch.arange(known + j * n, known + (j + 1) * n)[None].expand(self.batch, -1)
            held = {cache_name(model): cache}
            model(self.token.expand(-1, n), position_ids=at, use_cache=True, logits_to_keep=n, **held)
        seconds = (time.perf_counter() - start) / times
        if known:
            cache.crop(-times * n)
        return seconds

    @torch.no_grad()
    def take(self) -> None:
        """Measures each pass once more (quick ones some times more), in the order of a round."""
        begin = time.perf_counter()
        for _ in range(10):
            for n in LENGTHS:
                for i in (1, 0, 2):
                    self.seen.setdefault((NAMES[i], n), []).append(self._run(i, n))
            # a draft after a draft finds the weights in the caches, where they fit
            self.seen.setdefault(("drafting", 1), []).append(self._run(1, 1, 4))
            if time.perf_counter() - begin > 0.5:
                break

    @property
    def seconds(self) -> dict[tuple[str, int], float]:
        return {key: statistics.median(times) for key, times in self.seen.items()}

    def __call__(self, name: str, n: int) -> float:
        if name == "drafting":
            return self.seconds[name, 1]
        at = min(max(bisect.bisect_left(LENGTHS, n), 1), len(LENGTHS) - 1)
        (low, a), (high, b) = ((m, self.seconds[name, m]) for m in LENGTHS[at - 1 : at + 1])
        return a + (b - a) * (n - low) / (high - low)

    def step(self) -> float:
        """A step of plain decoding: a pass of every model."""
        return sum(self(name, 1) for name in NAMES)

    def table(self) -> dict[str, dict[str, float]]:
        """Microseconds, for the row."""
        found: dict[str, dict[str, float]] = {}
        for (name, n), seconds in self.seconds.items():
            found.setdefault(name, {})[str(n)] = round(seconds * 1e6, 1)
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


def rounds_of(place: torch.Tensor, tree: Tree) -> list[Tree]:
    """The trees of the rounds until all texts are written; place: int64 [B, T], of each of their tokens in the draw of
    the drafting model. A round that all rows are near the end in has a smaller tree."""
    new, at, found = place.shape[1], [1] * len(place), [chain(0)]  # the pass over the prompt writes a token
    rows, children = place.tolist(), {}
    for slot, (parent, rank) in enumerate(zip(tree.parents, tree.ranks[1:]), 1):
        children[parent, rank] = slot
    while left := [b for b, n in enumerate(at) if n < new]:
        found.append(tree.cut(max(new - 1 - at[b] for b in left)))
        for b in left:
            slot = 0
            while at[b] < new - 1 and (slot := children.get((slot, rows[b][at[b]]))) is not None:
                at[b] += 1
            at[b] += 1  # a token more is written than drafts are accepted
    return found


def passes_of(rounds: list[Tree], prompt: int = PROMPT) -> list[tuple[int, int]]:
    """(model, tokens a row) of every pass of these rounds, the first over the prompt."""
    found = []
    for i, tree in enumerate(rounds):
        found += [(1, len(level)) for level in tree.levels] if i else [(1, prompt)]
        found += [(model, len(tree) + 1 if i else prompt) for model in (0, 2)]
    return found


def time_of(forwards: Forwards, passes) -> float:
    seconds, before = 0.0, None
    for model, tokens in passes:
        again = model == 1 and tokens == 1 and before == 1
        seconds += forwards("drafting" if again else NAMES[model], tokens)
        before = model
    return seconds


def tree_of(v: Variant, on_text: Acceptance) -> Tree:
    """The drafts of a round, where most are accepted by what was measured."""
    width, budget = v.options.get("draft_width", 1), v.options.get("draft_budget")
    if width == 1:
        return chain(v.drafts)
    shares = [float((on_text.place == rank).float().mean()) for rank in range(width)]
    shares = [min(shares[: i + 1]) for i in range(width)]
    return best(v.drafts, width, budget or size(v.drafts, width, 9999), [shares] * v.drafts)


def expected(v: Variant, on_text: Acceptance, draws: int = 64) -> float | None:
    """Tokens that a row gains in a round after the first, which is the pass over the prompt, by what is accepted on
    plain texts; None where they do not say it."""
    if v.drafts is None or v.name == "block":
        return None
    place, tree = on_text.place, tree_of(v, on_text)
    if v.options["verify"] == "token":
        chance = on_text.chance.repeat(draws, 1)
        place = (torch.rand(chance.shape, generator=torch.Generator().manual_seed(0)) >= chance).long()
    rounds = sum(len(rounds_of(row, tree)) - 1 for row in place.split(1))
    return len(place) * (place.shape[1] - 1) / rounds


def predict(
    v: Variant, forwards: Forwards, on_text: Acceptance, every: Acceptance, w: Written, plain: Written
) -> float:
    """Seconds of a generation."""
    fixed = v.options.get("verify") == "coupled" and v.drafts is not None
    if fixed and torch.equal(w.texts, plain.texts):
        return time_of(forwards, passes_of(rounds_of(on_text.place, tree_of(v, every))))
    return time_of(forwards, [p[:2] for p in w.watch.passes])


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


def take_turns(
    pair: Pair, found: list[Variant], batch: int, new: int, rounds: int
) -> tuple[dict[str, list[Written]], Forwards]:
    """Generations of every variant by its label, one a turn, with the same prompts and seeds; the order rotates.
    Passes alone are timed in every turn, too. transformers' own way takes one turn. What chooses its drafts by what it
    has seen has written a text of the same length before."""
    forwards = Forwards(pair, batch, PROMPT + new // 2)
    written: dict[str, list[Written]] = {v.label: [] for v in found}
    for v in found:
        if v.options.get("draft_tokens") == "auto":
            pair.write(v, batch, rounds, new)
    for turn in range(rounds):
        at = turn % len(found)
        for v in found[at:] + found[:at]:
            if not turn or v.implementation == "eft":
                written[v.label].append(pair.write(v, batch, turn, new))
        forwards.take()
    return written, forwards


def measure_batch(pair: Pair, batch: int, drafts, dtype: str, new: int, rounds: int, checked: dict) -> list[dict]:
    """Rows of op "pairs": one a variant. ``checked`` remembers what the gate said of a size."""
    found = variants(drafts, batch)
    key = (pair.name.partition(",")[0], dtype, batch)
    if key not in checked:
        checked[key] = gate(pair, found, batch, exact=dtype == "float32")
    states = checked[key]
    timed = [v for v in found if states[v.label]["status"] == "measured"]
    written, forwards = take_turns(pair, timed, batch, new, rounds)
    plain = written["plain"]
    on_text = [acceptance(pair, w.texts, turn, new) for turn, w in enumerate(plain)]
    every = Acceptance(*(torch.cat(x) for x in zip(*on_text)))
    place = every.place
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
            place=found.index(v),
        )
        row.update(dict.fromkeys(("speedup", "tokens_per_round", "tokens_to_expect", "predicted_us", "outside_us")))
        row.update(dict.fromkeys(("predicted_speedup", "round_us")))
        each = written.get(v.label, [])
        if each:
            seconds = [w.seconds for w in each]
            row.update(statistics_of(seconds), tokens_per_s=batch * new / statistics.median(seconds))
            row["speedup"] = statistics.median(p.seconds / w.seconds for p, w in zip(plain, each))
        if each and v.implementation == "eft":
            row["round_us"] = 1e6 * statistics.median(b - a for w in each for a, b in w.watch.spans())
            row["outside_us"] = 1e6 * statistics.median(s for w in each for s in w.watch.outside())
            if counts := [w.speculation for w in each if w.speculation]:
                accepted, drafted = (
                    sum(int(x.sum()) for x in n) for n in zip(*((s.accepted, s.drafted) for s in counts))
                )
                row["acceptance"] = accepted / drafted if drafted else None  # "auto" may draft nothing
                row["tokens_per_round"] = batch * (new - 1) * len(each) / sum(int((s.rounds - 1).sum()) for s in counts)
                row["tokens_to_expect"] = expected(v, every)
            said = [predict(v, forwards, a, every, w, p) for a, w, p in zip(on_text, each, plain)]
            row["predicted_us"] = 1e6 * statistics.median(said)
            simple = time_of(forwards, passes_of([chain(0)] * new))
            row["predicted_speedup"] = statistics.median(simple / t for t in said)
        rows.append(row)
    return rows


def pairs_of(args) -> list[tuple[str, str, object]]:
    """(what is measured, dtype, a function that makes its pair) of all, in an order that makes each size once."""
    if args.models:
        return [(args.models[0], d, functools.partial(loaded, args.models, "--models", d)) for d in args.dtypes]
    todo = [] if args.ratios else [("family", d, functools.partial(family, d)) for d in args.dtypes]
    held: dict[int, Models] = {}  # of one size at a time

    def make(ratio: int, acceptance: float, dtype: str) -> Pair:
        if ratio not in held:
            held.clear()
            held[ratio] = Models(SIZES[ratio])
        return made(ratio, held[ratio].to(getattr(torch, dtype)), acceptance)

    for ratio in args.ratios or RATIOS:
        for dtype in sorted(args.dtypes, reverse=True):  # float32 first: bfloat16 is made from it
            for a in args.acceptances or MEASURED_AT[dtype]:
                todo.append((f"{ratio}:1, {a:g}", dtype, functools.partial(make, ratio, a, dtype)))
    return todo


def measure(args, command: str, tell, keep) -> list[dict]:
    todo, rows, run_id, checked = pairs_of(args), [], None, {}
    for i, (what, dtype, make) in enumerate(todo):
        pair = make()
        for batch in args.batch or ([1, 8] if what.partition(", ")[2] in EIGHT else [1]):
            tell(i, len(todo), f"pairs {what} {dtype} B={batch}")
            about = machine.environment(command, "cpu") | provenance.of_a_row()
            run_id = about["run"] = run_id or about["run"]
            new = [
                dict(about, **row, threads=args.threads)
                for row in measure_batch(
                    pair,
                    batch,
                    args.draft_tokens,
                    dtype,
                    args.new,
                    args.rounds if batch < 8 else -(-args.rounds // 2),
                    checked,
                )
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
    todo = [(batch, columns) for batch in args.batch or [1, 8] for columns in args.context]
    for i, (batch, columns) in enumerate(todo):
        tell(i, len(todo), f"pairs context {columns} B={batch}")
        for v in variants((3,), batch):
            if v.implementation != "eft" or v.options.get("verify") in ("token", "block"):
                continue
            pair.write(v, batch, 0, GATE)  # a warm-up
            w = pair.write(v, batch, 1, args.new, columns=columns, caches=True).watch
            outside, caches = (1e3 * statistics.median(x) for x in (w.outside(), w.updating()))
            whole = 1e3 * statistics.median(b - a for a, b in w.spans())
            cells = [f"{x:.2f}" for x in (outside, caches, whole - outside - caches)]
            lines.append([str(columns), str(batch), v.label, str(w.rounds), *cells])
    tell(len(todo), len(todo), "done")
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
    what.add_argument(
        "--ratios", type=int, nargs="+", choices=RATIOS, metavar="R", help="base : tuned, of 4, 10 and 20"
    )
    what.add_argument("--quick", action="store_true", help="one small pair, in less than a minute")
    what.add_argument("--contexts", action="store_true", help="what is outside the models, against the context")
    what.add_argument("--find", action="store_true", help="print the scales of pair_models.STRENGTHS anew")
    p.add_argument("--acceptances", type=float, nargs="+", choices=ACCEPTANCES, metavar="A", help="of 0.6 0.7 0.8 0.9")
    p.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    p.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        metavar="B",
        help="rows at once (default: 1, and 8 at an acceptance of 0.8)",
    )
    p.add_argument("--draft-tokens", type=positive, nargs="+", default=[3, 7], metavar="K", help="of coupled chains")
    p.add_argument("--new", type=positive, default=32, metavar="N", help="tokens that each row writes")
    p.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="turns of every variant; half of them at B = 8"
    )
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
            args.draft_tokens, args.new, args.rounds, args.batch = [3], 16, 2, [1, 2]
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
    print("\n".join(report.table(["goal", "wanted", "measured", "verdict"], report.pairs_goals(shapes), left=1)))
    if not args.json:
        print("not saved (--json FILE saves the rows)")
    return 0
