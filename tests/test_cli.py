"""The command line on tiny random Llama models: what it prints, what it refuses, and that its numbers are right."""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import eft_kernels as eft
from eft_kernels import ops
from eft_kernels.cli import main

pytest.importorskip("transformers")
TEXT = "and the king said unto them go and see what the people of the land have done . " * 12
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models want no more; and commands may set another number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """A folder of models: base (large), tuned, other (small), ref, and broken ones beside them.

    Logits are 8 wider than the tokenizer; `chat` is `tuned` with a chat template and its tokens there.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

    root = tmp_path_factory.mktemp("zoo")

    def tokenizer(words):
        vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
        t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )

    words = sorted(set(TEXT.split())) + [f"wé王{i}" for i in range(40)]
    size = len(words) + 4 + 8

    def model(name, seed, hidden, own_words=words, poison=False):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.5,
        )
        m = LlamaForCausalLM(config)
        if poison:  # id 4's embedding: every prompt that holds its word makes NaN
            m.model.embed_tokens.weight.data[4] = float("nan")
        m.save_pretrained(root / name)
        tokenizer(own_words).save_pretrained(root / name)

    def variant(name, source, **config):
        shutil.copytree(root / source, root / name)
        path = root / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return root / name

    for seed, (name, hidden) in enumerate([("base", 32), ("truth", 32), ("tuned", 16), ("other", 16), ("ref", 16)]):
        model(name, seed, hidden)
    model("stranger", 9, 16, own_words=words[::-1])
    model("sick", 4, 16, poison=True)
    T5Config(vocab_size=size).save_pretrained(root / "seq2seq")
    (root / "empty").mkdir()
    shutil.copytree(root / "ref", root / "weightless")
    (root / "weightless" / "model.safetensors").unlink()
    chat = tokenizer(words)
    chat.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    chat.chat_template = CHAT
    chat.save_pretrained(variant("chat", "tuned"))
    chat.add_tokens([f"<{i}>" for i in range(8)])
    chat.save_pretrained(variant("chatty", "tuned"))  # with tokens that no logits are for
    renamed = tokenizer(words)
    renamed.add_special_tokens({"additional_special_tokens": ["<|reserved|>"]})
    renamed.save_pretrained(variant("reserved", "base"))
    tokenizer([*words, "plain"]).save_pretrained(variant("taken", "base"))  # its place is that of a chat token
    (variant("garbled", "tuned") / "tokenizer.json").write_text("{")
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(root / "ref")}))
    (root / "same").symlink_to(root / "ref")
    partial = LlamaForCausalLM.from_pretrained(root / "ref")
    partial.save_pretrained(
        variant("headless", "ref"), state_dict={k: v for k, v in partial.state_dict().items() if k != "lm_head.weight"}
    )
    left = dict(
        use_cache=False,
        do_sample=True,
        num_beams=3,
        temperature=0.01,
        repetition_penalty=3.0,
        max_length=9,
        forced_eos_token_id=5,
        suppress_tokens=[6, 7],
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    folder = variant("leftovers", "base", temperature=0.01, num_beams=3)
    (folder / "generation_config.json").write_text(json.dumps(left))
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.fixture(scope="session")
def family(zoo):
    """The zoo's models in the layout that `demo` expects."""
    root = zoo / "family"
    for name, source in {
        "base": "base",
        "ref": "ref",
        "tuned-a": "tuned",
        "tuned-b": "other",
        "large-a": "truth",
        "large-b": "truth",
    }.items():
        shutil.copytree(zoo / source, root / "weights" / name)
    (root / "heldout").mkdir()
    for style in "ab":
        (root / "heldout" / f"{style}.txt").write_text("\n\f\n".join([TEXT, TEXT, TEXT]) + "\n")
    return root


def models(zoo, **other):
    names = {"base": "base", "tuned": "tuned", "ref": "ref", **other}
    return [x for option, name in names.items() for x in (f"--{option}", str(zoo / name))]


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- generate ------------------------------------------------------------------------------------------------------


