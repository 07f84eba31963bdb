"""`eft-kernels generate --gguf` is EmulatedModel."""

from __future__ import annotations

import json
import re

import pytest

import eft_kernels as eft
from eft_kernels.cli import main

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


@pytest.fixture
def generate(files, capsys):
    """Runs the command; its exit code, output and errors. None of tuned: the family's."""

    def run(*options, tuned=(), **made):
        paths = [files("base"), *(tuned or [files("tuned-a", **made)]), files("ref")]
        code = main(["generate", "--gguf", *map(str, paths), "--threads", "1", *options])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def rows(result):
    code, out, err = result
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def own(files, **settings):
    """The same models, with the command's own settings (`model` of conftest.py computes more exactly)."""
    from eft_kernels.integrations.llama_cpp import EmulatedModel

    return EmulatedModel(files("base"), files("tuned-a"), files("ref"), n_threads=1, **settings)


def test_it_is_the_model(generate, files):
    options = ["--prompt", "The king", "--top-p", "0.9", "--seed", "3", "--beta", "1.2", "--max-new-tokens", "20"]
    with own(files) as model:
        settings = dict(top_p=0.9, seed=3, max_new_tokens=20, weights=eft.upscale(1.2))
        want = model.generate("The king", **settings)
        assert generate(*options)[:2] == (0, want.text + "\n")
        assert generate(*options, "--stream")[:2] == (0, want.text + "\n")
        (row,) = rows(generate(*options, "--json"))
        assert row == dict(prompt="The king", text=want.text, token_ids=want.ids, prompt_tokens=3, seed=3)
        (row,) = rows(generate(*options, "--json", "--draft-tokens", "3"))
        fast = model.generate(
            "The king", top_p=0.9, seed=3, max_new_tokens=20, weights=eft.upscale(1.2), draft_tokens=3
        )
        assert row["token_ids"] == want.ids and row["accepted"] == int(fast.speculation.accepted) > 0
        assert row["acceptance"] == pytest.approx(row["accepted"] / row["drafted"])
        code, out, err = generate(*options, "--draft-tokens", "3", "--stats")
        accepted = f"{row['accepted']} of {row['drafted']} drafts accepted"
        assert (code, out) == (0, want.text + "\n") and accepted in err and re.search("time in +base +tuned +ref", err)
        (row,) = rows(generate("--prompt", "The king", "--greedy", "--json", "--max-new-tokens", "9"))
        assert row["token_ids"] == model.generate("The king", temperature=0.0, max_new_tokens=9).ids
        assert row["token_ids"] != want.ids[:9]


def test_requests_have_options_of_their_own(generate, files, tmp_path):
    lines = [{"prompt": "The king"}, {"prompt": "And", "seed": 9, "beta": 0.5, "temperature": 0.7, "max_new_tokens": 4}]
    batch = tmp_path / "batch.jsonl"
    batch.write_text("\n".join(map(json.dumps, lines)))
    options = ["--batch-file", str(batch), "--json", "--seed", "5", "--max-new-tokens", "8"]
    first, second = rows(generate(*options))
    with own(files) as model:
        assert first["token_ids"] == model.generate("The king", seed=5, max_new_tokens=8).ids
        want = model.generate("And", seed=9, weights=eft.upscale(0.5), temperature=0.7, max_new_tokens=4)
        assert second["token_ids"] == want.ids and second["seed"] == 9


def test_modes_and_two_tuned_models(generate, files):
    from eft_kernels.integrations.llama_cpp import EmulatedModel

    both = [files("tuned-a"), files("tuned-b")]
    base = ["--prompt", "The king", "--seed", "1", "--json", "--max-new-tokens", "20"]
    with EmulatedModel(files("base"), both, files("ref"), n_threads=1) as model:
        (row,) = rows(generate(*base, "--lam", "0.2", tuned=both))
        want = model.generate("The king", seed=1, weights=eft.interpolate(0.2), max_new_tokens=20)
        assert row["token_ids"] == want.ids
    with own(files, n_ctx=64) as model:
        (row,) = rows(generate(*base, "--mode", "proxy", "--alpha", "0.4", "--context", "64", "--gpu-layers", "0"))
        assert row["token_ids"] == model.generate("The king", seed=1, weights=eft.proxy(0.4), max_new_tokens=20).ids


