"""A vLLM engine in a process of its own, driven by lines of JSON; `Engine` is the other end.

The runner "v1" is what vLLM takes on a CPU. "v2" is what it takes on GPUs: its Triton kernels run in Triton's
interpreter here, for which Triton must believe in a driver for the CPU. Both the tests (tests/vllm) and the table of
speeds (vllm_speed.py) use it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]

ENVIRONMENT = dict(
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
RUNNERS = {
    "v1": dict(VLLM_USE_V2_MODEL_RUNNER="0"),
    "v2": dict(VLLM_USE_V2_MODEL_RUNNER="1", TRITON_INTERPRET="1"),
}


class Engine:
    """``LLM(**options)`` in a process of its own, which `close` (or leaving a with block) ends.

    With ``stopwatch=True``, `spent` says how many seconds of the last `generate` went where, see `Stopwatch`.
    """

    def __init__(self, runner: str = "v1", environment=None, **options):
        options = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 6,
            "distributed_executor_backend": "uni",
            **options,
        }
        inside = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0") if options["distributed_executor_backend"] == "uni" else {}
        here = dict(PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vllm_engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | RUNNERS[runner] | inside | here | (environment or {}),
        )
        self.send(options)
        if "error" in (answer := self.receive()):
            self.close()
            raise RuntimeError(answer["error"])

    def send(self, value) -> None:
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"error": f"the engine's process ended with {self.process.wait()}"}

    def generate(self, requests: list[dict], **more) -> list[dict]:
        """``requests``: {"prompt": text or ids, and arguments of SamplingParams}; RuntimeError with the engine's."""
        self.send({"requests": requests, **more})
        answer = self.receive()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        self.metrics, self.seconds, self.spent = answer["metrics"], answer["seconds"], answer["spent"]
        return answer["outputs"]

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


# --- the engine's process ------------------------------------------------------------------------------------------


def pretend_driver() -> None:
    """vLLM asks Triton whether a driver is active; in the interpreter none is needed.

    And it masks a store by integers, which a compiler takes for booleans and the interpreter does not.
    """
    import triton.backends
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    store = builder.create_masked_store

    def create_masked_store(self, ptrs, value, mask, cache_policy):
        mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        return store(self, ptrs, value, mask, cache_policy)

    builder.create_masked_store = create_masked_store

    driver = SimpleNamespace(is_active=staticmethod(lambda: True))
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


class Stopwatch:
    """Seconds in functions, by a name for them. What one of them spends in another counts for that other alone."""

    def __init__(self):
        self.spent: Counter = Counter()
        self.inside: list[float] = []  # of each function that runs: seconds in others

    def wrap(self, owner, function: str, name: str) -> None:
        call = getattr(owner, function)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            self.inside.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                self.spent[name] += seconds - self.inside.pop()
                if self.inside:
                    self.inside[-1] += seconds

        setattr(owner, function, timed)

    def start(self) -> None:
        """Before an engine starts: "sampling", and "interpreted" (Triton kernels that are not compiled on a CPU)."""
        from triton.runtime.interpreter import GridExecutor
        from vllm.v1.sample.sampler import Sampler

        import eft_kernels as eft

        self.wrap(Sampler, "forward", "sampling")
        self.wrap(eft, "combine", "sampling")
        if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
            from eft_kernels.integrations.vllm.sampler import EftSampler
            from eft_kernels.integrations.vllm.verifier import EftVerifier

            self.wrap(EftSampler, "__call__", "sampling")
            self.wrap(EftVerifier, "__call__", "sampling")
            self.wrap(GridExecutor, "__call__", "interpreted")


def params_of(given: dict):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    given = dict(given)
    if "structured_outputs" in given:
        given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
    if "logit_bias" in given:
        given["logit_bias"] = {int(k): v for k, v in given["logit_bias"].items()}
    return SamplingParams(**given)


def logprobs_of(found) -> list | None:
    """[{token: log-prob}] of a text."""
    return None if found is None else [row and {str(i): e.logprob for i, e in row.items()} for row in found]


def shown(output) -> dict:
    text = output.outputs[0]
    return dict(
        prompt=list(output.prompt_token_ids),
        tokens=list(text.token_ids),
        text=text.text,
        reason=text.finish_reason,
        logprobs=logprobs_of(text.logprobs),
        prompt_logprobs=logprobs_of(output.prompt_logprobs),
    )


def inputs_of(prompt):
    return prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}


def run_lifecycle(llm, requests, arrivals, aborts) -> list[dict]:
    """Request i is added before step arrivals[i] and aborted before step aborts[i] (-1: never)."""
    engine, done, step = llm.llm_engine, {}, 0
    waiting = sorted(range(len(requests)), key=lambda i: arrivals[i])
    running = set()
    while waiting or engine.has_unfinished_requests():
        while waiting and arrivals[waiting[0]] <= step:
            i = waiting.pop(0)
            engine.add_request(str(i), inputs_of(requests[i].pop("prompt")), params_of(requests[i]))
            running.add(i)
        for i in [i for i in running if 0 <= aborts[i] <= step]:
            engine.abort_request([str(i)])
            running.discard(i)
        for output in engine.step():
            if output.finished:
                running.discard(int(output.request_id))
                done[int(output.request_id)] = shown(output)
        step += 1
    return [done.get(i, {"tokens": None}) for i in range(len(requests))]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer

    def answer(value) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    if os.environ.get("TRITON_INTERPRET") == "1":
        pretend_driver()
    try:
        from vllm import LLM

        options = json.loads(sys.stdin.readline())
        stopwatch = Stopwatch()
        if options.pop("stopwatch", False):
            stopwatch.start()
        llm = LLM(disable_log_stats=False, **options)
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({})
    for line in sys.stdin:
        asked = json.loads(line)
        requests = asked.pop("requests")
        stopwatch.spent.clear()
        start = time.perf_counter()
        try:
            if asked:
                outputs = run_lifecycle(llm, requests, **asked)
            else:
                prompts = [inputs_of(r.pop("prompt")) for r in requests]
                outputs = llm.generate(prompts, [params_of(r) for r in requests], use_tqdm=False)
                outputs = [shown(o) for o in outputs]
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
            continue
        seconds = time.perf_counter() - start
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        answer({"outputs": outputs, "metrics": metrics, "seconds": seconds, "spent": stopwatch.spent})


if __name__ == "__main__":
    main()