def test_generate_is_generate(zoo, capsys):
    """Same tokens as the library's call with the same settings and seed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = dict(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, upscale_top_p=0.9, beta=1.5)
    options = [x for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    assert (
        main(
            [
                "generate",
                *models(zoo),
                "--prompt",
                "and the king",
                "--seed",
                "5",
                "--max-new-tokens",
                "9",
                "--json",
                *options,
            ]
        )
        == 0
    )
    (row,) = lines(capsys)
    base, tuned, ref = (AutoModelForCausalLM.from_pretrained(zoo / n) for n in ("base", "tuned", "ref"))
    inputs = AutoTokenizer.from_pretrained(zoo / "base")("and the king", return_tensors="pt")
    out = base.generate(
        input_ids=inputs.input_ids,
        custom_generate=eft.hf.generate,
        tuned=tuned,
        ref=ref,
        seed=5,
        do_sample=True,
        max_new_tokens=9,
        **settings,
    )
    want = out[0, inputs.input_ids.shape[1] :].tolist()
    assert row["token_ids"] == want[: want.index(2) + 1 if 2 in want else None]
    assert row["seed"] == 5 and row["prompt"] == "and the king" and row["prompt_tokens"] == 4


def test_every_sampling_option_arrives(zoo, capsys):
    """Each of top-k, top-p and min-p alone can make sampling greedy; the others change the text."""
    call = ["generate", *models(zoo), "--prompt", "and the king", "--seed", "5", "--max-new-tokens", "9", "--json"]

    def ids(*options):
        assert main([*call, *options]) == 0
        return lines(capsys)[0]["token_ids"]

    greedy, free = ids("--greedy"), ids()
    assert greedy != free
    for option in (["--top-k", "1"], ["--top-p", "0.0001"], ["--min-p", "1"], ["--temperature", "0.0001"]):
        assert ids(*option) == greedy, option
    for option in (["--temperature", "3"], ["--upscale-top-p", "0.01"]):
        assert ids(*option) != free, option
    assert len(ids("--max-new-tokens", "2")) <= 2


def test_seed_decides_and_is_told(zoo, capsys):
    call = ["generate", *models(zoo), "--prompt", "the people", "--max-new-tokens", "8", "--json"]
    assert main(call) == 0
    (first,) = lines(capsys)
    assert main([*call, "--seed", str(first["seed"])]) == 0
    (again,) = lines(capsys)
    assert main([*call, "--seed", str(first["seed"] + 1)]) == 0
    (other,) = lines(capsys)
    assert first == again and other["token_ids"] != first["token_ids"]


def test_coupled_speculation_changes_nothing(zoo, capsys):
    call = ["generate", *models(zoo), "--prompt", "the people", "--seed", "3", "--max-new-tokens", "12", "--json"]
    rows = []
    tree = ["--draft-tokens", "3", "--draft-width", "2", "--draft-budget", "5"]
    for extra in ([], ["--draft-tokens", "3"], tree, ["--draft-tokens", "auto"]):
        assert main([*call, *extra]) == 0
        rows += lines(capsys)
    assert all(row["token_ids"] == rows[0]["token_ids"] for row in rows)
    assert rows[1]["drafted"] <= 3 * rows[1]["rounds"] < rows[2]["drafted"] <= 5 * rows[2]["rounds"]
    assert main([*call, "--draft-tokens", "3", "--verify", "token"]) == 0
    assert len(lines(capsys)[0]["token_ids"]) > 0


def test_batch_file_requests_do_not_touch_each_other(zoo, capsys, tmp_path):
    """Each line gets what it would get alone, whatever the batch size, in the order of the file."""
    requests = [
        {"prompt": "and the king", "seed": 1},
        {"prompt": "go", "temperature": 0, "seed": 2},
        {"prompt": "see what the people of the land", "temperature": 0.5, "top_p": 0.8, "beta": 2.0, "seed": 3},
        {"prompt": "land", "top_k": 3, "max_new_tokens": 3, "seed": 4},
    ]
    path = tmp_path / "batch"
    path.write_text("\n".join(map(json.dumps, requests)) + "\n\nthe people\n")
    call = ["generate", *models(zoo), "--max-new-tokens", "7", "--seed", "9", "--json"]
    assert main([*call, "--batch-file", str(path)]) == 0
    together = lines(capsys)
    assert main([*call, "--batch-file", str(path), "--batch-size", "1"]) == 0
    assert lines(capsys) == together
    assert [r["prompt"] for r in together] == [r["prompt"] for r in requests] + ["the people"]
    assert len(together[3]["token_ids"]) <= 3
    for request, row in zip(requests, together):
        options = [x for k, v in request.items() for x in (f"--{k.replace('_', '-')}", str(v))]
        assert main(["generate", *models(zoo), "--max-new-tokens", "7", "--json", *options]) == 0
        (alone,) = lines(capsys)
        assert alone == row


def test_output_forms(zoo, capsys, monkeypatch):
    call = ["generate", *models(zoo), "--seed", "3", "--max-new-tokens", "8"]
    assert main([*call, "--prompt", "the people"]) == 0
    plain = capsys.readouterr().out
    assert main([*call, "--prompt", "the people", "--stream"]) == 0
    assert capsys.readouterr().out.strip() == plain.strip() != ""
    assert main([*call, "--prompt", "the people", "--prompt", "go"]) == 0
    several = capsys.readouterr().out
    assert several.startswith(f"[1] the people\n{plain}") and "[2] go\n" in several
    assert main([*call, "--prompt", "the people", "--greedy"]) == 0
    greedy = capsys.readouterr().out
    assert main([*call, "--prompt", "the people", "--temperature", "0", "--seed", "77"]) == 0
    assert capsys.readouterr().out == greedy != plain

    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("the people\n"))
    assert main(call) == 0
    assert capsys.readouterr().out == plain


def test_a_printed_seed_is_a_seed(zoo, capsys, tmp_path):
    """All 64 bits of it, negative ones too, as an option and in a line of a file."""
    prompts = ["go see", "the people", "and the king", "land", "what"]
    call = ["generate", *models(zoo), "--max-new-tokens", "5", "--json"]
    assert main([*call, "--seed", str(2**62 + 1), *(x for p in prompts for x in ("--prompt", p))]) == 0
    rows = lines(capsys)
    assert min(r["seed"] for r in rows) < 0 and any(r["seed"] != int(float(r["seed"])) for r in rows)
    (tmp_path / "batch").write_text("\n".join(json.dumps({k: r[k] for k in ("prompt", "seed")}) for r in rows))
    assert main([*call, "--batch-file", str(tmp_path / "batch")]) == 0
    assert lines(capsys) == rows
    for r in rows[:3]:
        assert main([*call, "--prompt", r["prompt"], "--seed", str(r["seed"])]) == 0
        assert lines(capsys) == [r]


def test_json_tells_what_was_accepted(zoo, capsys):
    call = [
        "generate",
        *models(zoo),
        "--prompt",
        "go see",
        "--prompt",
        "the people of the land",
        "--seed",
        "4",
        "--max-new-tokens",
        "12",
        "--json",
    ]
    assert main(call) == 0
    assert not any(k in row for row in lines(capsys) for k in ("rounds", "drafted", "accepted", "acceptance"))
    assert main([*call, "--draft-tokens", "3", "--greedy"]) == 0
    for row in lines(capsys):
        assert 0 <= row["accepted"] <= row["drafted"] <= 3 * row["rounds"] and row["rounds"] > 0
        assert row["acceptance"] == row["accepted"] / row["drafted"]
        assert len(row["token_ids"]) <= row["accepted"] + row["rounds"]
        assert row["tokens_per_round"] == len(row["token_ids"]) / row["rounds"]
    assert main([*call, "--draft-tokens", "3", "--max-new-tokens", "1"]) == 0
    assert all(row["acceptance"] is None for row in lines(capsys) if not row["drafted"])


def test_stats_of_all_requests_together(zoo, capsys, tmp_path):
    """On standard error, and in numbers that the rows of --json have."""
    path = tmp_path / "batch"  # three batches, of which one has fewer drafts after each other
    path.write_text('go see\nthe people\nand the king\n{"prompt": "land", "max_new_tokens": 3}\n')
    call = ["generate", *models(zoo), "--batch-file", str(path), "--batch-size", "2", "--seed", "4"]
    call += ["--max-new-tokens", "12"]
    tree = ["--draft-tokens", "4", "--draft-width", "2", "--draft-budget", "6"]
    assert main([*call, *tree]) == 0
    text = capsys.readouterr().out
    assert main([*call, *tree, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == text and "\x1b" not in err
    assert main([*call, *tree, "--stats", "--json"]) == 0
    out, again = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    rounds, drafted, accepted = (sum(row[name] for row in rows) for name in ("rounds", "drafted", "accepted"))
    tokens = sum(len(row["token_ids"]) for row in rows)
    share = f"{accepted / drafted:.0%}"
    first = f"speculation: {tokens / rounds:.2f} tokens a round, {accepted} of {drafted} drafts accepted ({share})"
    assert err.splitlines()[0] == again.splitlines()[0] == first
    table = [re.split("  +", line.strip()) for line in err.splitlines()[1:]]
    assert table[0] == ["accepted so far", "times", "then winner", "runner-up 1", "none"]
    at = next(i for i, line in enumerate(table) if line[0] == "time in")
    depths = table[1:at]
    assert [int(line[0]) for line in depths] == list(range(len(depths))) and 0 < len(depths) <= 4
    # every accepted draft was the winner or the runner-up of its draw
    shares = [[int(x.rstrip("%")) / 100 for x in line[2:]] for line in depths]
    hits = sum(int(line[1]) * (s[0] + s[1]) for line, s in zip(depths, shares))
    assert all(abs(sum(s) - 1) < 0.02 for s in shares) and hits >= accepted - 0.01 * sum(
        int(line[1]) for line in depths
    )
    assert table[at] == ["time in", "base", "tuned", "ref", "outside"] and table[at + 1][0] == "seconds"
    assert all(float(x) >= 0 for x in table[at + 1][1:]) and float(table[at + 1][1]) > 0
    assert err.splitlines()[-1].startswith("  speed over plain decoding: ")

    assert main([*call, "--draft-tokens", "auto", "--stats"]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"  speed over plain decoding: [\d.]+ times measured, [\d.]+ expected of the drafts .*", last)
    two = ["--tuned", str(zoo / "other"), "--draft-tokens", "2", "--stats"]
    assert main(["generate", *models(zoo), "--prompt", "go", "--max-new-tokens", "1", *two]) == 0
    assert capsys.readouterr().err.splitlines()[0] == "speculation: 1.00 tokens a round, 0 of 0 drafts accepted"
    assert main(["generate", *models(zoo), "--prompt", "go", "--max-new-tokens", "4", *two]) == 0
    assert re.search("time in +base +tuned 1 +tuned 2 +ref +outside", capsys.readouterr().err)


def test_every_models_end_of_text_ends_it(zoo, capsys, tmp_path):
    """Base's, tuned's and ref's, of config and generation config; and what --eos names by id or text."""
    call = ["--prompt", "and the king said", "--seed", "3", "--max-new-tokens", "20", "--json"]
    assert main(["generate", *models(zoo), *call]) == 0
    (free,) = lines(capsys)
    ids = free["token_ids"]
    assert len(ids) == 20 and 2 not in ids

    for i, (name, place) in enumerate(
        [
            ("base", "generation_config.json"),
            ("tuned", "generation_config.json"),
            ("ref", "config.json"),
            ("tuned", "config.json"),
        ]
    ):
        folder = tmp_path / f"{i}"
        shutil.copytree(zoo / name, folder)
        config = json.loads((folder / place).read_text())
        end = ids[3 + i]
        (folder / place).write_text(json.dumps(config | {"eos_token_id": [2, end] if "gen" in place else end}))
        assert main(["generate", *models(zoo, **{name: folder}), *call]) == 0
        (row,) = lines(capsys)
        assert row["token_ids"] == ids[: ids.index(end) + 1], (name, place)

    word = next(w for w in free["text"].split() if w.startswith("wé"))
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(zoo / "base").get_vocab()[word]
    for option in (str(end), word):
        assert main(["generate", *models(zoo), *call, "--eos", "0", "--eos", option]) == 0
        (row,) = lines(capsys)
        assert row["token_ids"] == ids[: ids.index(end) + 1] and word not in row["text"]
    assert main(["generate", *models(zoo), *call[:-1], "--stream", "--eos", word]) == 0
    assert capsys.readouterr().out.strip() == row["text"].strip()


