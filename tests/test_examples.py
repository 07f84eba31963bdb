"""The examples run, and every request gets the text that `eft.hf.generate` writes for it alone."""

import contextlib
import dataclasses
import http.client
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_own_loop(monkeypatch, capsys):
    out = run("own_loop.py", monkeypatch, capsys)
    assert out.count("tokens [") == 7 and "of 3 drafts accepted" in out


def test_with_transformers(monkeypatch, capsys):
    pytest.importorskip("transformers")
    out = run("with_transformers.py", monkeypatch, capsys)
    assert "In the morning ..." in out and "of the drafts accepted" in out


def test_continuous_batching(monkeypatch, capsys):
    pytest.importorskip("transformers")
    out = run("continuous_batching.py", monkeypatch, capsys)
    assert "slots hold [0, 3, 2]" in out  # one joined where another had left
    assert out.strip().endswith("every text equal to that of eft.hf.generate alone")


# --- the batch -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples():
    """The modules continuous_batching and server."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import continuous_batching
        import server
    finally:
        sys.path.remove(str(EXAMPLES))
    return continuous_batching, server


@pytest.fixture(scope="module")
def family(examples):
    return examples[0].load()  # models, tokenizer


PROMPTS = ("And the king said", "In the morning", "The young man", "It is a truth that every one of them", "My")


def requests(examples, tokenizer, number, seed=0):
    """Requests that have everything of their own."""
    rng = random.Random(seed)
    for _ in range(number):
        yield examples[0].Request(
            tokenizer(rng.choice(PROMPTS)).input_ids,
            rng.randint(1, 24),
            seed=rng.getrandbits(63),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.2]),
            top_p=rng.choice([1.0, 0.9]),
            beta=rng.choice([0.0, 0.5, 1.0, 1.5]),
        )


def test_nobodys_text_depends_on_the_others(examples, family):
    """Requests join at random times, some leave early: what they have is what they would have alone."""
    models, tokenizer = family
    batch, rng = examples[0].Batch(models, slots=3, max_len=48), random.Random(5)
    waiting, begun = list(requests(examples, tokenizer, 14)), []
    while waiting or any(batch.running):
        while waiting and None in batch.running and rng.random() < 0.6:
            begun.append(waiting.pop())
            batch.join(begun[-1])
        if not any(batch.running):
            continue
        before = {request: len(request.tokens) for request in batch.running if request}
        assert batch.step() == list(before)
        assert all(len(request.tokens) == n + 1 for request, n in before.items())
        if any(batch.running) and rng.random() < 0.05:
            batch.leave(rng.choice([request for request in batch.running if request]), "gone")
    assert {"gone", "length"} <= {request.finish for request in begun}
    for request in begun:
        count = len(request.tokens)
        assert request.finish == "gone" or count == request.max_tokens
        if count:
            alone = examples[0].alone(models, dataclasses.replace(request, max_tokens=count))
            assert request.tokens == alone


def test_a_row_that_fails_and_one_that_ends(examples, family):
    models, tokenizer = family
    batch = examples[0].Batch(models, slots=3, max_len=48)
    failing, ending, other = (dataclasses.replace(r, max_tokens=9) for r in requests(examples, tokenizer, 3))
    for request in (failing, ending, other):
        batch.join(request)
    batch.step()
    batch.logits[1][0] = float("nan")
    batch.step()
    expected = examples[0].alone(models, ending)
    batch.ends = {expected[2]}
    batch.step()
    batch.ends = set()
    while any(batch.running):
        batch.step()
    assert (failing.finish, ending.finish, other.finish) == ("error", "stop", "length")
    assert len(failing.tokens) == 1
    assert ending.tokens == expected[:3]
    assert other.tokens == examples[0].alone(models, other)


def test_a_request_that_does_not_fit_is_refused(examples, family):
    batch = examples[0].Batch(family[0], slots=1, max_len=16)
    with pytest.raises(ValueError, match="16 tokens together"):
        batch.join(examples[0].Request([5] * 10, 7, seed=0))
    assert batch.running == [None]
    batch.join(examples[0].Request([5] * 10, 6, seed=0))


def test_what_is_left_in_a_slot_reaches_nobody(examples, family):
    models, tokenizer = family
    batch = examples[0].Batch(models, slots=2, max_len=32)
    for cache in batch.caches:
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
    first, second = (examples[0].Request(tokenizer("My").input_ids, 8, seed) for seed in range(2))
    batch.join(first)
    batch.step()
    batch.join(second)
    while any(batch.running):
        batch.step()
    assert all(request.tokens == examples[0].alone(models, request) for request in (first, second))


def test_a_free_slot_may_wait_for_longer_than_a_text_is(examples, family):
    models, tokenizer = family
    batch = examples[0].Batch(models, slots=2, max_len=16)
    for seed in range(4):
        request = examples[0].Request(tokenizer("My").input_ids, 8, seed)
        batch.join(request)
        while any(batch.running):
            batch.step()
        assert request.tokens == examples[0].alone(models, request)


# --- the server ----------------------------------------------------------------------------------------------------


def ask(port, method, path, body=None, **headers):
    """The response, still to be read. It closes its socket: the server ends every answer by closing the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
    return connection.getresponse()


