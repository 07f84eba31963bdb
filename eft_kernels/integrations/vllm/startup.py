"""What is checked before an `EftForCausalLM` starts, and how its requests are checked where they arrive."""

from __future__ import annotations

import logging

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..composition import Composition, refuse_adapters
from . import ARCHITECTURE, KNOWN_VERSIONS

log = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own logger, so that it is printed as vLLM's are


class EftConfig(VerifyAndUpdateConfig):
    """vLLM calls it once, in the process that makes the engine's configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        model = vllm_config.model_config
        check_version()
        composition = Composition.parse(getattr(model.hf_config, "eft", None), model.model)
        refuse_adapters(composition)
        check_tokenizers(composition, model)
        v2 = vllm_config.use_v2_model_runner
        refuse_options(vllm_config, v2)
        # requests are checked in the server's process, by the name of a class alone
        kind = composition.mode.capitalize() if v2 else "Uniform"
        module = f"{__package__}.requests_{'v2' if v2 else 'v1'}"
        model.logits_processors = [*(model.logits_processors or []), f"{module}:{kind}"]


def check_version() -> None:
    """ValueError for a vLLM that was not tried: the integration uses what vLLM may change at any time."""
    from vllm import __version__

    if not any(__version__ == known or __version__.startswith(f"{known}.") for known in KNOWN_VERSIONS):
        raise ValueError(
            f"{ARCHITECTURE}: vLLM {__version__} is not known to work; allowed is vLLM {', '.join(KNOWN_VERSIONS)}"
        )


def check_tokenizers(composition: Composition, model) -> None:
    """Models that write other tokens at the same id would be combined into nonsense. `compose` has looked already."""
    if composition.base_within or model.skip_tokenizer_init:
        return
    from transformers import AutoTokenizer

    from ..hf import check_tokenizers as check

    folders = [model.model, *composition.folders[1:]]
    found = []
    for name, folder in zip(composition.names, folders):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
            found.append((name, tokenizer))
        except Exception as error:  # a folder without one says nothing about its ids
            log.warning("eft: %s: no tokenizer in %s to compare (%s)", name, folder, str(error).splitlines()[0][:100])
    names, tokenizers = zip(*found)
    check(tokenizers, names, model.get_vocab_size(), True)


def refuse_options(vllm_config, v2: bool) -> None:
    """ValueError for options of the engine that would change the distribution, or be ignored."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config

    def refuse(what: str, why: str):
        raise ValueError(f"{ARCHITECTURE}: {what}: {why}")

    if model.enable_prompt_embeds:
        refuse("enable_prompt_embeds", "an embedding belongs to one of the models, not to all")
    if model.return_sampling_mask:
        refuse("return_sampling_mask", "the fused sampler makes no list of the tokens that filters keep")
    if speculative is not None:
        if not v2:
            refuse("speculative_config", "needs vLLM's V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1)")
        if speculative.rejection_sample_method == "synthetic":
            refuse("speculative_config", "rejection_sample_method 'synthetic' does not keep the distribution")
        if speculative.enable_adaptive_verification:
            refuse("speculative_config", "enable_adaptive_verification is not supported")
        if speculative.use_heterogeneous_vocab:
            refuse("speculative_config", "use_heterogeneous_vocab: draft with a model that shares the vocabulary")