@pytest.mark.parametrize("other", [{}, {"base": "reserved"}])
def test_chat_is_the_tuned_models(zoo, capsys, other):
    """Its template, its added tokens (the others' logits cover them), its end of turn."""
    from transformers import AutoTokenizer

    call = [
        "generate",
        *models(zoo, tuned="chat", **other),
        "--chat",
        "--prompt",
        "go see",
        "--json",
        "--greedy",
        "--max-new-tokens",
        "12",
    ]
    assert main(call) == 0
    (row,) = lines(capsys)
    tokenizer = AutoTokenizer.from_pretrained(zoo / "chat")
    want = tokenizer("<|user|> go see <|end|> <|assistant|>", add_special_tokens=False).input_ids
    assert row["prompt_tokens"] == len(want) == 5

    from eft_kernels.integrations.hf import end_of_turn

    assert end_of_turn(tokenizer) == [tokenizer.get_vocab()["<|end|>"]]
    tokenizer.chat_template = CHAT.replace(" <|end|>", "")
    assert end_of_turn(tokenizer) == []


def test_chat_stops_at_the_end_of_turn(zoo, capsys, tmp_path):
    """No model's configuration names it: the template does. It is made a word that the text holds anyway."""
    from transformers import AutoTokenizer

    call = ["--chat", "--prompt", "go see", "--json", "--seed", "3", "--max-new-tokens", "20"]
    assert main(["generate", *models(zoo, tuned="chat"), *call]) == 0
    (free,) = lines(capsys)
    word = next(w for w in free["text"].split()[3:] if w not in ("go", "see"))
    shutil.copytree(zoo / "chat", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.add_tokens([word], special_tokens=True)
    tokenizer.chat_template = CHAT.replace("<|end|>", "{{ '<|end|>' if m.role == 'user' else '" + word + "' }}")
    tokenizer.save_pretrained(tmp_path / "chat")
    assert main(["generate", *models(zoo, tuned=tmp_path / "chat"), *call]) == 0
    (row,) = lines(capsys)
    end = tokenizer.get_vocab()[word]
    assert row["token_ids"] == free["token_ids"][: free["token_ids"].index(end) + 1] and word not in row["text"]


def test_an_adapter_is_merged(zoo, capsys, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(zoo / "ref"), config)
    model.save_pretrained(tmp_path / "adapter")
    shutil.copytree(zoo / "ref", tmp_path / "merged")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    rows = []
    for tuned in ("adapter", "merged"):
        assert main(["generate", *models(zoo, tuned=tmp_path / tuned), "--prompt", "go", "--seed", "1", "--json"]) == 0
        rows += lines(capsys)
    assert rows[0] == rows[1]


def test_a_checkpoints_sampling_settings_are_not_ours(zoo, capsys):
    """Beams, penalties, a length and use_cache=False left in a model folder; the command line alone says how."""
    call = ["--prompt", "and the king", "--seed", "2", "--max-new-tokens", "12", "--json"]
    rows = []
    for base in ("base", "leftovers"):
        assert main(["generate", *models(zoo, base=base), *call]) == 0
        rows += lines(capsys)
    assert rows[0] == rows[1] and len(rows[0]["token_ids"]) > 9


def test_batch_files_of_any_make(zoo, capsys, tmp_path):
    """A byte-order mark, also where files were joined; Windows line ends; what str.splitlines() takes for line ends."""
    odd = "go\u2028see\u2029the\x85people\x0b\x0c\x1c\x1d\x1e of"
    text = "\r\n".join(
        [
            "\ufeff" + json.dumps({"prompt": "the king", "seed": 1}),
            "\ufeff" + json.dumps({"prompt": odd}, ensure_ascii=False),
            "go\u2028see\x0cthe",
            "",
            "王 é",
        ]
    )
    (tmp_path / "one").write_bytes(text.encode())
    (tmp_path / "two").write_text("land")
    call = ["generate", *models(zoo), "--max-new-tokens", "3", "--json", "--seed", "1"]
    assert main([*call, "--batch-file", str(tmp_path / "one"), "--batch-file", str(tmp_path / "two")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [r["prompt"] for r in rows] == ["the king", odd, "go\u2028see\x0cthe", "王 é", "land"]
    assert rows[0]["seed"] == 1


def test_standard_input_of_any_make(zoo, capsys, monkeypatch):
    call = ["generate", *models(zoo), "--max-new-tokens", "3", "--json", "--seed", "1"]

    def given(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        return main(call)

    assert given("\ufeffthe king\r\n王 é\r\n".encode()) == 0
    assert lines(capsys)[0]["prompt"] == "the king\n王 é"
    for data in (b"the \xff king", b"the \0 king", "the king".encode("utf-16")):
        assert given(data) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "standard input: cannot read it: not" in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_encoding_of_the_output_loses_work(zoo, encoding, monkeypatch, capsys):
    call = ["generate", *models(zoo), "--max-new-tokens", "9", "--seed", "1", "--prompt", "the king 王"]
    assert main([*call, "--json"]) == 0
    (want,) = lines(capsys)
    assert "王" in want["text"]
    for form in (["--json"], ["--stream"], [], ["--prompt", "é"]):
        with io.BytesIO() as out:
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
            assert main([*call, *form]) == 0, form
            got = out.getvalue().decode(encoding)
        if form == ["--json"]:
            assert json.loads(got) == want
        else:
            assert want["text"].encode(encoding, "backslashreplace").decode(encoding) in got
    capsys.readouterr()


def test_colour(monkeypatch):
    """On terminals, unless NO_COLOR is set to something."""
    from eft_kernels.cli.term import BOLD, paint

    ours, theirs = os.openpty()
    with open(ours, "rb"), open(theirs, "w") as terminal:
        for value, coloured in [(None, True), ("", True), ("1", False)]:
            monkeypatch.setenv("TERM", "xterm")
            monkeypatch.delenv("NO_COLOR", raising=False)
            if value is not None:
                monkeypatch.setenv("NO_COLOR", value)
            assert (paint("x", BOLD, stream=terminal) != "x") == coloured


def test_combinations(zoo, capsys):
    """Every mode reaches the library: interpolation at its ends is one tuned model; strengths matter."""
    call = ["--prompt", "and the king said", "--seed", "1", "--max-new-tokens", "10", "--json"]

    def ids(*options, **names):
        assert main(["generate", *models(zoo, **names), *options, *call]) == 0
        return lines(capsys)[0]["token_ids"]

    both = ["--tuned", str(zoo / "other")]
    assert ids(*both, "--lam", "1") == ids("--mode", "proxy") == ids("--mode", "upscale")
    assert ids(*both, "--lam", "0") == ids("--mode", "downscale", tuned="other")
    assert ids("--beta", "3") != ids() != ids("--mode", "proxy", "--alpha", "3")


def test_invalid_row_keeps_the_others(zoo, capsys, tmp_path):
    """A model that gives NaN for one prompt: its row ends with an error line and exit code 1, the other is whole."""
    word = sorted(set(TEXT.split()))[0]  # id 4, whose embedding is poisoned
    path = tmp_path / "batch"
    path.write_text(f"go see\n{word} the\n")
    call = ["generate", *models(zoo, ref="sick"), "--batch-file", str(path), "--max-new-tokens", "6", "--seed", "8"]
    assert main([*call, "--top-k", "1", "--json"]) == 1
    captured = capsys.readouterr()
    good, bad = map(json.loads, captured.out.splitlines())
    assert good["token_ids"] and "error" not in good
    assert bad["token_ids"] == [] and "step 0" in bad["error"]
    assert len(captured.err.splitlines()) == 1 and "line 2" in captured.err


# --- score ---------------------------------------------------------------------------------------------------------


def test_score_is_the_models_own_loss(zoo, capsys):
    """Against a direct computation with log_softmax over the same windows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (
        main(
            [
                "score",
                *models(zoo),
                "--truth",
                str(zoo / "truth"),
                "--text",
                str(zoo / "text.txt"),
                "--context",
                "64",
                "--stride",
                "24",
                "--beta",
                "1.5",
                "--json",
            ]
        )
        == 0
    )
    (got,) = lines(capsys)
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base")
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    loaded = {n: AutoModelForCausalLM.from_pretrained(zoo / n).double() for n in ("base", "tuned", "ref", "truth")}
    total, counted = dict.fromkeys([*loaded, "emulated"], 0.0), 0
    end = 0
    while end < len(ids):
        previous, end = end, min(len(ids), end + (24 if end else 64))
        begin = max(0, end - 64)
        row = torch.tensor([[1, *ids[begin:end]]])
        with torch.no_grad():
            logits = {n: m(row[:, :-1]).logits[0] for n, m in loaded.items()}
        logits["emulated"] = 1.5 * (logits["base"] - logits["ref"]) + logits["tuned"]
        for name, z in logits.items():
            lp = z.log_softmax(-1)[torch.arange(end - begin), row[0, 1:]]
            total[name] -= lp[previous - begin :].sum().item()
        counted += end - previous
    assert counted == len(ids) > 128  # more than the models can see at once
    for name, nats in total.items():
        s = got["scores"][name]
        assert s["tokens"] == counted
        assert s["nats_per_token"] == pytest.approx(nats / counted, abs=2e-5)
        assert s["perplexity"] == pytest.approx(torch.tensor(nats / counted).exp().item(), rel=1e-4)
    base, emulated, truth = (got["scores"][n]["nats_per_token"] for n in ("base", "emulated", "truth"))
    want = (base - emulated) / (base - truth) if base > truth else None
    assert got["recovered"] == (pytest.approx(want) if want is not None else None)
    assert got["context"] == 64 and got["stride"] == 24 and got["beta"] == 1.5


def test_windows_count_every_token_once():
    from eft_kernels.cli.score import windows

    ids = list(range(100, 200))
    for bos in (None, 7):
        for context, stride in [(100, 100), (30, 30), (30, 7), (64, 1), (500, 500)]:
            seen = [token for row, first in windows(ids, bos, context, stride) for token in row[first:]]
            assert seen == (ids if bos else ids[1:])
            for row, first in windows(ids, bos, context, stride)[1:]:
                assert len(row) - (bos is not None) == context and first > context - stride - (bos is None)


def test_score_table(zoo, capsys):
    assert main(["score", *models(zoo), "--text", str(zoo / "text.txt"), "--tuned", str(zoo / "other")]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:6]] == ["model", "base", "tuned", "tuned", "ref", "emulated"]
    assert "interpolate lam 0.5; windows of 128 tokens, stride 64" in out


def test_score_of_any_make_and_of_several(zoo, capsys, tmp_path):
    """A byte-order mark and Windows line ends do not count; every --text is scored."""
    (tmp_path / "windows").write_bytes(b"\xef\xbb\xbf" + TEXT.replace(". ", ".\r\n").encode())
    (tmp_path / "short").write_text(TEXT[:200])
    call = ["score", *models(zoo)]
    texts = [str(zoo / "text.txt"), str(tmp_path / "windows"), str(tmp_path / "short")]
    assert main([*call, "--json", *(x for t in texts for x in ("--text", t))]) == 0
    rows = lines(capsys)
    assert [r["text"] for r in rows] == texts
    assert rows[0]["scores"] == rows[1]["scores"] != rows[2]["scores"]
    assert main([*call, "--json", "--text", texts[2]]) == 0
    assert lines(capsys) == rows[2:]
    assert main([*call, "--text", texts[0], "--text", texts[2]]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [t in out for t in texts] == [True, False, True] and sum("emulated" in line for line in out) == 2


def test_score_of_a_sick_model(zoo, capsys):
    """NaN is no score: exit code 1, a line for each, null in JSON."""
    assert main(["score", *models(zoo, ref="sick"), "--text", str(zoo / "text.txt"), "--json"]) == 1
    out, err = capsys.readouterr()
    scores = json.loads(out, parse_constant=lambda name: pytest.fail(name))["scores"]
    assert scores["ref"]["perplexity"] is scores["emulated"]["nats_per_token"] is None and scores["base"]["perplexity"]
    assert [": ref: " in line or ": emulated: " in line for line in err.splitlines()] == [True, True]


# --- demo, bench, doctor -------------------------------------------------------------------------------------------


def test_demo(family, capsys):
    assert main(["demo", "--family", str(family / "weights"), "--new-tokens", "6", "--heldout-tokens", "256"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out, "escape codes off a terminal"
    order = [
        "1  The result",
        "recovers ",
        "what really fine-tuning the large one gains",
        "A sampling step takes ",
        "eager PyTorch",
        "gap recovered",
        "2  What they write",
        "really fine-tuned",
        "3  Speculation",
        "Next, ",
    ]
    places = [out.index(words) for words in order]
    assert places == sorted(places) and "truth" not in out
    assert "coupled wrote exactly the tokens of plain decoding" in out
    table = out[out.index("method") :].splitlines()
    assert [re.split("  +", row.strip())[:2] for row in table[2:11]] == [
        *(["coupled", k] for k in "248"),
        ["coupled, a tree", "4"],
        ["coupled", "auto"],
        *([m, k] for m in ("token", "block") for k in "24"),
    ]
    assert "auto expects " in out
    command = out[out.index("Next, ") :].partition(":")[2].replace("\\\n", "")  # what one is told to try works
    command = shlex.split(command)
    assert main([*command[command.index("generate") :], "--max-new-tokens", "3"]) == 0


def test_demo_tells_a_step_that_is_no_faster(capsys):
    from eft_kernels.cli import demo

    assert demo.times_as_fast(50.0, 3500.0) == "70 times faster than"
    assert demo.times_as_fast(50.0, 200.0) == "4.0 times as fast as"
    assert demo.times_as_fast(50.0, 20.0) == "0.4 times as fast as"
    assert [demo.shown(x) for x in (48.21, 999.4, 999.6, 4390.0)] == ["48.2 us", "999 us", "1 ms", "4.39 ms"]


def test_demo_times_nothing_on_wrong_tokens(family, capsys, monkeypatch):
    from eft_kernels.bench import run as runs

    def gate(*args):
        raise runs.WrongTokens("ours is not the reference")

    monkeypatch.setattr(runs, "gate", gate)
    assert main(["demo", "--family", str(family / "weights"), "--new-tokens", "2", "--heldout-tokens", "256"]) == 1
    out, err = capsys.readouterr()
    assert "ours is not the reference" in err and "A sampling step" not in out


def test_demo_scores_agree_with_score(family, capsys):
    """The demo's held-out table is `score` of the same windows."""
    from transformers import AutoTokenizer

    from eft_kernels.cli import demo

    tokenizer = AutoTokenizer.from_pretrained(family / "weights" / "base")
    rows = demo.heldout_windows((family / "heldout" / "a.txt").read_text(), tokenizer, 600)
    assert len(rows) == 2 and all(len(row) == 257 and row[0] == 1 and first == 1 for row, first in rows)
    flat = [token for row, _ in rows for token in row[1:]]
    chapter = [*tokenizer(TEXT, add_special_tokens=False).input_ids, 2]
    assert flat == (chapter * 3)[:512]


SMALL = ["--vocab", "2000", "--threads", "1", "--against", "lean"]


def test_bench_table(capsys):
    assert main(["bench", "--batch", "2", "--rounds", "3", *SMALL]) == 0
    out, err = capsys.readouterr()
    header, *table = out.splitlines()
    assert header.split()[:3] == ["variant", "B", "ours"] and "lean PyTorch" in header and "eager" not in header
    assert [line.split()[:2] for line in table[:3]] == [["plain", "2"], ["top_p", "2"], ["with_logprobs", "2"]]
    assert all(line.endswith("x)") for line in table[:3]) and "V = 2000" in out and "GB/s" in out
    assert err.splitlines()[0].startswith("[0/3] sample plain B=2 V=2000") and err.splitlines()[-1] == "[3/3] done"


@pytest.fixture(scope="module")
def bench_rows(tmp_path_factory):
    """What `bench --json` writes, run from elsewhere by a copy of the package alone."""
    folder = tmp_path_factory.mktemp("copy")
    root = os.path.dirname(os.path.dirname(eft.__file__))
    shutil.copytree(
        os.path.join(root, "eft_kernels"), folder / "eft_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = folder / "rows.jsonl"
    p = program(
        "bench",
        "--op",
        "sample",
        "--batch",
        "1",
        "--rounds",
        "5",
        *SMALL,
        "--json",
        str(path),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0 and out, err
    return path


def test_bench_json(bench_rows):
    rows = [json.loads(line) for line in bench_rows.read_text().splitlines()]
    assert {r["implementation"] for r in rows} == {"eft", "combine_max", "lean"}
    for r in rows:
        assert r["schema"] == 1 and r["threads"] == 1 and r["batch"] == 1 and r["vocab"] == 2000
        assert r["command"].startswith("eft-kernels bench --op sample") and r["commit"] is None is r["dirty"]
        assert r["status"] != "measured" or 0 < r["p20_us"] <= r["median_us"] <= r["p80_us"]


def test_bench_compare_and_check(bench_rows, tmp_path, capsys):
    """`--check A` measures A's shapes again; A's times of ours are a million times too short, or too long: no noise."""
    rows = [json.loads(line) for line in bench_rows.read_text().splitlines()]

    def altered(name, **factors):
        path, times = tmp_path / name, ("median_us", "p20_us", "p80_us")
        kept = [r for r in rows if r["variant"] in factors and r["implementation"] != "combine_max"]
        by = [factors[r["variant"]] if r["implementation"] == "eft" else 1 for r in kept]
        path.write_text("".join(json.dumps(r | {t: r[t] * x for t in times}) + "\n" for r, x in zip(kept, by)))
        return str(path)

    short, long = altered("short", plain=1e-6, top_p=1e6), altered("long", plain=1e6)
    assert main(["bench", "--check", short, "--rounds", "3"]) == 1
    out, err = capsys.readouterr()
    own = {line.split()[1]: line.split()[-1] for line in out.splitlines() if "eft-kernels" in line}
    assert own == {"plain": "slower", "top_p": "faster"} and "2 times of ours: 1 slower, 1 faster" in out
    assert err.startswith("[0/2] ")
    assert main(["bench", "--check", long, "--rounds", "3"]) == 0
    assert main(["bench", "--check", short, str(bench_rows)]) == 1
    assert main(["bench", "--compare", short, str(bench_rows)]) == 0
    capsys.readouterr()
    empty = tmp_path / "empty"
    empty.write_text("")
    assert main(["bench", "--compare", str(bench_rows), str(empty)]) == 2
    assert "no measurement in common" in capsys.readouterr().err
    assert main(["bench", "--check", str(empty)]) == 2
    assert "no measurement of ours on this device" in capsys.readouterr().err
    odd = tmp_path / "odd"
    text = [json.dumps(r | {"command": "x\u2028y"}, ensure_ascii=False) for r in rows]
    odd.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(text).encode())
    assert main(["bench", "--compare", str(bench_rows), str(odd)]) == 0
    capsys.readouterr()


def test_bench_refuses_wrong_tokens(monkeypatch, capsys):
    """The gate: a sampler that is one token off is not timed."""
    sample = ops.sample

    def off_by_one(*args, backend="auto", **kwargs):
        out = sample(*args, backend=backend, **kwargs)
        return out if backend == "reference" else out._replace(tokens=out.tokens ^ 1)

    monkeypatch.setattr(ops, "sample", off_by_one)
    assert main(["bench", "--batch", "1", "--vocab", "1000", "--rounds", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "nothing is timed" in err


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"eft-kernels {eft.__version__}" in text and torch.__version__ in text and "reference" in text
    assert main(["doctor", "--json"]) == 0
    (found,) = lines(capsys)
    assert found["works"] and set(found["backends"]) == set(eft.backends())
    assert found["extension"]["built"] == found["backends"]["cpu"]["available"]


def test_doctor_fails_when_sampling_is_wrong(monkeypatch, capsys):
    sample = eft.sample
    monkeypatch.setattr(
        eft,
        "sample",
        lambda *a, backend="auto", **k: (
            sample(*a, backend=backend, **k) if backend == "reference" else sample(*a, **{**k, "seed": 123})
        ),
    )
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


# --- bad input -----------------------------------------------------------------------------------------------------

BAD = {
    "no command": ([], "command"),
    "unknown command": (["fry"], "'fry'"),
    "unknown option": (["doctor", "--frob"], "--frob"),
    "missing model option": (["generate", "--base", "{zoo}/base"], "--tuned, --ref"),
    "missing folder": (["generate", "{models}", "--ref", "{zoo}/nowhere"], "{zoo}/nowhere: no such folder"),
    "missing relative folder": (["generate", "{models}", "--ref", "./nowhere"], "./nowhere: no such folder"),
    "a file": (["generate", "{models}", "--ref", "{zoo}/text.txt"], "is a file"),
    "not a model folder": (["generate", "{models}", "--ref", "{zoo}/empty"], "not a model folder (it has no config"),
    "no weights": (["generate", "{models}", "--ref", "{zoo}/weightless"], "cannot load it"),
    "encoder-decoder": (["generate", "{models}", "--ref", "{zoo}/seq2seq"], "encoder-decoder"),
    "hub id offline": (["generate", "{models}", "--ref", "some/model"], "the hub cannot be reached"),
    "tokenizers differ": (["generate", "{models}", "--ref", "{zoo}/stranger"], "tokenizers: "),
    "truth's tokenizer differs": (
        ["score", "{models}", "--text", "{zoo}/text.txt", "--truth", "{zoo}/stranger"],
        "tokenizers: ",
    ),
    "three tuned": (["generate", "{models}", "--tuned", "{zoo}/other", "--tuned", "{zoo}/other"], "one or two"),
    "empty prompt": (["generate", "{models}", "--prompt", " "], "--prompt: the prompt is empty"),
    "empty second prompt": (["generate", "{models}", "--prompt", "go", "--prompt", ""], "--prompt 2: the prompt is"),
    "prompt and batch": (["generate", "{models}", "--prompt", "go", "--batch-file", "{zoo}/text.txt"], "pass one"),
    "prompt too long": (["generate", "{models}", "--prompt", "go " * 200], "context"),
    "no batch file": (["generate", "{models}", "--batch-file", "{zoo}/none"], "No such file"),
    "empty batch file": (["generate", "{models}", "--batch-file", "{zoo}/blank"], "holds no prompt"),
    "batch file, bad JSON": (["generate", "{models}", "--batch-file", "{zoo}/bad1"], "line 2: not JSON"),
    "batch file, no prompt": (["generate", "{models}", "--batch-file", "{zoo}/bad2"], 'line 1: expected "prompt"'),
    "batch file, unknown": (["generate", "{models}", "--batch-file", "{zoo}/bad3"], "line 1: unknown option 'heat'"),
    "batch file, range": (["generate", "{models}", "--batch-file", "{zoo}/bad4"], "line 1: top_p: got 2"),
    "batch file, mode": (["generate", "{models}", "--batch-file", "{zoo}/bad5"], "line 1: alpha does not belong"),
    "temperature": (["generate", "{models}", "--temperature", "-1"], "got '-1', allowed is 0 to 1e30"),
    "temperature nan": (["generate", "{models}", "--temperature", "nan"], "allowed is 0 to 1e30"),
    "top-p 0": (["generate", "{models}", "--top-p", "0"], "--top-p: got '0', allowed is in (0, 1]"),
    "top-k fraction": (["generate", "{models}", "--top-k", "1.5"], "--top-k: got '1.5', allowed is an integer >= 0"),
    "min-p": (["generate", "{models}", "--min-p", "1.1"], "--min-p: got '1.1'"),
    "upscale-top-p": (["generate", "{models}", "--upscale-top-p", "0"], "--upscale-top-p: got '0'"),
    "draft tokens": (
        ["generate", "{models}", "--draft-tokens", "-1"],
        "--draft-tokens: got '-1', allowed is an integer >= 0 or auto",
    ),
    "draft tokens, a word": (["generate", "{models}", "--draft-tokens", "all"], "--draft-tokens: got 'all'"),
    "draft width 0": (["generate", "{models}", "--draft-width", "0"], "--draft-width: got '0'"),
    "draft width": (
        ["generate", "{models}", "--draft-tokens", "2", "--draft-width", "17"],
        "--draft-width: got 17, allowed is 1 to 16",
    ),
    "draft width alone": (["generate", "{models}", "--draft-width", "2"], "--draft-width 2: goes with --draft-tokens"),
    "a tree by token": (
        ["generate", "{models}", "--draft-tokens", "2", "--draft-width", "2", "--verify", "token"],
        "--draft-width: got 2, allowed is 1 with --verify='token'",
    ),
    "too large a tree": (
        ["generate", "{models}", "--draft-tokens", "9", "--draft-width", "3"],
        "1024; give --draft-budget",
    ),
    "draft budget": (
        ["generate", "{models}", "--draft-tokens", "4", "--draft-width", "2", "--draft-budget", "3"],
        "--draft-budget: got 3, allowed is 4 to 1024, --draft-tokens or more",
    ),
    "draft budget of a chain": (
        ["generate", "{models}", "--draft-tokens", "4", "--draft-budget", "8"],
        "--draft-width",
    ),
    "draft budget alone": (["generate", "{models}", "--draft-budget", "2"], "--draft-budget 2: goes with --draft-tok"),
    "stats alone": (["generate", "{models}", "--stats"], "--stats: goes with --draft-tokens"),
    "stats and no drafts": (
        ["generate", "{models}", "--stats", "--draft-tokens", "0"],
        "--stats: goes with --draft-tok",
    ),
    "gguf and auto": (
        ["generate", "--gguf", "b", "t", "r", "--draft-tokens", "auto"],
        "--draft-tokens auto: goes without --gguf; llama.cpp takes --draft-tokens K, a chain",
    ),
    "gguf and a tree": (
        ["generate", "--gguf", "b", "t", "r", "--draft-tokens", "2", "--draft-width", "2"],
        "--draft-width: goes without --gguf",
    ),
    "gguf and a budget": (
        ["generate", "--gguf", "b", "t", "r", "--draft-tokens", "2", "--draft-budget", "2"],
        "--draft-budget: goes without --gguf",
    ),
    "verify": (["generate", "{models}", "--verify", "guess"], "'guess'"),
    "max new tokens": (["generate", "{models}", "--max-new-tokens", "0"], "--max-new-tokens: got '0'"),
    "seed": (["generate", "{models}", "--seed", "x"], "--seed: got 'x', allowed is a 64-bit integer"),
    "beta of another mode": (["generate", "{models}", "--mode", "proxy", "--beta", "2"], "--beta: goes with"),
    "lam alone": (["generate", "{models}", "--lam", "0.5"], "--lam: goes with two --tuned"),
    "mode and two tuned": (["generate", "{models}", "--tuned", "{zoo}/other", "--mode", "proxy"], "leave --mode out"),
    "filter and two tuned": (
        ["generate", "{models}", "--tuned", "{zoo}/other", "--upscale-top-p", "0.5"],
        "upscale_top_p",
    ),
    "vocab size": (["generate", "{models}", "--vocab-size", "100000"], "--vocab-size: got 100000"),
    "device": (["generate", "{models}", "--device", "abacus"], "--device abacus"),
    "device without values": (["generate", "{models}", "--device", "meta"], "--device meta"),
    "no chat template": (["generate", "{models}", "--chat"], "no chat template"),
    "tuned is ref": (["generate", "{models}", "--tuned", "{zoo}/ref"], "{zoo}/ref: is the model of --ref"),
    "tuned is ref, otherwise spelled": (
        ["score", "{models}", "--text", "{zoo}/text.txt", "--tuned", "{zoo}/same"],
        "is the model of --ref",
    ),
    "adapter without peft": (["generate", "{models}", "--tuned", "{zoo}/adapter"], "{zoo}/adapter: is a PEFT adapter")
    if importlib.util.find_spec("peft") is None
    else (["generate", "{models}", "--tuned", "{zoo}/adapter"], "cannot load the adapter"),
    "token that no logits are for": (["generate", "{models}", "--base", "{zoo}/chatty"], "has tokens from id "),
    "chat token in a word's place": (
        ["generate", "{models}", "--base", "{zoo}/taken", "--tuned", "{zoo}/chat"],
        "allowed are models that share their ids",
    ),
    "tokenizer does not load": (["generate", "{models}", "--ref", "{zoo}/garbled"], "cannot load its tokenizer"),
    "weights are missing": (["generate", "{models}", "--ref", "{zoo}/headless"], "weights are missing: lm_head.weight"),
    "name too long": (["generate", "{models}", "--ref", "x" * 5000], "File name too long"),
    "no such user": (["generate", "{models}", "--ref", "~nobody-here/x"], "~nobody-here/x: no such folder"),
    "base twice": (["generate", "{models}", "--base", "{zoo}/base"], "argument --base: given twice"),
    "eos": (["generate", "{models}", "--eos", "no such token"], "--eos: got 'no such token', allowed is an id from 0"),
    "eos range": (["generate", "{models}", "--eos", "100000"], "--eos: got '100000'"),
    "eos bytes": (["generate", "{models}", "--eos", "\udcff"], "--eos: not valid Unicode text"),
    "greedy and temperature": (["generate", "{models}", "--greedy", "--top-k", "3"], "--top-k: goes without --greedy"),
    "greedy and a line's": (["generate", "{models}", "--greedy", "--batch-file", "{zoo}/warm"], "line 1: temperature"),
    "verify alone": (["generate", "{models}", "--verify", "token"], "--verify token: goes with --draft-tokens"),
    "threads": (["generate", "{models}", "--threads", "1000000000"], "--threads: got 1000000000, allowed is 1 to "),
    "prompt bytes": (["generate", "{models}", "--prompt", "go \udcff"], "--prompt: not valid Unicode text ('\\udcff'"),
    "batch file, surrogate": (["generate", "{models}", "--batch-file", "{zoo}/bad6"], "line 1: not valid Unicode text"),
    "batch file, twice": (["generate", "{models}", "--batch-file", "{zoo}/bad7"], "not JSON: a name occurs twice"),
    "batch file, deep": (["generate", "{models}", "--batch-file", "{zoo}/bad8"], "line 1: not JSON"),
    "batch file, seed": (["generate", "{models}", "--batch-file", "{zoo}/bad9"], "seed: got 9223372036854775808"),
    "batch file, UTF-16": (["generate", "{models}", "--batch-file", "{zoo}/utf16"], "not UTF-8 text but UTF-16"),
    "batch file, zero": (["generate", "{models}", "--batch-file", "{zoo}/zero"], "a zero byte at offset 2"),
    "batch file, bytes": (["generate", "{models}", "--batch-file", "{zoo}/bytes"], "byte 0xff at offset 3"),
    "batch file, folder": (["generate", "{models}", "--batch-file", "{zoo}"], "Is a directory"),
    "UTF-32 text": (["score", "{models}", "--text", "{zoo}/utf32"], "not UTF-8 text but UTF-32"),
    "one of two texts": (["score", "{models}", "--text", "{zoo}/text.txt", "--text", "{zoo}/blank"], "file is empty"),
    "held-out text": (["demo", "--family", "{family}/weights", "--heldout", "{zoo}/heldout"], "not UTF-8 text"),
    "bench bytes": (["bench", "--compare", "{zoo}/binary", "{zoo}/binary"], "binary: not UTF-8 text"),
    "stream and json": (["generate", "{models}", "--stream", "--json"], "--stream: goes with one prompt"),
    "no text": (["score", "{models}", "--text", "{zoo}/none"], "No such file"),
    "text is a folder": (["score", "{models}", "--text", "{zoo}"], "Is a directory"),
    "empty text": (["score", "{models}", "--text", "{zoo}/blank"], "the file is empty"),
    "binary text": (["score", "{models}", "--text", "{zoo}/binary"], "not UTF-8"),
    "short text": (["score", "{models}", "--text", "{zoo}/short"], "too short"),
    "context too long": (["score", "{models}", "--text", "{zoo}/text.txt", "--context", "129"], "--context: got 129"),
    "stride too long": (
        ["score", "{models}", "--text", "{zoo}/text.txt", "--context", "9", "--stride", "10"],
        "--stride: got 10",
    ),
    "no family": (["demo", "--family", "{zoo}/nowhere"], "no folder ref in it"),
    "no held-out text": (["demo", "--family", "{family}/weights", "--heldout", "{zoo}"], "no file a.txt"),
    "bench vocabulary": (["bench", "--vocab", "10"], "--vocab: got 10"),
    "bench threads": (["bench", "--threads", "0"], "--threads: got '0'"),
    "bench cores": (["bench", "--threads", "10000"], "--threads: got 10000, allowed is 1 to "),
    "bench device": (["bench", "--device", "abacus"], "'abacus'"),
    **(
        {}
        if torch.cuda.is_available()
        else {"bench without a GPU": (["bench", "--device", "cuda"], "--device cuda: no CUDA device is here")}
    ),
    "bench op": (["bench", "--op", "fry"], "--op: got 'fry', allowed is sample, verify"),
    "bench baseline": (["bench", "--against", "magic"], "--against: got 'magic', allowed is eager"),
    "bench json": (["bench", "--json", "{zoo}"], "--json"),
    "bench no file": (["bench", "--compare", "{zoo}/none", "{zoo}/none"], "No such file"),
    "bench no rows": (["bench", "--check", "{zoo}/bad1"], "bad1:1: not a row"),
    "bench three files": (["bench", "--check", "a", "b", "c"], "got 3 files, allowed is A or A B"),
    "bench both": (["bench", "--check", "a", "--compare", "a", "b"], "pass one of --compare and --check"),
    "bench files and shapes": (["bench", "--check", "a", "--batch", "1"], "--batch: the files of"),
    "bench files and rounds": (["bench", "--compare", "a", "b", "--rounds", "1"], "nothing is measured"),
}


@pytest.fixture(scope="session")
def bad_files(zoo):
    for name, text in {
        "blank": " \n",
        "short": "king",
        "bad1": 'go\n{"prompt": \n',
        "bad2": '{"text": "go"}',
        "bad3": '{"prompt": "go", "heat": 1}',
        "bad4": '{"prompt": "go", "top_p": 2}',
        "bad5": '{"prompt": "go", "alpha": 2}',
        "bad6": '{"prompt": "go \\ud800"}',
        "bad7": '{"prompt": "go", "prompt": "see"}',
        "bad8": '{"prompt": ' + "[" * 100000,
        "bad9": '{"prompt": "go", "seed": 9223372036854775808}',
        "warm": '{"prompt": "go", "temperature": 0.5}',
        "zero": "go\0",
    }.items():
        (zoo / name).write_text(text)
    for name, data in {
        "binary": b"\xff\xfe\x00",
        "bytes": b"go \xff",
        "utf16": "go".encode("utf-16"),
        "utf32": "go".encode("utf-32"),
    }.items():
        (zoo / name).write_bytes(data)
    (zoo / "heldout").mkdir()
    for style in "ab":
        (zoo / "heldout" / f"{style}.txt").write_bytes(b"go \xff")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2(case, zoo, family, bad_files, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", None)
    argv, expected = BAD[case]
    own = {a for a in argv if a.startswith("--")}
    argv = [y for a in argv for y in (models(zoo) if a == "{models}" else [a])]
    if "generate" in argv[:1] and not own & {"--prompt", "--batch-file"}:
        argv += ["--prompt", "go"]
    for option in own & {"--ref", "--base"} if case != "base twice" else ():  # the case's own replaces the good one
        at = argv.index(option)
        del argv[at : at + 2]
    argv, (expected,) = (
        [x.format(zoo=zoo, family=family) if "{zoo}" in x or "{family}" in x else x for x in part]
        for part in (argv, [expected])
    )
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, (out, err)
    assert err.startswith("eft-kernels") and "error: " in err and expected in err


def test_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(c in out for c in ("generate", "score", "demo", "bench", "doctor"))


def test_no_prompt(zoo, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", *models(zoo)]) == 2
    assert "no prompt" in capsys.readouterr().err


# --- as a program --------------------------------------------------------------------------------------------------


def program(*argv, **kwargs):
    """The command line in a process that hears Ctrl-C, also where the tests run in the background."""
    kwargs.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(
        [sys.executable, "-m", "eft_kernels", *argv],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def test_program(zoo, tmp_path):
    """From another folder, the prompt on standard input; the exit code is main's."""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(eft.__file__))}
    p = program(
        "generate",
        *models(zoo),
        "--max-new-tokens",
        "4",
        "--seed",
        "1",
        stdin=subprocess.PIPE,
        cwd=tmp_path,
        env=environment,
    )
    out, err = p.communicate("the people", timeout=120)
    assert p.returncode == 0 and out.strip() and err == "", err
    p = program("score", cwd=tmp_path, env=environment)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 2 and out == "" and len(err.splitlines()) == 1


def test_output_that_cannot_be_written(zoo, tmp_path):
    """A full disk, a closed stream: one line and a code other than 0; a line lost on a closed stderr is lost alone."""
    call = ["generate", *models(zoo), "--max-new-tokens", "4", "--seed", "1", "--prompt"]
    with open("/dev/full", "w") as full:
        p = subprocess.run(
            [sys.executable, "-m", "eft_kernels", *call, "go"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert p.returncode == 1 and len(p.stderr.splitlines()) == 1 and "No space left on device" in p.stderr
    p = program(*call, "go", preexec_fn=lambda: os.close(1))
    _, err = p.communicate(timeout=120)
    assert p.returncode == 2 and err == "eft-kernels: error: standard output is closed\n"
    p = program(*call, " ", preexec_fn=lambda: os.close(2))
    out, _ = p.communicate(timeout=120)
    assert p.returncode == 2 and out == ""


def test_an_argument_is_utf8_whatever_the_locale(zoo):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    p = program("generate", *models(zoo), "--json", "--prompt", "wé王1", "--max-new-tokens", "2", env=environment)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0 and json.loads(out)["prompt"] == "wé王1" and json.loads(out)["prompt_tokens"] == 2, err


FOREIGN = """
open({mark!r}, "a").write("ran ")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_a_models_own_code_runs_only_when_told(zoo, tmp_path, where):
    """Not for a "y" on standard input either, which transformers takes for consent."""
    folder, mark = tmp_path / "foreign", tmp_path / "mark"
    shutil.copytree(zoo / "tuned", folder)
    (folder / "code.py").write_text(FOREIGN.format(mark=str(mark)))
    name, own = {
        "model": (
            "config.json",
            {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}},
        ),
        "tokenizer": (
            "tokenizer_config.json",
            {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "code.Words"]}},
        ),
    }[where]
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | own))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for option in ([], ["--trust-remote-code"]):
        p = program(
            "generate",
            *models(zoo, tuned=folder),
            "--prompt",
            "go",
            "--json",
            *option,
            stdin=subprocess.PIPE,
            env=environment,
        )
        out, err = p.communicate("y\n" * 9, timeout=120)
        assert mark.exists() == bool(option), err
        if option:
            assert p.returncode == 0 and json.loads(out)["token_ids"], err
        else:
            assert p.returncode == 2 and out == "" and len(err.splitlines()) == 1 and "--trust-remote-code" in err


def test_interrupt_keeps_what_is_done(zoo, tmp_path):
    """Rows are printed as they are done, in the file's order; at Ctrl-C also those that wait for an earlier one."""
    path = tmp_path / "batch"
    path.write_text("go\n" + "go see the people\n" * 5 + "go see\n" * 5000)
    p = program(
        "generate",
        *models(zoo),
        "--batch-file",
        str(path),
        "--batch-size",
        "1",
        "--json",
        "--max-new-tokens",
        "4",
        "--threads",
        "1",
    )
    first = p.stdout.readline()  # it is at work: the shortest prompt is first
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    prompts = [json.loads(line)["prompt"] for line in [first, *out.splitlines()]]
    assert p.returncode in (130, -signal.SIGINT) and "Traceback" not in err
    assert 1 < len(prompts) < 5000 and prompts[0] == "go" and set(prompts[1:]) == {"go see"}


def test_interrupt_is_quiet(zoo):
    """Ctrl-C while it works: exit code 130 and no traceback. A shell says 130, too, of a process that SIGINT has ended,
    as CPython ends itself where the interrupt went through an exec() on the way, of an import for instance."""
    p = program("bench", "--batch", "4", "--rounds", "1000000", "--vocab", "1000")
    assert p.stderr.readline()  # the first line of progress: it is at work
    time.sleep(0.3)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode in (130, -signal.SIGINT) and "Traceback" not in err, err
