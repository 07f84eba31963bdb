"""End to end: whole generations by the models of examples/family, ours beside what users of transformers run.

| implementation | variant | what writes |
|---|---|---|
| eft | plain, coupled, token, block | `eft_kernels.hf.generate`, by K drafts a round but for plain |
| stateless | plain | transformers' generate; a LogitsProcessor runs both small models on the whole text at every step |
| assisted | token | transformers' assisted generation, K drafts of tuned; the processor changes those too |

Every generation writes NEW tokens a row after held-out text; prompts and seeds change from round to round. First the
gate: greedily all write the same tokens, and coupled writes plain's for the same seed.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

import eft_kernels as eft
from eft_kernels.bench import device as machine
from eft_kernels.bench.inputs import FAMILY_VOCAB
from eft_kernels.bench.run import MEASURED, WrongTokens, error_line, interleave, statistics_of
from eft_kernels.cli import demo, models

from . import provenance

VARIANTS = ("plain", "coupled", "token", "block")
PROMPT, NEW, STRIDE = 32, 64, 100  # tokens: of a prompt, written after it, from one prompt to the next
GREEDY, SAMPLED = dict(do_sample=False), dict(do_sample=True, temperature=1.0, top_k=0)


class Writer(NamedTuple):
    implementation: str
    variant: str
    draft_tokens: int | None = None


def writers(drafts) -> list[Writer]:
    return [
        Writer("eft", "plain"),
        *(Writer("eft", m, k) for m in VARIANTS[1:] for k in drafts),
        Writer("stateless", "plain"),
        *(Writer("assisted", "token", k) for k in drafts),
    ]


def stateless(tuned, ref):
    """The processors that make base's generation the emulated one: both small models read the whole text each time."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Stateless(LogitsProcessor):
        def __call__(self, ids, scores):
            up, down = (m(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1] for m in (tuned, ref))
            return scores + up - down

    return LogitsProcessorList([Stateless()])


def assistance(tuned, draft_tokens: int) -> dict:
    """The options with which transformers drafts always so many tokens by ``tuned``."""
    config = tuned.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = draft_tokens, "constant"
    config.assistant_confidence_threshold = 0.0
    return dict(assistant_model=tuned)


class Family:
    """base, tuned and ref in float32, held-out text, and every writer's way to write."""

    def __init__(self, kind: str):
        folder, texts = demo.find_family(None, None)
        self.base, self.tuned, self.ref = (
            models.load_model(str(folder / name), "--family", "float32", kind) for name in ("base", "tuned-a", "ref")
        )
        tokenizer = models.load_tokenizer(str(folder / "base"), "--family")
        self.processors = stateless(self.tuned, self.ref)
        for model in (self.base, self.tuned, self.ref):
            model.generation_config.eos_token_id = None  # every text is NEW tokens long
        text = texts["a"][:40000]
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids, device=kind)
        self.prompts = ids.unfold(0, PROMPT, STRIDE)

    def write(self, writer: Writer, batch: int, turn: int, sampling: dict):
        """The new tokens [batch, NEW] of the turn's prompts and seed, and what speculation did (None: not known)."""
        rows = (torch.arange(batch) + turn * batch) % len(self.prompts)
        ids = self.prompts[rows.to(self.prompts.device)]
        options = dict(sampling, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0)
        if writer.implementation == "eft":
            if writer.variant != "plain":
                options.update(verify=writer.variant, draft_tokens=writer.draft_tokens)
            out = self.base.generate(
                ids,
                **options,
                custom_generate=eft.hf.generate,
                tuned=self.tuned,
                ref=self.ref,
                seed=turn,
                return_dict_in_generate=True,
            )
            return out.sequences[:, PROMPT:], out.speculation
        torch.manual_seed(turn)
        if writer.implementation == "assisted":
            options.update(assistance(self.tuned, writer.draft_tokens))
        return self.base.generate(ids, **options, logits_processor=self.processors)[:, PROMPT:], None


def gate(family: Family, batch: int, drafts) -> dict[Writer, dict]:
    """Each writer's status: "measured" where it may be timed. Raises `WrongTokens` where ours is wrong."""
    greedy, sampled = (family.write(Writer("eft", "plain"), batch, 0, s)[0] for s in (GREEDY, SAMPLED))
    states = {}
    for w in writers(drafts):
        states[w] = dict(status="measured", why=None)
        try:
            same = torch.equal(family.write(w, batch, 0, GREEDY)[0], greedy)
            if w.variant == "coupled":
                same = same and torch.equal(family.write(w, batch, 0, SAMPLED)[0], sampled)
        except ValueError as error:  # transformers refuses
            if w.implementation == "eft":
                raise
            states[w] = dict(status="absent", why=error_line(error))
            continue
        if not same and w.implementation == "eft":
            raise WrongTokens(
                f"{w.variant} with K = {w.draft_tokens} does not write plain's tokens at B={batch}: nothing is timed"
            )
        if not same:
            states[w] = dict(status="disagrees", why="greedily it writes other tokens than ours")
    return states


def timer(family: Family, writer: Writer, batch: int, told: list):
    """A function of n: seconds of one generation over n; what speculation did is appended to ``told``."""
    turn = 0

    def measure(n):
        nonlocal turn
        start = time.perf_counter()
        for _ in range(n):
            told.append(family.write(writer, batch, turn, SAMPLED)[1])
            turn += 1
        if family.base.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    return measure


def measure(rounds: int = 5, threads=(1,), batches=(1, 8), drafts=range(1, 9), tell=None, command: str = "") -> list:
    """Rows of op "generate"; ``threads``: numbers of CPU threads, None is the GPU. median_us is of one generation of
    all rows of the batch. Raises `WrongTokens` on a red gate."""
    rows, tell, run_id = [], tell or (lambda *_: None), None
    todo = [(n, batch) for n in threads for batch in batches]
    for i, (n, batch) in enumerate(todo):
        kind = "cuda" if n is None else "cpu"
        tell(i, len(todo), f"generate B={batch} " + ("cuda" if n is None else f"{n} thread(s)"))
        about = machine.environment(command, kind) | provenance.of_a_row()
        run_id = about["run"] = run_id or about["run"]
        with machine.pinned(n):
            rows += [dict(about, **row, threads=n) for row in measure_batch(Family(kind), batch, drafts, rounds)]
    tell(len(todo), len(todo), "done")
    return rows


def measure_batch(family: Family, batch: int, drafts, rounds: int) -> list[dict]:
    states = gate(family, batch, drafts)
    told = {w: [] for w, state in states.items() if state["status"] == "measured"}
    times, rows = interleave({w: timer(family, w, batch, seen) for w, seen in told.items()}, rounds), []
    for w, state in states.items():
        row = dict.fromkeys(MEASURED)
        row.update(
            op="generate",
            **w._asdict(),
            **state,
            batch=batch,
            vocab=FAMILY_VOCAB,
            models=3,
            dtype="float32",
            logits="family",
            launch="eager",
            new_tokens=NEW,
        )
        if w.implementation == "eft":
            row["backend"] = machine.backend(family.base.device.type)
        if w in times:
            t, seen = times[w], [s for s in told[w] if s]
            row.update(statistics_of(t), tokens_per_s=batch * NEW / statistics.median(t))
            if seen:
                row["acceptance"] = sum(int(s.accepted.sum()) for s in seen) / sum(int(s.drafted.sum()) for s in seen)
        rows.append(row)
    return rows
