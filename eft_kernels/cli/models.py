"""Loading the models and tokenizers that the command line names, with one clear line for all that can be wrong."""

from __future__ import annotations

import argparse
import json
import os
import socket
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from ..integrations.composition import ADAPTER
from .files import argument_text, expand
from .term import Refused

if TYPE_CHECKING:  # they take seconds to import
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..integrations.hf.models import GenerativeModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
)


@dataclass
class Family:
    """The models of one emulation, in the order of the weights: base, tuned (one or two), ref."""

    base: GenerativeModel
    tuned: list[GenerativeModel]
    ref: GenerativeModel
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # ids that the models share
    ends: list[int] = field(default_factory=list)  # ids that end a text

    @property
    def models(self) -> list[GenerativeModel]:
        return [self.base, *self.tuned, self.ref]

    @property
    def context(self) -> int | None:
        """The shortest context of the models, None when no config says."""
        limits = [n for m in self.models if (n := getattr(m.config.get_text_config(), "max_position_embeddings", None))]
        return min(limits, default=None)


def quiet_transformers() -> ModuleType:
    """transformers, imported now (it takes seconds) and without its progress bars and advice."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as error:
        raise Refused(f"transformers is needed: pip install 'eft-kernels[hf]' ({error})") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def check_folder(name: str, option: str) -> None:
    """Refuses what is plainly no model folder; anything else may be a hub id."""
    path = expand(name)
    try:
        if path.is_dir():
            if not (path / "config.json").is_file() and not (path / ADAPTER).is_file():
                raise Refused(f"{option} {name}: not a model folder (it has no config.json)")
        elif path.exists():
            raise Refused(f"{option} {name}: is a file; a model folder or a hub id is expected")
        elif not name or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
            raise Refused(f"{option} {name}: no such folder")
    except (OSError, ValueError) as error:  # a name that no file can have
        raise Refused(f"{option} {name[:100]}: {getattr(error, 'strerror', None) or error}") from None


def hub_reachable() -> bool:
    """Can the hub's name be looked up? Without this check its client retries for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "ON", "YES"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    from huggingface_hub.constants import ENDPOINT

    try:
        socket.getaddrinfo(urllib.parse.urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def source_of(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers is to load, and where it may look for it."""
    path = expand(name)
    if path.is_dir():
        return str(path), {}
    return name, {} if hub_reachable() else {"local_files_only": True}


def load_model(
    name: str, option: str, dtype: str = "auto", device: str | torch.device = "cpu", trust: bool = False
) -> GenerativeModel:
    transformers = quiet_transformers()
    check_folder(name, option)
    if (expand(name) / ADAPTER).is_file():
        return load_adapter(name, option, dtype, device, trust)
    source, given = source_of(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust, **given)
        if getattr(config, "is_encoder_decoder", False):
            raise Refused(
                f"{option} {name}: {config.model_type} is an encoder-decoder model; decoder-only models are supported"
            )
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=trust, output_loading_info=True, **given
        )
        if info["missing_keys"]:  # transformers would go on with random numbers
            missing = sorted(info["missing_keys"])
            raise Refused(
                f"{option} {name}: cannot load it: weights are missing: {', '.join(missing[:3])}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}"
            )
        found: GenerativeModel = model.to(device).eval()
    except Refused:
        raise
    except Exception as error:  # whatever a broken folder makes transformers raise
        refuse_foreign_code(error, f"{option} {name}")
        if given:
            raise Refused(
                f"{option} {name}: no such folder, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
            ) from None
        raise Refused(f"{option} {name}: cannot load it: {first_line(error)}") from None
    # Only the command line says how to sample; of the checkpoint's own settings the special tokens stay.
    kept = {k: getattr(found.generation_config, k, None) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    found.generation_config = transformers.GenerationConfig(**kept)
    vars(found).pop("generate", None)  # a folder's own decoding loop, which --trust-remote-code lets in
    return found


def load_adapter(name: str, option: str, dtype: str, device: str | torch.device, trust: bool) -> GenerativeModel:
    """A PEFT adapter, merged into the model that it names."""
    base = adapter_base(name, option)
    try:
        import peft
    except ImportError:
        raise Refused(
            f"{option} {name}: is a PEFT adapter; pip install peft, or merge it into {base} and save the result"
        ) from None
    model = load_model(base, f"{option} {name}, adapter of", dtype, device, trust)
    kept = model.generation_config
    whole: Any = model
    try:
        merged: GenerativeModel = peft.PeftModel.from_pretrained(whole, str(expand(name))).merge_and_unload().eval()
    except Exception as error:
        raise Refused(f"{option} {name}: cannot load the adapter: {first_line(error)}") from None
    merged.generation_config = kept
    return merged


def adapter_base(name: str, option: str) -> str:
    """The model that a PEFT adapter belongs to."""
    try:
        base = json.loads((expand(name) / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base or same_model(base, name):
        raise Refused(f"{option} {name}: {ADAPTER} does not name the model that it belongs to")
    return base


def refuse_foreign_code(error: Exception, what: str) -> None:
    if "trust_remote_code" in str(error):
        raise Refused(f"{what}: comes with Python code of its own; pass --trust-remote-code to run it") from None


def load_tokenizer(name: str, option: str, trust: bool = False) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None when it has none."""
    transformers = quiet_transformers()
    source, given = source_of(name)
    path = expand(name)
    there = [f for pattern in TOKENIZER_FILES for f in path.glob(pattern)] if path.is_dir() else []
    if path.is_dir() and not there:
        return load_tokenizer(adapter_base(name, option), option, trust) if (path / ADAPTER).is_file() else None
    try:
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust, **given
        )
        return found
    except Exception as error:
        refuse_foreign_code(error, f"{option} {name}")
        if there:
            raise Refused(f"{option} {name}: cannot load its tokenizer: {first_line(error)}") from None
        return None


def same_model(a: str, b: str) -> bool:
    return a == b or (os.path.isdir(expand(a)) and os.path.realpath(expand(a)) == os.path.realpath(expand(b)))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int | None) -> None:
    if threads:
        import torch

        if threads > cores():
            raise Refused(f"--threads: got {threads}, allowed is 1 to {cores()}, the cores of this process")
        torch.set_num_threads(threads)


