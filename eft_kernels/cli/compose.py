"""`eft-kernels compose`: a folder that names base, tuned and ref, which transformers and vLLM load as one model.

What is in it: eft_kernels/integrations/composition.py, and the tuned model's tokenizer and chat template.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..integrations.composition import ADAPTER, ARCHITECTURE, composed_config, part_names, write_composed
from .files import expand
from .models import (
    adapter_base,
    check_folder,
    first_line,
    load_adapter,
    load_tokenizer,
    quiet_transformers,
    refuse_foreign_code,
    same_model,
    source_of,
)
from .options import add_combination, mode_settings, positive
from .term import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_command(command: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    p = command(
        "compose",
        "one folder of base, tuned and ref, for transformers, `vllm serve` and `sglang serve`",
        "A folder that transformers and serving engines load as one model. Weights are linked, not copied.",
    )
    group = p.add_argument_group("models (folders or hub ids)")
    for name, text in (
        ("base", "the large model that was not fine-tuned"),
        ("tuned", "the small fine-tuned model; give it twice to mix two behaviours (see --lam)"),
        ("ref", "the small model before fine-tuning"),
    ):
        action = "append" if name == "tuned" else "once"
        group.add_argument(f"--{name}", required=True, action=action, metavar="MODEL", help=text)
    group.add_argument(
        "--merge",
        action="store_true",
        help="a --tuned that is a PEFT adapter: write the merged model, which vLLM needs (default: link the adapter, "
        "which transformers lays over ref)",
    )
    group.add_argument(
        "--tokenizer", action="once", metavar="MODEL", help="whose tokenizer and chat template (default: tuned's)"
    )
    group.add_argument(
        "--vocab-size", type=positive, metavar="N", help="the first N ids that the models share, where lengths differ"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    p.add_argument("--out", required=True, action="once", metavar="DIR", help="the folder to make")
    add_combination(p)


def run(args: argparse.Namespace) -> int:
    settings = mode_settings(args)
    transformers = quiet_transformers()
    names = part_names(len(args.tuned))
    given = [args.base, *args.tuned, args.ref]
    options = ["--base", *["--tuned"] * len(args.tuned), "--ref"]
    for tuned in args.tuned:
        if same_model(tuned, args.ref):
            raise Refused(
                f"--tuned {tuned}: is the model of --ref; the two would cancel and leave the base model alone"
            )
    out = expand(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"--out {args.out}: exists; name a folder that does not, or an empty one")
    folders = [folder_of(name, option) for name, option in zip(given, options)]
    adapters = [(folder / ADAPTER).is_file() for folder in folders]
    check_adapters(given, options, folders, adapters, args)
    trust = args.trust_remote_code
    # an adapter has no config of its own: it changes ref, or what it is merged into
    described = [folder_of(adapter_base(str(f), o), o) if a else f for f, o, a in zip(folders, options, adapters)]
    configs = [config_of(folder, f"{o} {n}", trust) for folder, o, n in zip(described, options, given)]
    tokenizers = [load_tokenizer(str(folder), f"{o} {n}", trust) for folder, o, n in zip(folders, options, given)]
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer, "--tokenizer", trust)
    else:
        tokenizer = next((t for t in (*tokenizers[1:-1], tokenizers[0]) if t), None)
    if tokenizer is None:
        raise Refused("no tokenizer in the model folders; name a folder that has one with --tokenizer")
    vocab_size = shared_vocabulary(names, configs, tokenizers, args.vocab_size)

    special = generation_of(folders[0], transformers)
    ends = end_tokens(described, configs, tokenizer, transformers)
    settings["upscale_top_p"] = 1.0 if args.upscale_top_p is None else args.upscale_top_p
    merged: dict[str, Any] = {
        name: load_adapter(str(folder), option, "auto", "cpu", trust)
        for name, folder, option, adapter in zip(names, folders, options, adapters)
        if adapter and args.merge
    }
    write_composed(out, composed_config(configs, settings, vocab_size, ends), special | {"eos_token_id": ends})
    tokenizer.save_pretrained(out)
    for name, folder in zip(names, folders):
        if name in merged:
            merged[name].save_pretrained(out / name)
        else:
            (out / name).symlink_to(os.path.abspath(folder), target_is_directory=True)
    print(f"{out}: {', '.join(f'{n} {f}' for n, f in zip(names, folders))}")
    whole = args.merge or not any(adapters)
    then = f"vllm serve {out}, or sglang serve --model-path {out}"
    if not whole:
        then = "eft.hf.EmulatedModel.from_pretrained (vLLM and SGLang need --merge)"
    print(f"ids {vocab_size}, end tokens {', '.join(map(str, ends))}, {settings['mode']}; next: {then}")
    return 0


def folder_of(name: str, option: str) -> Path:
    """The model's folder on this machine; a hub id's is downloaded where it is not in the cache."""
    check_folder(name, option)
    source, given = source_of(name)
    if os.path.isdir(source):
        return Path(os.path.realpath(source))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, **given))
    except Exception as error:
        raise Refused(f"{option} {name}: cannot get it: {first_line(error)}") from None


def check_adapters(
    given: Sequence[str],
    options: Sequence[str],
    folders: Sequence[Path],
    adapters: Sequence[bool],
    args: argparse.Namespace,
) -> None:
    """A tuned model may be an adapter: over ref, or over anything if it is to be merged."""
    for name, option, folder, adapter in zip(given, options, folders, adapters):
        if adapter and option != "--tuned":
            raise Refused(f"{option} {name}: is a PEFT adapter; merge it into its model and save the result")
        if adapter and not args.merge:
            base = adapter_base(str(folder), option)
            if not same_model(base, args.ref):
                raise Refused(f"{option} {name}: is a PEFT adapter of {base}, not of --ref; pass --merge")
    if args.merge and not any(adapters):
        raise Refused("--merge: goes with a --tuned that is a PEFT adapter")


def config_of(folder: Path, what: str, trust: bool) -> Any:
    transformers = quiet_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:
        refuse_foreign_code(error, what)
        raise Refused(f"{what}: cannot read its config: {first_line(error)}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise Refused(f"{what}: {config.model_type} is an encoder-decoder model; decoder-only models are supported")
    if (config.architectures or [None])[0] in (None, ARCHITECTURE):
        raise Refused(f"{what}: its config names {config.architectures}; a model with an architecture is expected")
    return config


def shared_vocabulary(
    names: Sequence[str],
    configs: Sequence[Any],
    tokenizers: Sequence[PreTrainedTokenizerBase | None],
    given: int | None,
) -> int:
    """How many ids the models share; ids below it must mean the same wherever a tokenizer says what they mean."""
    from ..integrations import hf

    widths = [config.get_text_config().vocab_size for config in configs]
    shortest: int = min(widths)
    if given is not None and given > shortest:
        raise Refused(f"--vocab-size: got {given}, allowed is up to {shortest}, the shortest model's vocabulary")
    if given is not None and given < shortest:
        raise Refused(f"--vocab-size: got {given}; a served model has all {shortest} ids that its models share")
    if given is None and len(set(widths)) > 1 and None in tokenizers:
        lengths = ", ".join(f"{n} {w}" for n, w in zip(names, widths))
        raise Refused(
            f"the models' vocabularies differ in length ({lengths}) and a tokenizer is missing; pass "
            f"--vocab-size {shortest} if ids below it mean the same"
        )
    known = [(n, t) for n, t in zip(names, tokenizers) if t is not None]
    try:
        hf.check_tokenizers([t for _, t in known], [n for n, _ in known], shortest, given is None)
    except ValueError as error:
        raise Refused(first_line(error)) from None
    return shortest


def generation_of(folder: Path, transformers: ModuleType) -> dict[str, Any]:
    """The special tokens of the folder's generation config; how to sample is for requests to say."""
    try:
        config = transformers.GenerationConfig.from_pretrained(folder)
    except OSError:
        return {}
    return {k: v for k in ("bos_token_id", "pad_token_id") if (v := getattr(config, k, None)) is not None}


def end_tokens(
    folders: Sequence[Path], configs: Sequence[Any], tokenizer: PreTrainedTokenizerBase, transformers: ModuleType
) -> list[int]:
    """What ends a text: the end tokens of every model (its generation config and config) and of the tokenizer."""
    from ..integrations import hf

    found = {*hf.end_of_turn(tokenizer), tokenizer.eos_token_id}
    for folder, config in zip(folders, configs):
        places = [config, config.get_text_config()]
        try:
            places.append(transformers.GenerationConfig.from_pretrained(folder))
        except OSError:
            pass
        for place in places:
            ids = getattr(place, "eos_token_id", None)
            found |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return sorted(i for i in found if isinstance(i, int))