def post(port, body, path="/v1/completions"):
    with ask(port, "POST", path, body) as response:
        return response.status, json.loads(response.read())


def get(port, path):
    with ask(port, "GET", path) as response:
        return response.status, json.loads(response.read())


def stream_of(port, body):
    response = ask(port, "POST", "/v1/completions", body)
    assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream")
    return events(response)


def events(response):
    """The data of server-sent events, to the end of the answer."""
    with response:
        for line in response:
            if line != b"\n":
                assert line.startswith(b"data: ")
                yield line[len("data: ") :].strip()


def complete(port, body):
    """(text, why it ended), streamed or not."""
    if not body.get("stream"):
        status, answer = post(port, body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        return choice["text"], choice["finish_reason"]
    *pieces, last = stream_of(port, body)
    assert last == b"[DONE]"
    choices = [json.loads(piece)["choices"][0] for piece in pieces]
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


@contextlib.contextmanager
def serving(examples, family, slots):
    """The server in this process, until its answers are given."""
    server = examples[1].Server(("127.0.0.1", 0), *family, slots, 512)
    server.engine.start()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        server.waiting.put(None)
        server.engine.join(60)
        thread.join(60)
    assert not server.engine.is_alive() and not thread.is_alive()


@pytest.fixture(scope="module")
def port(examples, family):
    with serving(examples, family, slots=3) as server:
        yield server.server_port


def test_defaults_usage_and_stop_strings(examples, family, port):
    models, tokenizer = family
    body = dict(prompt="And the king said", seed=7, model="any", stop=None, eft={})
    status, answer = post(port, body)
    tokens = examples[0].alone(models, examples[0].Request(tokenizer(body["prompt"]).input_ids, 16, 7))
    text = tokenizer.decode(tokens)
    assert status == 200 and answer["choices"][0]["text"] == text
    assert answer["usage"] == dict(prompt_tokens=5, completion_tokens=16, total_tokens=21)
    assert (answer["object"], answer["model"]) == ("text_completion", "any")
    ends = [len(tokenizer.decode(tokens[:n])) for n in range(1, 16)]
    # each begins in one token and ends in the next
    across = [text[n - 2 : n + 2] for n in ends if n >= 2 and text.find(text[n - 2 : n + 2]) == n - 2]
    for stop in (across[2], ["never", across[4], across[2]], [across[3][1:], across[3]]):
        cut = min(text.index(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)
        for stream in (False, True):
            assert complete(port, dict(body, stop=stop, stream=stream)) == (text[:cut], "stop")
    texts = {complete(port, dict(prompt="And the king said"))[0] for _ in range(2)}
    assert len(texts) == 2  # without a seed each request draws its own


PROMPT = {"prompt": "And"}


@pytest.mark.parametrize(
    "body, name, message",
    [
        (b"{", None, "the body is not JSON"),
        (b"[" * 100000, None, "the body is not JSON"),
        (b"\xff", None, "the body is not JSON"),
        (b"[1]", None, "not a JSON object"),
        ({}, "prompt", "missing"),
        ({"prompt": ["And"]}, "prompt", "Unicode text"),
        ({"prompt": "\ud800"}, "prompt", "Unicode text"),
        ({**PROMPT, "max_tokens": 0}, "max_tokens", "an integer >= 1"),
        ({**PROMPT, "max_tokens": True}, "max_tokens", "got True"),
        ({**PROMPT, "max_tokens": 511}, "max_tokens", "are more than 512 together"),
        ({**PROMPT, "temperature": -1}, "temperature", "got -1"),
        ({**PROMPT, "temperature": float("nan")}, "temperature", "got nan"),
        ({**PROMPT, "top_p": 0}, "top_p", "got 0"),
        ({**PROMPT, "top_p": "0.9"}, "top_p", "got '0.9'"),
        ({**PROMPT, "seed": 1 << 63}, "seed", "a 64-bit integer"),
        ({**PROMPT, "stream": 1}, "stream", "true or false"),
        ({**PROMPT, "stop": [""]}, "stop", "text, or a list of texts"),
        ({**PROMPT, "stop": ""}, "stop", "text, or a list of texts"),
        ({**PROMPT, "n": 2}, "n", "not supported; known are prompt, model, max_tokens"),
        ({**PROMPT, "eft": 1.3}, "eft", "an object"),
        ({**PROMPT, "eft": {"alpha": 1}}, "eft.alpha", "not supported; known are beta"),
        ({**PROMPT, "eft": {"beta": "1"}}, "eft.beta", "got '1'"),
    ],
)
def test_bad_input_is_named(port, body, name, message):
    status, answer = post(port, body)
    assert status == 400
    assert answer["error"]["param"] == name and answer["error"]["type"] == "invalid_request_error"
    assert message in answer["error"]["message"] and answer["error"]["message"].startswith(name or "")


@pytest.mark.parametrize("headers", ({"Content-Length": "1048577"}, {"Transfer-Encoding": "chunked"}))
def test_bodies_without_a_known_small_length_are_refused(port, headers):
    with ask(port, "POST", "/v1/completions", **headers) as response:
        assert response.status == 400 and b"Content-Length: got" in response.read()


def test_other_paths_are_not_found(port):
    assert post(port, PROMPT, path="/v1/chat/completions")[0] == 404
    assert get(port, "/v1/completions")[0] == 404


@pytest.mark.parametrize("end", ("x", "</s>", "half"))
def test_characters_of_several_tokens_are_sent_whole(examples, family, end):
    tokenizer = family[1]
    text = "é — ☃"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    parts = [tokenizer.decode(tokens[:n]) for n in range(1, len(tokens))]
    assert any("\ufffd" in part for part in parts)
    tokens += tokens[:1] if end == "half" else tokenizer(end, add_special_tokens=False).input_ids
    with serving(examples, family, slots=1) as server:
        forced = iter(tokens + [5])  # the last forward is of no request

        def forward(slots, ids, positions):
            for z in server.batch.logits:
                z.zero_()
            server.batch.logits[0][:, next(forced)] = 99

        server.batch.forward = forward
        body = dict(prompt="And", temperature=0, max_tokens=len(tokens), stream=True)
        *pieces, _ = stream_of(server.server_port, body)
    choices = [json.loads(piece)["choices"][0] for piece in pieces]
    texts = [choice["text"] for choice in choices]
    assert "".join(texts) == {"x": text + "x", "</s>": text, "half": text + "\ufffd"}[end]
    assert not any("\ufffd" in piece for piece in texts[:-1]) and len(texts) > 3
    assert choices[-1]["finish_reason"] == ("stop" if end == "</s>" else "length")


def test_the_process(examples, family, tmp_path):
    """As its users start it: clients at the same time get their own texts, signals end it after its answers."""
    models, tokenizer = family
    log = tmp_path / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "server.py"), "--port", "0", "--slots", "3", "--max-len", "256"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        asked = list(requests(examples, tokenizer, 8, seed=1))
        alone = [tokenizer.decode(examples[0].alone(models, r), skip_special_tokens=True) for r in asked]
        line = process.stdout.readline()  # the end of the file, should it fail
        assert "listening on http://127.0.0.1:" in line, log.read_text()
        port = int(line.rsplit(":", 1)[1])
        bodies = [
            dict(
                prompt=tokenizer.decode(r.prompt, skip_special_tokens=True),
                max_tokens=r.max_tokens,
                temperature=r.temperature,
                top_p=r.top_p,
                seed=r.seed,
                stream=i % 2 == 0,
                eft={"beta": r.beta},
            )
            for i, r in enumerate(asked)
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            assert list(pool.map(lambda body: complete(port, body), bodies)) == [(text, "length") for text in alone]

        assert get(port, "/health") == (200, dict(slots=3, free=3, waiting=0))
        request = examples[0].Request(tokenizer("And the king said").input_ids, 200, seed=3)
        stream = stream_of(port, dict(prompt="And the king said", max_tokens=200, seed=3, stream=True))
        pieces = [next(stream)]
        assert get(port, "/health")[1]["free"] == 2
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            pieces.append(next(stream))
        *rest, last = stream
        assert last == b"[DONE]"
        text = "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces + rest)
        assert text == tokenizer.decode(examples[0].alone(models, request), skip_special_tokens=True)
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Gate:
    """Holds a batch at its next step until the test lets it go on; records who left, and how."""

    def __init__(self, batch):
        self.batch, self.step, self.leave = batch, batch.step, batch.leave
        self.permits, self.left, self.running = threading.Semaphore(0), [], []  # running: how many, at each step
        batch.step, batch.leave = self.gated_step, self.recorded_leave

    def gated_step(self):
        self.running.append(sum(r is not None for r in self.batch.running))
        assert self.permits.acquire(timeout=60)
        return self.step()

    def recorded_leave(self, request, finish):
        self.left.append((len(request.tokens), finish))
        self.leave(request, finish)


@pytest.fixture
def gated(examples, family):
    """A server with two slots, and its gate."""
    with serving(examples, family, slots=2) as server:
        gate = Gate(server.batch)  # nobody has asked yet: the thread waits
        yield server, gate
        gate.permits.release(1000)


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", (True, False))
def test_a_client_that_goes_away_frees_its_slot(gated, stream):
    server, gate = gated
    port, body = server.server_port, dict(prompt="And", max_tokens=400, seed=1, stream=stream)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body))
    with ThreadPoolExecutor(2) as pool:
        gate.permits.release(2)
        until(lambda: len(gate.running) == 3)  # it is held at its third step
        (job,) = filter(None, server.batch.running)
        connection.close()
        until(lambda: job.gone)
        other = pool.submit(complete, port, dict(prompt="My", max_tokens=3, seed=1))
        until(lambda: server.waiting.qsize() == 1)
        gate.permits.release(5)
        assert other.result(30)[1] == "length"
    assert gate.left == [(3, "gone"), (3, "length")]


