"""SGLang's engine in a process of its own, driven by lines of JSON; `Engine` is the other end. ``engine.py serve ...``
is ``sglang serve ...``. SGLang spawns its processes from this file, so that each has the stubs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
ENVIRONMENT = dict(
    OMP_NUM_THREADS="1",
    SGLANG_USE_CPU_ENGINE="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
)
OPTIONS = dict(
    device="cpu",
    dtype="float32",
    attention_backend="torch_native",
    sampling_backend="pytorch",
    disable_cuda_graph=True,
    max_total_tokens=4096,
    max_running_requests=6,
    skip_server_warmup=True,
)


class Engine:
    """``sglang.Engine(**options)`` in a process of its own, which `close` (or leaving a with block) ends."""

    def __init__(self, environment=None, **options):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | (environment or {}),
        )
        try:
            self.ask({**OPTIONS, **options})
        except RuntimeError:
            self.close()
            raise

    def ask(self, value) -> dict:
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                break
        else:
            answer = {"error": f"the engine's process ended with {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def call(self, name: str, *arguments):
        """What a method of `sglang.Engine` returns, as far as JSON has it."""
        return self.ask({"call": name, "arguments": arguments})["outputs"]

    def generate(self, requests: list[dict]) -> list[dict]:
        """``requests``: {"prompt": ids, "max_tokens": int, other sampling parameters of SGLang, "extra": {arguments of
        `Engine.generate`}}, all running at once; what SGLang returns for each. RuntimeError with the engine's."""
        return self.ask({"requests": requests})["outputs"]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.stdout.close()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


if __name__ in ("__main__", "__mp_main__"):
    import stubs

    stubs.install()


def run(engine, requests: list[dict]) -> list[dict]:
    import asyncio

    async def one(request: dict) -> dict:
        request = dict(request)
        arguments = {"input_ids": request.pop("prompt"), **request.pop("extra", {})}
        request["max_new_tokens"] = request.pop("max_tokens")
        return await engine.async_generate(sampling_params=request, **arguments)

    async def all_at_once():
        return await asyncio.gather(*map(one, requests))

    return engine.loop.run_until_complete(all_at_once())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints is no answer

    def answer(value) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        import sglang

        engine = sglang.Engine(**json.loads(sys.stdin.readline()))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({})
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if "call" in asked:
                answer({"outputs": getattr(engine, asked["call"])(*asked["arguments"])})
            else:
                answer({"outputs": run(engine, asked["requests"])})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
    engine.shutdown()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()
        run_server(prepare_server_args(sys.argv[2:]))
    else:
        main()
