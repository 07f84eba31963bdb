"""Loading the models and tokenizers that the command line names, with one clear line for all that can be wrong."""

from __future__ import annotations

import os
import socket
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from .term import Refused


@dataclass
class Family:
    """The models of one emulation, in the order of the weights: base, tuned (one or two), ref."""

    base: object
    tuned: list
    ref: object
    tokenizer: object
    tokenizers: list = field(default_factory=list)  # of base, tuned..., ref; None where a folder has none
    vocab_size: int | None = None  # ids that the models share

    @property
    def models(self) -> list:
        return [self.base, *self.tuned, self.ref]

    @property
    def context(self) -> int | None:
        """The shortest context of the models, None when no config says."""
        limits = [n for m in self.models if (n := getattr(m.config.get_text_config(), "max_position_embeddings", None))]
        return min(limits, default=None)


def quiet_transformers():
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
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise Refused(f"{option} {name}: not a model folder (it has no config.json)")
    elif path.exists():
        raise Refused(f"{option} {name}: is a file; a model folder or a hub id is expected")
    elif not name or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise Refused(f"{option} {name}: no such folder")


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


def load_model(name: str, option: str, dtype: str = "auto", device: str = "cpu"):
    transformers = quiet_transformers()
    check_folder(name, option)
    path, given = Path(name).expanduser(), {}
    if path.is_dir():
        source = str(path)
    else:
        source, given = name, {} if hub_reachable() else {"local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **given)
        if getattr(config, "is_encoder_decoder", False):
            raise Refused(f"{option} {name}: {config.model_type} is an encoder-decoder model; decoder-only models "
                          "are supported")
        model = transformers.AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **given)
        return model.to(device).eval()
    except Refused:
        raise
    except Exception as error:  # whatever a broken folder makes transformers raise
        if given:
            raise Refused(f"{option} {name}: no such folder, and the hub cannot be reached (or HF_HUB_OFFLINE is "
                          "set)") from None
        raise Refused(f"{option} {name}: cannot load it: {first_line(error)}") from None


def load_tokenizer(name: str):
    """The folder's tokenizer, or None when it has none."""
    transformers = quiet_transformers()
    try:
        path = Path(name).expanduser()
        return transformers.AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name,
                                                          local_files_only=not path.is_dir() and not hub_reachable())
    except Exception:
        return None


def set_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def pick_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise Refused(f"--device {device}: cannot use it: {first_line(error)}") from None
    return device


def load_family(args) -> Family:
    """The models of ``--base --tuned --ref`` and their tokenizers."""
    options = [("--base", args.base), *(("--tuned", t) for t in args.tuned), ("--ref", args.ref)]
    for option, name in options:
        check_folder(name, option)
    quiet_transformers()
    set_threads(args.threads)
    device, loaded = pick_device(args.device), {}
    for option, name in options:
        if name not in loaded:
            loaded[name] = (load_model(name, option, args.dtype, device), load_tokenizer(name))
    models, tokenizers = zip(*(loaded[name] for _, name in options))
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else next((t for t in tokenizers if t), None)
    if tokenizer is None:
        raise Refused(f"no tokenizer in {args.tokenizer or 'the model folders'}; name a folder that has one with "
                      "--tokenizer")
    family = Family(models[0], list(models[1:-1]), models[-1], tokenizer, list(tokenizers))
    names = [f"{option} {name}" for option, name in options]
    family.vocab_size = shared_vocabulary(names, models, tokenizers, args.vocab_size)
    return family


def shared_vocabulary(names: list[str], models, tokenizers, vocab_size: int | None) -> int:
    """How many ids the models share; refused unless these mean the same wherever a tokenizer says what they mean."""
    from ..integrations import hf

    widths = [hf.logits_width(m) for m in models]
    shortest = min(widths)
    if vocab_size is not None and vocab_size > shortest:
        raise Refused(f"--vocab-size: got {vocab_size}, allowed is up to {shortest}, the shortest model's vocabulary")
    if vocab_size is None and len(set(widths)) > 1 and None in tokenizers:
        lengths = ", ".join(f"{n} {w}" for n, w in zip(names, widths))
        raise Refused(f"the models' vocabularies differ in length ({lengths}) and a tokenizer is missing; pass "
                      f"--vocab-size {shortest} if ids below it mean the same")
    known = [(n, t) for n, t in zip(names, tokenizers) if t is not None]
    try:
        hf.check_tokenizers([t for _, t in known], [n for n, _ in known], vocab_size or shortest, vocab_size is None)
    except ValueError as error:
        raise Refused(first_line(error)) from None
    return vocab_size or shortest