def test_a_client_that_closes_its_sending_side_is_told(gated):
    server, gate = gated
    for stream in (True, False):
        body = dict(prompt="And", max_tokens=400, seed=1, stream=stream)
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body))
        until(lambda: any(server.batch.running))  # it is held at its first step
        connection.sock.shutdown(socket.SHUT_WR)
        response = connection.getresponse()
        assert response.status == (200 if stream else 400)
        (answer,) = events(response) if stream else [response.read()]
        assert "closed for sending before the answer was there" in json.loads(answer)["error"]["message"]
        gate.permits.release(1)
        until(lambda: not any(server.batch.running))


@pytest.mark.parametrize("request_line", ("POST /v1/completions", "GET /nothing"))
def test_a_client_that_is_gone_before_a_refusal_is_no_error(examples, port, capfd, monkeypatch, request_line):
    """The answer's bytes find the connection reset."""
    answered = threading.Event()

    def reset(handler, status, kind):
        assert handler.connection.recv(1, socket.MSG_PEEK) == b""  # the client has closed
        answered.set()
        raise BrokenPipeError

    monkeypatch.setattr(examples[1].Handler, "start", reset)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(f"{request_line} HTTP/1.0\r\nContent-Length: 5\r\n\r\n".encode())  # and no body
    assert answered.wait(30)
    errors = []

    def told():
        errors.append(capfd.readouterr().err)
        return any(word in "".join(errors) for word in ("has gone", "Traceback"))

    until(told)
    assert "Traceback" not in "".join(errors)


def test_a_client_that_goes_away_while_it_waits_is_never_run(gated):
    server, gate = gated
    port, body = server.server_port, dict(prompt="And", max_tokens=5, seed=1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(complete, port, body)
        until(lambda: gate.running == [1])  # it is held at its first step
        second = pool.submit(complete, port, body)
        until(lambda: server.waiting.qsize() == 1)
        gate.permits.release(1)
        until(lambda: gate.running == [1, 2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body))
        until(lambda: server.waiting.qsize() == 1)
        job = server.waiting.queue[0]
        connection.close()
        until(lambda: job.gone)
        gate.permits.release(100)
        assert first.result(30)[1] == second.result(30)[1] == "length"
        until(server.waiting.empty)
    assert job.tokens == [] and job not in server.batch.running


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stream", (True, False))
def test_when_the_models_fail_the_clients_are_told(gated, stream):
    server, gate = gated
    server.batch.forward = None  # the thread of the batch ends with a TypeError
    body = dict(prompt="And", stream=stream)
    if stream:
        assert complete(server.server_port, body) == ("", "error")
    else:
        assert post(server.server_port, body) == (
            500,
            dict(error=dict(message="the models failed", type="server_error")),
        )
