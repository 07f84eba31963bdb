"""Base, tuned and ref in llama.cpp as one model that writes text."""

from __future__ import annotations

import codecs
import itertools
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...combination import Weights, interpolate, upscale
from ...decoding import (
    Decoded,
    Drafts,
    NewTokens,
    Prompt,
    Speculation,
    Target,
    finished,
    plain_steps,
    speculative_rounds,
)
from ...decoding.drafts import MAX_DRAFTS
from ...ops import row_seeds, sample
from ...parameters import DRAFTED, METHODS, NAMES
from ...token_bias import penalties
from .model import Model

Source = str | os.PathLike[str] | Model
DRAFT = 1  # the (first) tuned model drafts


class InvalidScoresError(RuntimeError):
    """NaN, +inf or no token left: the text ends there. ``written``: what there is of it."""

    def __init__(self, written: Written):
        super().__init__(f"invalid scores (NaN, +inf or no token left) at step {len(written.ids)}; the text ends there")
        self.written = written


@dataclass
class Written:
    """A text that was written."""

    ids: list[int]  # new tokens, with the one that ended the text
    text: str  # without special tokens
    ended: bool  # by an end token; False: max_new_tokens were written
    speculation: Speculation | None  # of the one row


class EmulatedModel:
    """The emulated model of GGUF files: [base, tuned, ref], or [base, tuned_a, tuned_b, ref] to mix two behaviours.

    Args:
      base, tuned, ref: paths, or `Model` objects with settings of their own. tuned: one, or a list of two.
      vocab_size: the first ids that the models share. None: the shortest vocabulary, where longer ones are padding.
      settings: of every `Model` that is given by its path: n_ctx, n_threads, gpu_layers, ...

    Raises: ValueError where the models' tokens differ, or tuned and ref are one file.

    Prompts are tokenized by the (first) tuned model, as is its chat template. A text ends with the end tokens of any
    model. One text is written at a time: a second one ends the first.
    """

    def __init__(
        self,
        base: Source,
        tuned: Source | Sequence[Source],
        ref: Source,
        *,
        vocab_size: int | None = None,
        **settings: Any,
    ):
        both: list[Source] = [tuned] if isinstance(tuned, (str, os.PathLike, Model)) else list(tuned)
        if len(both) not in (1, 2):
            raise ValueError(f"tuned: got {len(both)} models, allowed are one or two")
        given = [base, *both, ref]
        self.names = ["base", *(["tuned"] if len(both) == 1 else ["tuned_a", "tuned_b"]), "ref"]
        own = [m for m in given if isinstance(m, Model)]
        if len({id(m) for m in own}) < len(own):
            raise ValueError("base, tuned, ref: a Model reads one text; load the file once for each")
        if settings and len(own) == len(given):
            raise ValueError(f"{next(iter(settings))}: goes with models given by their path")
        paths = [m.path if isinstance(m, Model) else os.path.expanduser(os.fsdecode(m)) for m in given]
        for path in paths[1:-1]:
            if os.path.exists(path) and os.path.exists(paths[-1]) and os.path.samefile(path, paths[-1]):
                raise ValueError(f"tuned: {path} is ref's file; the two would cancel and leave the base model alone")
        self.models: list[Model] = []
        loaded: list[Model] = []
        try:
            for m in given:
                self.models.append(m if isinstance(m, Model) else Model(m, **settings))
                if not isinstance(m, Model):
                    loaded.append(self.models[-1])
            self.vocab_size = shared_vocabulary(self.models, self.names, vocab_size)
        except BaseException:
            for model in loaded:
                model.close()
            raise
        self.tokenizer = self.models[DRAFT]
        self.ends = sorted({i for m in self.models for i in m.ends if i < self.vocab_size})
        self.n_ctx = min(m.n_ctx for m in self.models)
        self._turn = 0  # of the text that is being written

    def close(self) -> None:
        """Frees the models; every later use raises ValueError."""
        for model in self.models:
            model.close()

    def __enter__(self) -> EmulatedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- prompts ------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool = True, parse: bool = False) -> list[int]:
        """The ids of a text, see `Model.tokenize`."""
        return self.tokenizer.tokenize(text, special=special, parse=parse)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation in the tuned model's chat template, up to where the answer begins.

        messages: {"role": ..., "content": ...} each. Needs jinja2. ValueError without a template, or where it fails.
        """
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self.tokenizer.chat_template
        if template is None:
            raise ValueError(f"{self.tokenizer.path}: has no chat template")

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        tokens = {f"{name}_token": self.tokenizer.special_text(name) for name in ("bos", "eos")}
        try:
            text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)
        except Exception as error:  # a template may refuse what it likes
            raise ValueError(f"{self.tokenizer.path}: its chat template fails: {error}") from error
        return self.tokenize(text, special=False, parse=True)

    # --- texts --------------------------------------------------------------------------------------------------------

    def tokens(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        weights: Weights | Sequence[float] | None = None,
        seed: int | None = None,
        draft_tokens: int = 0,
        verify: str = "coupled",
        eos: Sequence[int] = (),
        presence: float = 0.0,
        frequency: float = 0.0,
        repetition: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        **sampling: float,
    ) -> Generator[int, None, Written]:
        """The tokens that follow a prompt, one by one; the generator's value in the end is `Written`.

        Args:
          prompt: a text, or ids (those of `chat`, say).
          weights: `upscale()` by default, `interpolate()` with two tuned models; or as many numbers as models.
          seed: the same seed writes the same text; None draws one.
          draft_tokens: tokens that the tuned model drafts a round, for all models to verify in one pass; 0 is off.
          verify: "coupled" (the tokens of plain decoding), "token" or "block", see `eft_kernels.verify`.
          eos: more ids that end a text.
          presence, frequency, repetition, logit_bias: see `eft_kernels.penalties`.
          sampling: temperature, top_k, top_p, min_p, typical_p, upscale_top_p, see `eft_kernels.sample`.

        Raises: ValueError naming the argument, before anything is computed; InvalidScoresError; RuntimeError where
        llama.cpp fails.
        """
        ids = self._prompt(prompt, max_new_tokens)
        target = self._target(weights, seed, sampling, presence, frequency, repetition, logit_bias, len(ids))
        self._check_speculation(draft_tokens, verify)
        ends = sorted({*self.ends, *self._ids("eos", eos)})
        text = Prompt(torch.tensor([ids]), torch.zeros(1, dtype=torch.int64), max_new_tokens, ends)
        self._turn += 1
        readers = [Reader(self, i, copy=draft_tokens > 0 and i == DRAFT) for i in range(len(self.models))]
        if draft_tokens:
            steps = speculative_rounds(
                readers, target, text, draft=DRAFT, drafts=Drafts(min(draft_tokens, max_new_tokens)), method=verify
            )
        else:
            steps = plain_steps(readers, target, text)
        return self._write(steps, self._turn, len(ids), ends)

    def stream(self, prompt: str | Sequence[int], **arguments: Any) -> Generator[str, None, Written]:
        """The text as it is written, in pieces that are whole characters; otherwise as `tokens`."""
        return self._pieces(self.tokens(prompt, **arguments), {*self.ends, *arguments.get("eos", ())})

    def generate(
        self, prompt: str | Sequence[int], *, on_text: Callable[[str], object] | None = None, **arguments: Any
    ) -> Written:
        """The whole text, whose pieces `on_text` is called with as they come; otherwise as `tokens`."""
        return finished(self.stream(prompt, **arguments), on_text)

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return b"".join(map(self.tokenizer.piece, ids)).decode("utf-8", "replace")

    def check_turn(self, turn: int) -> None:
        """RuntimeError where another text was begun since."""
        if turn != self._turn:
            raise RuntimeError("another text was begun with these models; this one cannot go on")

    def _write(self, steps: NewTokens, turn: int, prompt: int, ends: list[int]) -> Generator[int, None, Written]:
        self.check_turn(turn)
        for model in self.models:
            model.reset()
        while True:
            try:
                tokens, kept = next(steps)
            except StopIteration as end:
                done: Decoded = end.value
                break
            yield from tokens[0, : kept[0]].tolist()
        ids = done.sequences[0, prompt : prompt + int(done.lengths[0])].tolist()
        ended = bool(ids) and ids[-1] in ends
        written = Written(ids, self.text(ids[:-1] if ended else ids), ended, done.speculation)
        if done.failed:
            raise InvalidScoresError(written)
        return written

    def _pieces(self, tokens: Generator[int, None, Written], ends: set[int]) -> Generator[str, None, Written]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            try:
                token = next(tokens)
            except StopIteration as end:
                written: Written = end.value
                break
            text = decoder.decode(b"" if token in ends else self.tokenizer.piece(token))
            if text:
                yield text
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest
        return written

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _prompt(self, prompt: str | Sequence[int], max_new_tokens: int) -> list[int]:
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, allowed is an integer > 0")
        ids = self._ids("prompt", self.tokenize(prompt) if isinstance(prompt, str) else prompt)
        if not ids:
            raise ValueError("prompt: holds no token")
        if len(ids) + max_new_tokens > self.n_ctx:
            raise ValueError(
                f"prompt: got {len(ids)} tokens and max_new_tokens={max_new_tokens}, allowed are {self.n_ctx} "
                "together, the shortest context of the models (n_ctx)"
            )
        return ids

    def _ids(self, name: str, ids: Sequence[int]) -> list[int]:
        found = list(ids)
        for i in found:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise ValueError(f"{name}: got {i!r}, allowed is an id from 0 to {self.vocab_size - 1}")
        return found

    def _target(
        self,
        weights: Weights | Sequence[float] | None,
        seed: int | None,
        sampling: Mapping[str, float],
        presence: float,
        frequency: float,
        repetition: float,
        logit_bias: Mapping[int, float] | None,
        prompt: int,
    ) -> Target:
        if weights is None:
            weights = upscale() if len(self.models) == 3 else interpolate()
        elif not isinstance(weights, Weights):
            weights = Weights(weights)
        for name in sampling:
            if name not in NAMES:
                raise ValueError(f"{name}: unknown; allowed are {', '.join(NAMES)}")
        drafted = {p.name for p in DRAFTED}
        filters = {name: x for name, x in sampling.items() if name in drafted}
        combining = {name: x for name, x in sampling.items() if name not in drafted}
        given = {} if seed is None else {"seed": seed, "position": 0}
        # checks all of them by the names that the caller used
        sample([torch.zeros(1, 2)] * len(self.models), weights, **given, **sampling)  # type: ignore[arg-type]
        if seed is None:
            seed = int(torch.randint(-(1 << 63), (1 << 63) - 1, (1,)))
        penalty: dict[str, Any] = dict(
            presence=presence, frequency=frequency, repetition=repetition, logit_bias=logit_bias
        )

        def penalised(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            bias = penalties(ids[:, :prompt], ids[:, prompt:], logits=[scores], weights=[1.0], **penalty)
            known = (bias.ids >= 0) & (bias.ids < scores.shape[1])
            return scores.scatter_add(1, torch.where(known, bias.ids, 0), torch.where(known, bias.values, 0.0))

        used = presence != 0 or frequency != 0 or repetition != 1 or bool(logit_bias)
        if used:
            penalised(torch.zeros(1, prompt, dtype=torch.int64), torch.zeros(1, 2))
        return Target(
            weights, row_seeds(seed, 1), filters, combining, self.vocab_size, process=penalised if used else None
        )

    def _check_speculation(self, draft_tokens: int, verify: str) -> None:
        if type(draft_tokens) is not int or not 0 <= draft_tokens <= MAX_DRAFTS:
            raise ValueError(f"draft_tokens: got {draft_tokens!r}, allowed is 0 to {MAX_DRAFTS}")
        if verify not in METHODS:
            raise ValueError(f"verify: got {verify!r}, allowed are {', '.join(METHODS)}")
        if verify != "coupled" and not draft_tokens:
            raise ValueError(f"verify: got {verify!r}, allowed is 'coupled' without draft_tokens")
        for name, model in zip(self.names, self.models) if draft_tokens else ():
            if model.recurrent:
                raise ValueError(
                    f"draft_tokens: {name} ({model.path}) is recurrent, its memory cannot take back rejected tokens; "
                    "use draft_tokens=0"
                )
            if draft_tokens + 1 > model.n_batch:
                raise ValueError(
                    f"draft_tokens: got {draft_tokens}, allowed is up to {model.n_batch - 1}, n_batch - 1 of {name}"
                )


class Reader:
    """A `Model` as `eft_kernels.decoding` reads it: one row, whose text is the owner's newest."""

    def __init__(self, owner: EmulatedModel, place: int, copy: bool):
        self.owner, self.model, self.turn = owner, owner.models[place], owner._turn
        self.copy = copy  # the drafting model's logits are kept over passes, which overwrite them

    def __call__(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, keep: int
    ) -> torch.Tensor:
        self.owner.check_turn(self.turn)
        logits = self.model.read(ids[0].tolist(), keep)
        return (logits.clone() if self.copy else logits)[None]

    def crop(self, count: int) -> None:
        self.owner.check_turn(self.turn)
        self.model.forget(count)

    def realign(self, columns: torch.Tensor) -> None:
        raise AssertionError("one row never moves")


