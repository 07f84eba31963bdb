"""Emulated fine-tuning inside SGLang: base, tuned and ref as one model that its engine serves.

SGLang finds `register` by the entry point `sglang.srt.plugins` and calls it in each of its processes. A folder made by
``eft-kernels compose`` is then a model like any other; see docs/sglang.md.
"""

from __future__ import annotations

from typing import Any

SAMPLING_BACKEND = "eft"
KNOWN_VERSIONS = ("0.5.23",)  # of SGLang: those that tests/sglang has run with


def register() -> None:
    """Hooks that leave every other model alone. SGLang only logs what fails here, and torch is not imported."""
    from sglang.srt.arg_groups.choices import SAMPLING_BACKEND_CHOICES
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.version import __version__

    HookRegistry.register("sglang.srt.server_args.ServerArgs.check_server_args", _check_start, HookType.BEFORE)
    if __version__ not in KNOWN_VERSIONS:  # `_check_start` refuses the model
        return
    SAMPLING_BACKEND_CHOICES.add(SAMPLING_BACKEND)  # before the command line is read
    HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        _check_request,
        HookType.BEFORE,
    )
    HookRegistry.register(
        "sglang.srt.managers.tp_worker.TpModelWorker._init_model_runner", _make_runner, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", _note_requests, HookType.AFTER
    )


def _check_start(server_args: Any) -> None:
    from .startup import check

    check(server_args)


def _check_request(manager: Any, request: Any, input_ids: list[int] | None) -> None:
    from .startup import check_request, is_ours

    if is_ours(manager.model_config):
        check_request(request, manager.model_config)


def _make_runner(original: Any, worker: Any) -> None:
    from .startup import is_ours

    if not is_ours(worker.model_config):
        original(worker)
        return
    from .runner import EftModelRunner

    worker._model_runner = EftModelRunner.of_worker(worker)


def _note_requests(forward_batch: Any, _class: type, batch: Any, *_args: Any, **_options: Any) -> None:
    forward_batch.eft_requests = batch.reqs