def pick_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise Refused(f"--device {device}: cannot use it: {first_line(error)}") from None
    return device


def load_family(args: argparse.Namespace) -> Family:
    """The models of ``--base --tuned --ref`` and their tokenizers."""
    options = [("--base", args.base), *(("--tuned", t) for t in args.tuned), ("--ref", args.ref)]
    for option, name in options:
        check_folder(name, option)
    for name in args.tuned:
        if same_model(name, args.ref):
            raise Refused(f"--tuned {name}: is the model of --ref; the two would cancel and leave the base model alone")
    quiet_transformers()
    set_threads(args.threads)
    device, trust = pick_device(args.device), args.trust_remote_code
    loaded: dict[str, tuple[GenerativeModel, PreTrainedTokenizerBase | None]] = {}
    for option, name in options:
        if name not in loaded:
            loaded[name] = load_model(name, option, args.dtype, device, trust), load_tokenizer(name, option, trust)
    models, tokenizers = zip(*(loaded[name] for _, name in options))
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer, "--tokenizer", trust)
    else:  # the fine-tuned model knows the tokens that fine-tuning added
        tokenizer = next((t for t in (*tokenizers[1:-1], tokenizers[0], tokenizers[-1]) if t), None)
    if tokenizer is None:
        raise Refused(
            f"no tokenizer in {args.tokenizer or 'the model folders'}; name a folder that has one with --tokenizer"
        )
    names = [f"{option} {name}" for option, name in options]
    vocab_size = shared_vocabulary(names, models, tokenizers, args.vocab_size)
    family = Family(models[0], list(models[1:-1]), models[-1], tokenizer, vocab_size)
    family.ends = end_tokens(family)
    return family


def end_tokens(family: Family) -> list[int]:
    """What ends a text: the end tokens of every model (its generation config and config) and of the tokenizer."""
    places = [place for m in family.models for place in (m.generation_config, m.config, m.config.get_text_config())]
    found = [getattr(place, "eos_token_id", None) for place in (*places, family.tokenizer)]
    ids = {i for ids in found for i in (ids if isinstance(ids, (list, tuple)) else [ids]) if i is not None}
    return sorted(i for i in ids if 0 <= i < family.vocab_size)


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one row's ids, without special tokens."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def token_id(given: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """What --eos names: an id, a token as the vocabulary spells it, or a text that is one token."""
    given = argument_text(given, "--eos")
    found = int(given) if given.isdecimal() and len(given) < 19 else tokenizer.get_vocab().get(given)
    if found is None:
        ids = tokenizer(given, add_special_tokens=False).input_ids
        found = ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else -1
    if not 0 <= found < vocab_size:
        raise Refused(f"--eos: got {given!r}, allowed is an id from 0 to {vocab_size - 1} or the text of one token")
    return found


def shared_vocabulary(
    names: Sequence[str],
    models: Sequence[GenerativeModel],
    tokenizers: Sequence[PreTrainedTokenizerBase | None],
    vocab_size: int | None,
) -> int:
    """How many ids the models share; refused unless these mean the same wherever a tokenizer says what they mean."""
    from ..integrations import hf

    widths = [hf.logits_width(m) for m in models]
    shortest = min(widths)
    if vocab_size is not None and vocab_size > shortest:
        raise Refused(f"--vocab-size: got {vocab_size}, allowed is up to {shortest}, the shortest model's vocabulary")
    if vocab_size is None and len(set(widths)) > 1 and None in tokenizers:
        lengths = ", ".join(f"{n} {w}" for n, w in zip(names, widths))
        raise Refused(
            f"the models' vocabularies differ in length ({lengths}) and a tokenizer is missing; pass "
            f"--vocab-size {shortest} if ids below it mean the same"
        )
    known = [(n, t) for n, t in zip(names, tokenizers) if t is not None]
    try:
        hf.check_tokenizers([t for _, t in known], [n for n, _ in known], vocab_size or shortest, vocab_size is None)
    except ValueError as error:
        raise Refused(first_line(error)) from None
    return vocab_size or shortest
