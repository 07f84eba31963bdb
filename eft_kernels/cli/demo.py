"""`eft-kernels demo`: the example family offline: what is recovered, how fast, what the models write, speculation."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import expand, read_text
from .models import Family, check_folder, load_model, load_tokenizer, set_threads, text_of
from .score import Emulation, Score, Window, recovered, score, windows
from .term import BOLD, CYAN, DIM, GREEN, YELLOW, Progress, Refused, beside, heading, paint, table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..decoding import Speculation
    from ..integrations.hf.models import GenerativeModel

Models = dict[str, "GenerativeModel"]  # by the names of their folders
NAMES = ("ref", "tuned-a", "tuned-b", "base", "large-a", "large-b")
STYLES = {"a": "King James Bible", "b": "Jane Austen"}
PROMPTS = {"a": "And the king said unto", "b": "She had been so much"}
BOTH = "The young man"
CONTEXT = 256
UNIT_END = "\n\f\n"  # between the chapters of a held-out file
Run = tuple[str, str]  # the method, and K
RUNS: dict[Run, dict[str, Any]] = {
    ("plain", ""): {},
    **{("coupled", f"{k}"): dict(draft_tokens=k) for k in (2, 4, 8)},
    ("coupled, a tree", "4"): dict(draft_tokens=4, draft_width=2, draft_budget=8),
    ("coupled", "auto"): dict(draft_tokens="auto"),
    **{(m, f"{k}"): dict(draft_tokens=k, verify=m) for m in ("token", "block") for k in (2, 4)},
}
PLAIN, AUTO = ("plain", ""), ("coupled", "auto")


def find_family(given: str | None, heldout: str | None) -> tuple[Path, dict[str, str]]:
    """The models' folder and each style's held-out text."""
    if given:
        folder = expand(given)
    else:
        places = [p / "examples/family/weights" for p in (Path(__file__).resolve().parents[2], Path.cwd())]
        found = next((p for p in places if p.is_dir()), None)
        if found is None:
            raise Refused(
                "the example family is not here: run it in a checkout (examples/family/weights) or name its "
                "folder with --family"
            )
        folder = found
    for name in NAMES:
        if not (folder / name).is_dir():
            raise Refused(f"--family {folder}: no folder {name} in it; expected are {', '.join(NAMES)}")
        check_folder(str(folder / name), "--family")
    texts = expand(heldout) if heldout else folder.parent / "heldout"
    for style in STYLES:
        if not (texts / f"{style}.txt").is_file():
            raise Refused(f"--heldout {texts}: no file {style}.txt in it")
    return folder, {style: read_text(str(texts / f"{style}.txt"), "--heldout") for style in STYLES}


def size(model: GenerativeModel) -> str:
    n = sum(p.numel() for p in model.parameters())
    return f"{n / 1e6:.1f}M"


def family_of(models: Models, tuned: list[str], tokenizer: PreTrainedTokenizerBase) -> Family:
    from ..integrations.hf import logits_width

    base = models["base"]
    return Family(base, [models[name] for name in tuned], models["ref"], tokenizer, logits_width(base))


def alone(
    model: GenerativeModel, ids: list[int], seed: int, new_tokens: int, temperature: float, end: int
) -> list[int]:
    """What one model writes on its own, with the noise that `eft.hf.generate` uses for the same seed."""
    import torch

    from .. import sample
    from ..integrations.hf import cache_name

    out: list[int] = []
    cache, name = None, cache_name(model)
    step = torch.tensor([ids])
    for position in range(new_tokens):
        o = model(input_ids=step, use_cache=True, **{name: cache})
        cache = getattr(o, name)
        token = sample(
            [o.logits[:, -1]], [1.0], temperature=temperature, seed=seed, position=position, logprobs=False
        ).tokens
        out.append(int(token))
        if out[-1] == end:
            break
        step = token[:, None]
    return out


def emulate(
    family: Family, ids: list[int], seed: int, new_tokens: int, **settings: Any
) -> tuple[list[int], Speculation | None, float]:
    """`generate` of the emulated model: new tokens, what speculation did (None without) and seconds."""
    import torch

    from .. import hf

    tuned = family.tuned if len(family.tuned) > 1 else family.tuned[0]
    start = time.perf_counter()
    out = family.base.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        custom_generate=hf.generate,
        tuned=tuned,
        ref=family.ref,
        seed=seed,
        do_sample=True,
        top_k=0,
        max_new_tokens=new_tokens,
        pad_token_id=family.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        **settings,
    )
    return out.sequences[0, len(ids) :].tolist(), out.speculation, time.perf_counter() - start


def show_texts(models: Models, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
    heading("2  What they write")
    end, temperature = tokenizer.eos_token_id, 0.7

    def told(ids: list[int]) -> str:
        text = text_of(ids, tokenizer).strip()
        return "".join(c if c.isprintable() or c == "\n" else " " for c in text)  # nothing that moves the cursor

    for style, prompt in PROMPTS.items():
        ids = tokenizer(prompt).input_ids
        family = family_of(models, [f"tuned-{style}"], tokenizer)
        with Progress("writing", 4) as progress:
            texts = []
            for name in ("base", f"tuned-{style}", None, f"large-{style}"):
                new = (
                    alone(models[name], ids, args.seed, args.new_tokens, temperature, end)
                    if name
                    else emulate(family, ids, args.seed, args.new_tokens, temperature=temperature)[0]
                )
                texts.append(told(new))
                progress.step()
        print(f"\n  style {style} ({STYLES[style]}), temperature {temperature}: {paint(prompt + ' ...', CYAN)}")
        print(beside(["base (large)", f"tuned-{style} (small)", "emulated", "really fine-tuned"], texts), flush=True)

    ids = tokenizer(BOTH).input_ids
    family = family_of(models, ["tuned-a", "tuned-b"], tokenizer)
    with Progress("writing", 3) as progress:
        texts = []
        for lam in (1.0, 0.5, 0.0):
            texts.append(told(emulate(family, ids, args.seed, args.new_tokens, temperature=temperature, lam=lam)[0]))
            progress.step()
    print(f"\n  both styles, mixed while decoding: {paint(BOTH + ' ...', CYAN)}")
    print(beside(["all a", "half a, half b", "all b"], texts), flush=True)


def heldout_windows(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[Window]:
    """The first ``tokens`` of the chapters in a row, each closed by the end token, in windows that do not overlap."""
    ids: list[int] = []
    for unit in text.rstrip("\n").split(UNIT_END):
        ids += tokenizer(unit, add_special_tokens=False, verbose=False).input_ids + [tokenizer.eos_token_id]
        if len(ids) >= tokens:
            break
    ids = ids[: min(len(ids), tokens) // CONTEXT * CONTEXT]
    return windows(ids, tokenizer.bos_token_id, CONTEXT, CONTEXT)


def scores_of(
    models: Models, tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], args: argparse.Namespace
) -> dict[str, dict[str, Score]]:
    """Of every style, each model's and the emulated one's score on held-out text."""
    from .. import upscale

    scores = {}
    for style in STYLES:
        rows = heldout_windows(texts[style], tokenizer, args.heldout_tokens)
        small = f"tuned-{style}"
        emulated: Emulation = (["base", small, "ref"], upscale(), {})
        scores[style] = score(
            {n: models[n] for n in ("base", small, "ref", f"large-{style}")},
            rows,
            {"emulated": emulated},
            label=f"scoring style {style}",
        )
    return scores


def share_of(style: str, s: dict[str, Score]) -> float | None:
    return recovered(s["base"].nats, s["emulated"].nats, s[f"large-{style}"].nats)


def time_of_a_step(threads: int) -> tuple[float, float, str]:
    """Microseconds of our sampling step and of eager PyTorch's, and the shape; nothing is timed on wrong tokens."""
    from ..bench import device, shapes
    from ..bench import run as runs
    from ..bench.baselines import BASELINES

    shape = shapes.Shape(threads=threads)
    both = [b for b in (*shapes.OURS, *BASELINES) if b.name in ("eft", "eager")]
    try:
        with Progress("timing a sampling step", 1), device.pinned(threads):
            sets, problem = runs.inputs_for(shape), shapes.problem(shape)
            runs.gate(shape, sets[:1], both[0])
            timers = {
                b.name: device.timer(b.make(shape.op, shape.variant, problem), sets, shape.device, shape.launch)
                for b in both
            }
            for timer in timers.values():
                timer(1)
            times = runs.interleave(timers, shape.rounds)
    except runs.WrongTokens as error:
        print(f"eft-kernels demo: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    ours, eager = (statistics.median(times[b.name]) * 1e6 for b in both)
    return (
        ours,
        eager,
        (
            f"{shape.models} models, {shape.vocab} tokens, {shape.dtype}, one row, "
            f"{threads} thread{'s' if threads > 1 else ''}"
        ),
    )


def times_as_fast(ours: float, other: float) -> str:
    ratio = other / ours
    return f"{ratio:.0f} times faster than" if ratio >= 10 else f"{ratio:.1f} times as fast as"


def shown(us: float) -> str:
    return f"{us:.3g} us" if us < 999.5 else f"{us / 1e3:.3g} ms"


def show_result(scores: dict[str, dict[str, Score]], step: tuple[float, float, str]) -> None:
    heading("1  The result")
    shares = {style: share_of(style, s) for style, s in scores.items()}
    told = " and ".join(
        f"{share:.0%} ({STYLES[style]})" if share is not None else f"nothing ({STYLES[style]})"
        for style, share in shares.items()
    )
    good = all(share is not None and share > 0 for share in shares.values())
    print("  " + paint(f"Fine-tuning only the small model recovers {told}", BOLD, GREEN if good else YELLOW))
    print("  of what really fine-tuning the large one gains on held-out text.")
    ours, eager, shape = step
    print(
        "  "
        + paint(
            f"A sampling step takes {shown(ours)}: {times_as_fast(ours, eager)} eager PyTorch ({shown(eager)})",
            BOLD,
            GREEN if eager > ours else YELLOW,
        )
    )
    print(f"  on this machine ({shape}).\n")
    lines = []
    for style, s in scores.items():
        names = ("ref", "base", f"tuned-{style}", "emulated", f"large-{style}")
        share = shares[style]
        lines.append(
            [
                f"{style} ({STYLES[style]})",
                f"{s['base'].tokens}",
                *(f"{s[n].perplexity:.2f}" for n in names),
                "-" if share is None else f"{share:.0%}",
            ]
        )
    print(
        table(
            [
                "perplexity on held-out text",
                "tokens",
                "ref",
                "base",
                "tuned",
                "emulated",
                "large, fine-tuned",
                "gap recovered",
            ],
            lines,
        )
    )
    print(paint("  lower is better; gap recovered: (base - emulated) / (base - fine-tuned) in nats per token", DIM))
    for style, s in scores.items():
        for other in ("base", f"tuned-{style}"):
            gain = s[other].nats - s["emulated"].nats
            if gain <= 0:
                verdict = f"style {style}: emulation is NOT better than {other} ({gain:+.3f} nats per token)"
                print("  " + paint(verdict, YELLOW))


def show_speed(
    models: Models, tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], args: argparse.Namespace
) -> None:
    heading("3  Speculation: the small tuned model drafts K tokens, the large one checks them at once")
    family = family_of(models, ["tuned-a"], tokenizer)
    chapters = texts["a"].split(UNIT_END)[:4]
    prompts = [tokenizer(chapter, verbose=False).input_ids[:33] for chapter in chapters]
    seconds = dict.fromkeys(RUNS, 0.0)
    written: dict[Run, list[list[int]]] = {r: [] for r in RUNS}
    stats: dict[Run, list[Speculation]] = {r: [] for r in RUNS}
    with Progress("timing", len(prompts) * len(RUNS)) as progress:
        for seed, ids in enumerate(prompts, args.seed):
            for run_, settings in RUNS.items():  # in turn, so that a busy machine hurts all alike
                text, spec, took = emulate(family, ids, seed, args.new_tokens, temperature=1.0, **settings)
                seconds[run_] += took
                written[run_].append(text)
                if spec is not None:
                    stats[run_].append(spec)
                progress.step(f"timing {run_[0]}{f', K = {run_[1]}' if run_[1] else ''}")
    lines, speeds = [], {r: sum(map(len, written[r])) / seconds[r] for r in RUNS}  # tokens/s
    for run_ in RUNS:
        shares = ["", "", "1"]
        if stats[run_]:
            rounds, drafted, accepted, emitted = (
                sum(int(getattr(s, name).sum()) for s in stats[run_])
                for name in ("rounds", "drafted", "accepted", "emitted")
            )
            shares = [
                f"{drafted / max(1, rounds):.1f}",
                f"{accepted / drafted:.0%}" if drafted else "-",
                f"{emitted / max(1, rounds):.2f}",
            ]
        lines.append([*run_, *shares, f"{speeds[run_]:.0f}", f"{speeds[run_] / speeds[PLAIN]:.2f}x"])
    best = max(RUNS, key=lambda r: speeds[r])
    header = ["method", "K", "drafts a round", "accepted", "tokens a round", "tokens/s", "against plain"]
    print(table(header, lines, best=list(RUNS).index(best)))
    same = all(written[r] == written[PLAIN] for r in RUNS if r[0].startswith("coupled"))
    print(
        "  "
        + paint(
            f"coupled wrote {'exactly the tokens' if same else 'NOT the tokens'} of plain decoding with every number "
            "and shape of drafts",
            GREEN if same else YELLOW,
        )
    )
    if best == PLAIN:
        print(
            "  "
            + paint("speculation does NOT pay here: with models this small a draft costs nearly what it saves", YELLOW)
        )
    if stats[AUTO]:
        print(f"  auto expects {stats[AUTO][-1].expected:.2f} times the speed of rounds without drafts")
    print(paint(f"  {len(prompts)} held-out openings of style a, {args.new_tokens} tokens each, temperature 1", DIM))


