"""The V1 model runner: every request has the model's own combination. Refused where it arrives."""

from __future__ import annotations

from vllm.v1.sample.logits_processor import LogitsProcessor

from ..composition import request_of


class Uniform(LogitsProcessor):
    """Does nothing to logits: it is here for `validate_params`, which vLLM calls for each new request."""

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        if request_of(sampling_params.extra_args):
            raise ValueError(
                "extra_args: eft: a request's own weights need vLLM's V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1, "
                "Triton); this engine runs V1, where all requests have the weights of the model's config"
            )

    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update) -> None:
        pass

    def apply(self, logits):
        return logits
