"""`eft-kernels compose`: a folder that names base, tuned and ref, which vLLM serves as one model.

DIR/config.json              base's, with the architecture EftForCausalLM and the combination under "eft"
DIR/generation_config.json   base's, with the end tokens of all models
DIR/tokenizer*, chat_template.jinja, ...   the tuned model's
DIR/base, DIR/tuned, DIR/ref   links to the models' folders
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..integrations.vllm import ARCHITECTURE
from .files import expand
from .models import (
    ADAPTER,
    check_folder,
    first_line,
    load_tokenizer,
    quiet_transformers,
    refuse_foreign_code,
    same_model,
    source_of,
)
from .options import add_combination, mode_settings, positive
from .term import Refused

SHARED_LENGTH = "max_position_embeddings"


def add_command(command) -> None:
    p = command(
        "compose",
        "one folder of base, tuned and ref, for `vllm serve`",
        "A folder that serving engines load as one model. Weights are linked, not copied.",
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
        "--tokenizer", action="once", metavar="MODEL", help="whose tokenizer and chat template (default: tuned's)"
    )
    group.add_argument(
        "--vocab-size", type=positive, metavar="N", help="the first N ids that the models share, where lengths differ"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    p.add_argument("--out", required=True, action="once", metavar="DIR", help="the folder to make")
    add_combination(p)


def run(args) -> int:
    settings = mode_settings(args)
    transformers = quiet_transformers()
    names = ["base", *(["tuned"] if len(args.tuned) == 1 else ["tuned_a", "tuned_b"]), "ref"]
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
    trust = args.trust_remote_code
    configs = [config_of(folder, f"{o} {n}", trust) for folder, o, n in zip(folders, options, given)]
    tokenizers = [load_tokenizer(str(folder), f"{o} {n}", trust) for folder, o, n in zip(folders, options, given)]
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer, "--tokenizer", trust)
    else:
        tokenizer = next((t for t in (*tokenizers[1:-1], tokenizers[0]) if t), None)
    if tokenizer is None:
        raise Refused("no tokenizer in the model folders; name a folder that has one with --tokenizer")
    vocab_size = shared_vocabulary(names, configs, tokenizers, args.vocab_size)

    config = {k: v for k, v in configs[0].to_dict().items() if k != "_name_or_path"}
    text = next((config[key] for key in ("text_config",) if isinstance(config.get(key), dict)), config)
    text["vocab_size"] = vocab_size
    lengths = [n for c in configs if (n := getattr(c.get_text_config(), SHARED_LENGTH, None))]
    if lengths:
        text[SHARED_LENGTH] = min(lengths)
    generation = generation_of(folders[0], transformers)
    ends = end_tokens(folders, configs, tokenizer, transformers)
    config |= {
        "architectures": [ARCHITECTURE],
        "eos_token_id": ends,
        "eft": {
            "base": "base",
            "tuned": names[1:-1] if len(names) > 3 else "tuned",
            "ref": "ref",
            **settings,
            "upscale_top_p": 1.0 if args.upscale_top_p is None else args.upscale_top_p,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    write(out / "config.json", config)
    write(out / "generation_config.json", generation | {"eos_token_id": ends})
    for name, folder in zip(names, folders):
        (out / name).symlink_to(os.path.abspath(folder), target_is_directory=True)
    print(f"{out}: {', '.join(f'{n} {f}' for n, f in zip(names, folders))}")
    print(f"ids {vocab_size}, end tokens {', '.join(map(str, ends))}, {settings['mode']}; next: vllm serve {out}")
    return 0


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def folder_of(name: str, option: str) -> Path:
    """The model's folder on this machine; a hub id's is downloaded where it is not in the cache."""
    check_folder(name, option)
    if (expand(name) / ADAPTER).is_file():
        raise Refused(f"{option} {name}: is a PEFT adapter; merge it into its model and save the result")
    source, given = source_of(name)
    if os.path.isdir(source):
        return Path(os.path.realpath(source))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, **given))
    except Exception as error:
        raise Refused(f"{option} {name}: cannot get it: {first_line(error)}") from None


def config_of(folder: Path, what: str, trust: bool):
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


def shared_vocabulary(names, configs, tokenizers, given: int | None) -> int:
    """How many ids the models share; ids below it must mean the same wherever a tokenizer says what they mean."""
    from ..integrations import hf

    widths = [config.get_text_config().vocab_size for config in configs]
    shortest = min(widths)
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


def generation_of(folder: Path, transformers) -> dict:
    """The special tokens of the folder's generation config; how to sample is for requests to say."""
    try:
        config = transformers.GenerationConfig.from_pretrained(folder)
    except OSError:
        return {}
    return {k: v for k in ("bos_token_id", "pad_token_id") if (v := getattr(config, k, None)) is not None}


def end_tokens(folders, configs, tokenizer, transformers) -> list[int]:
    """What ends a text: the end tokens of every model (its generation config and config) and of the tokenizer."""
    from .models import end_of_turn

    found = {*end_of_turn(tokenizer), tokenizer.eos_token_id}
    for folder, config in zip(folders, configs):
        places = [config, config.get_text_config()]
        try:
            places.append(transformers.GenerationConfig.from_pretrained(folder))
        except OSError:
            pass
        for place in places:
            ids = getattr(place, "eos_token_id", None)
            found |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return sorted(i for i in found if i is not None)
