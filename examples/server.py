"""A small HTTP server over continuous_batching.py: POST /v1/completions in OpenAI's form, and GET /health.

python examples/server.py --port 8000
curl localhost:8000/v1/completions -d '{"prompt": "And the king said", "seed": 7, "eft": {"beta": 1.3}, "stream": true}'

One thread runs the batch. Each connection has a thread of its own, which checks the request, hands it over and writes
what comes back. The slot of a client that has gone is freed; one that closes its sending side alone looks the same, and
is told so. SIGTERM or Ctrl-C: the server takes no more requests,
answers those that it has, and ends; the same again ends it at once. There is no authentication: this is an example.
"""

import argparse
import json
import queue
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from continuous_batching import Batch, Request, load

BODY = 1 << 20  # bytes
# types, condition, what an error says, default
FIELDS = {
    "prompt": ((str,), lambda x: x.encode(errors="ignore").decode() == x, "Unicode text", None),
    "model": ((str,), lambda x: True, "text, which is sent back", "eft"),
    "max_tokens": ((int,), lambda x: x >= 1, "an integer >= 1", 16),
    "temperature": ((int, float), lambda x: 0 <= x <= 100, "0 (greedy) to 100", 1.0),
    "top_p": ((int, float), lambda x: 1e-6 <= x <= 1, "1e-6 to 1", 1.0),
    "seed": ((int,), lambda x: -(1 << 63) <= x < 1 << 63, "a 64-bit integer", None),
    "stream": ((bool,), lambda x: True, "true or false", False),
    "stop": ((list,), lambda x: all(isinstance(s, str) and s for s in x), "text, or a list of texts", []),
    "eft": ((dict,), lambda x: True, "an object", {}),
}
EFT = {"beta": ((int, float), lambda x: -100 <= x <= 100, "-100 to 100", 1.0)}


class BadRequest(ValueError):
    """The name of the field (None: it is the body), and what is wrong."""


class Closed(ConnectionAbortedError):
    """The client will send nothing more: it has gone, or closed its sending side, which looks the same from here."""


@dataclass(eq=False)
class Job(Request):
    asked: dict = field(default_factory=dict)  # the values of FIELDS
    gone: bool = False  # nobody waits for it any more
    news: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)  # after each step: how many tokens, finish


def read(given: dict, fields: dict, prefix: str = "") -> dict:
    """The value of every field; null stands for the default."""
    for name in given.keys() - fields.keys():
        raise BadRequest(prefix + name, f"not supported; known are {', '.join(fields)}")
    values = {}
    for name, (types, good, allowed, default) in fields.items():
        values[name] = x = default if given.get(name) is None else given[name]
        if x is not None and not (type(x) in types and good(x)):
            raise BadRequest(prefix + name, f"got {repr(x)[:80]}, allowed is {allowed}")
    return values