def test_chat_and_ends(generate, files):
    options = ["--prompt", "Hello", "--greedy", "--json", "--max-new-tokens", "12"]
    (row,) = rows(generate(*options, "--chat", template=TEMPLATE))
    with own(files) as model:
        ids = model.tokenize("[user] Hello ", special=False)
        want = model.generate(ids, temperature=0.0, max_new_tokens=12)
        assert row["token_ids"] == want.ids and row["prompt_tokens"] == len(ids)
        plain = model.generate("Hello", temperature=0.0, max_new_tokens=12).ids
        stop = plain[4]
        by_text = model.tokenizer.piece(stop).decode()
        spelled = model.tokenizer.texts[stop].decode()
    for name in (str(stop), spelled, by_text):
        (row,) = rows(generate(*options, "--eos", name))
        assert row["token_ids"] == plain[: plain.index(stop) + 1]


def test_an_invalid_row_is_told(files, capsys):
    paths = [files("base", poison=35), files("tuned-a"), files("ref")]  # 35 is "A"
    prompts = ["--prompt", "A", "--prompt", "The king", "--json", "--max-new-tokens", "3", "--greedy"]
    assert main(["generate", "--gguf", *map(str, paths), *prompts, "--threads", "1"]) == 1
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["token_ids"] == [] and "at step 0; its text ends there" in first["error"]
    assert len(second["token_ids"]) == 3 and "error" not in second
    assert err.startswith("eft-kernels generate: --prompt 1: invalid scores")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--prompt", "a", "--base", "x"], "--base: goes without --gguf"),
        (["--prompt", "a", "--dtype", "float32"], "--dtype: goes without --gguf"),
        (["--prompt", "a", "--batch-size", "4"], "--batch-size: goes without --gguf"),
        (["--prompt", "a", "--max-new-tokens", "600"], "--prompt: the prompt has 2 tokens and --max-new-tokens is 600"),
        (["--prompt", "a", "--chat"], "--chat: .* has no chat template"),
        (["--prompt", "a", "--eos", "5000"], "--eos: got '5000', allowed is an id from 0 to 2047"),
        (["--prompt", "a", "--context", "1000"], "--gguf: n_ctx: got 1000, allowed is up to 512"),
        (["--prompt", "a", "--vocab-size", "3000"], "--gguf: vocab_size: got 3000"),
        (["--prompt", "a", "--draft-tokens", "600"], "--prompt: draft_tokens: got 600, allowed is up to 511"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_code_2(generate, options, words):
    code, out, err = generate(*options)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert re.match(f"eft-kernels generate: error: {words}", err), err


def test_files(files, capsys, tmp_path):
    for paths, words in (
        ([files("base"), files("tuned-a")], "--gguf: got 2 files, allowed are 3 or 4"),
        ([files("base"), files("ref"), files("ref")], "--gguf: tuned: .* is ref's file"),
        ([files("base"), files("tuned-a"), tmp_path / "none"], "--gguf: .*none: no such file"),
    ):
        assert main(["generate", "--gguf", *map(str, paths), "--prompt", "a"]) == 2
        assert re.match(f"eft-kernels generate: error: {words}", capsys.readouterr().err)


def test_gguf_options_go_with_gguf(capsys):
    for option in (["--context", "64"], ["--gpu-layers", "3"]):
        command = ["generate", "--base", "b", "--tuned", "t", "--ref", "r", "--prompt", "a"]
        assert main([*command, *option]) == 2
        assert capsys.readouterr().err == f"eft-kernels generate: error: {option[0]}: goes with --gguf\n"
