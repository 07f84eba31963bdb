"""Loading the models and tokenizers that the command line names, with one clear line for everything that can be wrong."""

from __future__ import annotations

import os
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
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise Refused(f"{option} {name}: no such folder")


def load_model(name: str, option: str, dtype: str = "auto", device: str = "cpu"):
    transformers = quiet_transformers()
    check_folder(name, option)
    name = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if getattr(config, "is_encoder_decoder", False):
            raise Refused(f"{option} {name}: {config.model_type} is an encoder-decoder model; decoder-only models "
                          "are supported")
        model = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
        return model.to(device).eval()
    except Refused:
        raise
    except Exception as error:  # whatever a broken folder makes transformers raise
        raise Refused(f"{option} {name}: cannot load it: {first_line(error)}") from None


def load_tokenizer(name: str):
    """The folder's tokenizer, or None when it has none."""
    transformers = quiet_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(Path(name).expanduser()))
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
        raise Refused(f"no tokenizer in {args.tokenizer or 'the model folders'}; name a folder that has one with --tokenizer")
    check_tokenizers(options, tokenizers, args.vocab_size)
    return Family(models[0], list(models[1:-1]), models[-1], tokenizer, list(tokenizers))


def check_tokenizers(options, tokenizers, vocab_size: int | None) -> None:
    """Token ids (below ``vocab_size`` if given) must mean the same for every model that brings a tokenizer."""
    end = vocab_size or 1 << 60
    known = [(f"{option} {name}", {token: i for token, i in t.get_vocab().items() if i < end})
             for (option, name), t in zip(options, tokenizers) if t]
    for who, vocab in known[1:]:
        first, reference = known[0]
        if vocab != reference:
            different = [t for t in reference.keys() | vocab.keys() if reference.get(t) != vocab.get(t)]
            token = min(different, key=lambda t: min(reference.get(t, 1 << 60), vocab.get(t, 1 << 60)))
            raise Refused(f"the tokenizers of {first} and {who} differ: {len(different)} tokens, the first is {token!r} "
                          f"(id {reference.get(token)} and {vocab.get(token)}); the models must share one vocabulary")