def parse(body: bytes, tokenizer, max_len: int) -> Job:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(None, f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise BadRequest(None, "the body is not a JSON object")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    x = read(given, FIELDS)
    beta = read(x["eft"], EFT, "eft.")["beta"]
    if x["prompt"] is None:
        raise BadRequest("prompt", "missing")
    prompt, most = tokenizer(x["prompt"]).input_ids, x["max_tokens"]
    if not prompt:
        raise BadRequest("prompt", "has no tokens")
    if len(prompt) + most > max_len:
        raise BadRequest("max_tokens", f"{most} and a prompt of {len(prompt)} tokens are more than {max_len} together")
    seed = secrets.randbits(63) if x["seed"] is None else x["seed"]
    return Job(prompt, most, seed, x["temperature"], x["top_p"], beta, asked=x)


def run(batch: Batch, waiting: queue.Queue) -> None:
    """The only thread that touches the models. Ends when it gets None."""
    while True:
        while None in batch.running:
            try:
                job = waiting.get(block=not any(batch.running))
            except queue.Empty:
                break
            if job is None:
                return
            if not job.gone:
                batch.join(job)
        for job in batch.step():
            if job.gone and job.finish is None:
                batch.leave(job, "gone")
            job.news.put((len(job.tokens), job.finish))


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds that a client may take to send or to receive

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.log_message("the client has gone")

    def do_GET(self) -> None:
        batch, waiting = self.server.batch, self.server.waiting.qsize()
        if self.path != "/health":
            return self.answer(404, error=dict(message=f"{self.path}: not found"))
        self.answer(200, slots=len(batch.running), free=batch.running.count(None), waiting=waiting)

    def do_POST(self) -> None:
        if self.path != "/v1/completions":
            return self.answer(404, error=dict(message=f"{self.path}: not found"))
        try:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > BODY:
                raise BadRequest(None, f"Content-Length: got {length!r}, allowed are at most {BODY} bytes")
            job = parse(self.rfile.read(int(length)), self.server.tokenizer, self.server.batch.max_len)
        except BadRequest as error:
            name, message = error.args
            message = f"{name}: {message}" if name else message
            return self.answer(400, error=dict(message=message, type="invalid_request_error", param=name))
        self.server.waiting.put(job)
        try:
            self.complete(job)
        except Closed:
            message = "the connection was closed for sending before the answer was there; keep it open"
            error = dict(message=message, type="invalid_request_error")
            if job.asked["stream"]:
                self.wfile.write(b"data: %s\n\n" % json.dumps(dict(error=error)).encode())
            else:
                self.answer(400, error=error)
        finally:
            job.gone = True

    def complete(self, job: Job) -> None:
        """Answers with the text, as it comes or whole."""
        stream, model, prompt, text = job.asked["stream"], job.asked["model"], len(job.prompt), ""
        head = dict(id=f"cmpl-{secrets.token_hex(12)}", object="text_completion", created=int(time.time()), model=model)
        if stream:
            self.start(200, "text/event-stream")
        for piece, finish, count in self.pieces(job):
            text += piece
            choices = [dict(index=0, text=piece if stream else text, finish_reason=finish, logprobs=None)]
            usage = dict(prompt_tokens=prompt, completion_tokens=count, total_tokens=prompt + count)
            if stream:
                self.wfile.write(b"data: %s\n\n" % json.dumps(head | dict(choices=choices)).encode())
        if stream:
            self.wfile.write(b"data: [DONE]\n\n")
        elif finish == "error":
            self.answer(500, error=dict(message="the models failed", type="server_error"))
        else:
            self.answer(200, **head, choices=choices, usage=usage)

    def pieces(self, job: Job) -> Iterator[tuple[str, str | None, int]]:
        """(new text, why it ended or None, tokens so far) until it has ended."""
        stops, sent, count, finish = job.asked["stop"], 0, 0, None
        while finish is None:
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                raise Closed
            try:
                count, finish = job.news.get(timeout=0.1)
            except queue.Empty:
                if self.server.engine.is_alive():
                    continue
                finish = "error"
            text = self.server.tokenizer.decode(job.tokens[:count], skip_special_tokens=True)
            cut = min((text.index(s) for s in stops if s in text), default=None)
            if cut is not None:
                text, finish = text[:cut], "stop"
            # the last characters may be the beginning of a stop string, or of a character of several tokens
            end = len(text.rstrip("\ufffd")) - max(map(len, stops), default=1) + 1
            end = max(sent, end) if finish is None else len(text)
            if finish or end > sent:
                yield text[sent:end], finish, count
            sent = end

    def start(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def answer(self, status: int, **body) -> None:
        self.start(status, "application/json")
        self.wfile.write(json.dumps(body).encode() + b"\n")


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits until every request that was taken is answered
    request_queue_size = 128

    def __init__(self, address, models, tokenizer, slots: int, max_len: int):
        super().__init__(address, Handler)
        self.tokenizer, self.batch, self.waiting = tokenizer, Batch(models, slots, max_len), queue.Queue()
        self.engine = threading.Thread(target=run, args=(self.batch, self.waiting), daemon=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--slots", type=int, default=4, help="requests at a time")
    parser.add_argument("--max-len", type=int, default=256, help="tokens of a prompt and its completion together")
    args = parser.parse_args()
    server = Server(("127.0.0.1", args.port), *load(), args.slots, args.max_len)

    def end(number, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=server.shutdown).start()  # waits for serve_forever, which this thread is in

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    server.engine.start()
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    with server:
        server.serve_forever(poll_interval=0.1)
    server.waiting.put(None)
    server.engine.join()


if __name__ == "__main__":
    main()
