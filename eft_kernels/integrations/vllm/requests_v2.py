"""The V2 model runner: what a request may say under ``eft``, checked where it arrives. A class for each mode, because
vLLM knows them by name alone."""

from __future__ import annotations

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from ..composition import request_of, strength_of


class Upscale(LogitsProcessor):
    """Does nothing to logits: it is here for `validate_params`, which vLLM calls for each new request."""

    mode = "upscale"

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        given = request_of(sampling_params.extra_args)
        strength_of(given, cls.mode, "extra_args: eft")
        if given and (sampling_params.prompt_logprobs is not None or sampling_params.prompt_logprob_token_ids):
            raise ValueError(
                "prompt_logprobs: a prompt is scored with the weights of the model's config; leave out extra_args' eft"
            )

    def add_request(self, req_idx, sampling_params) -> bool:
        return False

    def apply(self, logits, ctx):
        return logits


class Proxy(Upscale):
    mode = "proxy"


class Downscale(Upscale):
    mode = "downscale"


class Interpolate(Upscale):
    mode = "interpolate"
