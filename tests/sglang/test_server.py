"""`eft-kernels compose`, then `sglang serve` on the folder, asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from engine import ENVIRONMENT, HERE

from tests.vllm.shipped import PROMPTS


@pytest.fixture(scope="module")
def server(compose):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(HERE), "serve", "--model-path", compose(), "--port", str(port)]
    command += "--sampling-backend eft --device cpu --dtype float32 --attention-backend torch_native".split()
    command += "--disable-cuda-graph --max-total-tokens 4096 --max-running-requests 6 --served-model-name eft".split()
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT)
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


def ask(server, body: dict):
    data = json.dumps({"model": "eft", **body}).encode()
    request = urllib.request.Request(f"{server}/v1/completions", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def test_completion_and_stream(server, family):
    body = dict(prompt=PROMPTS[0], max_tokens=16, temperature=0.9, seed=4, custom_params={"eft": {"beta": 1.4}})
    text = json.load(ask(server, body))["choices"][0]["text"]
    wanted = family.generate(
        dict(prompt=PROMPTS[0], max_tokens=16, temperature=0.9, seed=4, extra_args=body["custom_params"])
    )
    assert text == family.tokenizer.decode(wanted, skip_special_tokens=True)
    lines = [line.decode().strip() for line in ask(server, body | {"stream": True})]
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]" and len(events) > 8
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events) == text


@pytest.mark.parametrize(
    "more,words",
    [
        (dict(custom_params={"eft": {"gamma": 1}}), "'gamma', allowed are beta, alpha, upscale_top_p"),
        (dict(return_hidden_states=True), "return_hidden_states: they would be those of base"),
    ],
)
def test_bad_requests_are_the_clients(server, more, words):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, dict(prompt="And", max_tokens=4, **more))
    assert refused.value.code == 400
    assert words in refused.value.read().decode()
    assert json.load(ask(server, dict(prompt="And", max_tokens=4)))["choices"]