def shared_vocabulary(models: Sequence[Model], names: Sequence[str], vocab_size: int | None) -> int:
    """How many ids the models share; ValueError unless these mean the same, and longer vocabularies are padding.

    A token that was added (a chat model's) may have the place of another added or reserved one.
    """
    shortest = min(m.n_vocab for m in models)
    if vocab_size is not None and (type(vocab_size) is not int or not 1 <= vocab_size <= shortest):
        raise ValueError(
            f"vocab_size: got {vocab_size!r}, allowed is up to {shortest}, the shortest model's vocabulary"
        )
    shared = vocab_size or shortest
    for (a, one), (b, other) in itertools.combinations(zip(names, models), 2):
        if one.texts[:shared] == other.texts[:shared]:
            continue
        differing = [i for i in range(shared) if one.texts[i] != other.texts[i]]
        moved = {one.texts[i] for i in differing} & {other.texts[i] for i in differing}
        for i in differing:
            if {one.texts[i], other.texts[i]} & moved or not (one.added(i) and other.added(i)):
                raise ValueError(
                    f"vocabularies: id {i} is {_shown(one.texts[i])} for {a} and {_shown(other.texts[i])} for {b}; "
                    "allowed are models that share their tokens"
                )
    for name, model in zip(names, models):
        own = next((i for i in range(shared, model.n_vocab) if not model.padding(i)), None)
        if vocab_size is None and own is not None:
            raise ValueError(
                f"vocabularies: {name} has tokens from id {shared} on ({_shown(model.texts[own])}), which another "
                "model lacks; give vocab_size to leave them out"
            )
    return shared


def _shown(text: bytes) -> str:
    return repr(text.decode("utf-8", "replace"))