def run(args: argparse.Namespace) -> int:
    folder, texts = find_family(args.family, args.heldout)
    start = time.perf_counter()
    set_threads(args.threads)
    import torch

    from ..dispatch import backends

    print(paint("eft-kernels: run a large model as if you had fine-tuned it, by fine-tuning a small one", BOLD))
    with Progress("loading transformers", len(NAMES)) as progress:
        models = {}
        for name in NAMES:
            models[name] = load_model(str(folder / name), "--family", "float32")
            progress.step(f"loaded {name}")
    tokenizer = load_tokenizer(str(folder / "base"), "--family")
    if tokenizer is None:
        raise Refused(f"--family {folder}: no tokenizer in {folder / 'base'}")
    here = ", ".join(n for n, b in backends().items() if b["available"])
    print(
        f"  small: ref, tuned-a, tuned-b ({size(models['ref'])} parameters each); large: base, large-a, large-b "
        f"({size(models['base'])})\n  loaded in {time.perf_counter() - start:.1f} s; backends here: {here}; "
        f"{torch.get_num_threads()} thread(s); seed {args.seed}"
    )
    with torch.inference_mode():
        show_result(scores_of(models, tokenizer, texts, args), time_of_a_step(args.threads))
        show_texts(models, tokenizer, args)
        show_speed(models, tokenizer, texts, args)
    print(f"\n  {time.perf_counter() - start:.0f} s in all. Next, a prompt of your own:\n")
    print(next_command(folder))
    return 0


def next_command(family: Path) -> str:
    """How to go on, as one types it here."""

    def here(path: str | Path) -> str:
        return shlex.quote(os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path))

    script = Path(sys.executable).with_name("eft-kernels")
    program = (
        "eft-kernels"
        if shutil.which("eft-kernels")
        else here(script)
        if script.is_file()
        else f"{here(sys.executable)} -m eft_kernels"
    )
    names = {"base": "base", "tuned": "tuned-a", "ref": "ref"}
    models = " ".join(f"--{option} {here(family / name)}" for option, name in names.items())
    return f"  {program} generate {models} \\\n    --temperature 0.7 --draft-tokens 4 --prompt 'In the beginning'"
