"""What is checked before an emulated model starts in SGLang, and about each of its requests."""

from __future__ import annotations

import functools
import logging
from typing import Any, NoReturn

from ..composition import ARCHITECTURE, Composition, refuse_adapters, request_of, strength_of
from . import KNOWN_VERSIONS, SAMPLING_BACKEND

log = logging.getLogger(f"sglang.{__name__}")


def is_ours(model_config: Any) -> bool:
    return ARCHITECTURE in (getattr(model_config.hf_config, "architectures", None) or ())


def check(server_args: Any) -> None:
    """ValueError for a start that would fail later, or that would sample from another distribution."""
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    model = model_config_of(server_args)
    if not is_ours(model):
        if server_args.sampling_backend == SAMPLING_BACKEND:
            raise ValueError(f"sampling_backend: got {SAMPLING_BACKEND!r}, which samples from an {ARCHITECTURE} alone")
        return
    check_version()
    composition = Composition.parse(getattr(model.hf_config, "eft", None), model.model_path)
    refuse_adapters(composition)
    options = resolving_view(server_args)
    refuse_options(options)
    check_tokenizers(composition, model, options)
    if server_args.sampling_backend == SAMPLING_BACKEND:
        if options.rl_on_policy_target is not None:
            raise ValueError(f"rl_on_policy_target: goes with SGLang's own sampler, got {SAMPLING_BACKEND!r}")
        # SGLang has put its own in the place of any other on a CPU, and for deterministic inference
        declare_resolution(server_args, __name__, sampling_backend=SAMPLING_BACKEND)


def check_version() -> None:
    """ValueError for an SGLang that was not tried: the integration uses what SGLang may change at any time."""
    from sglang.version import __version__

    if __version__ not in KNOWN_VERSIONS:
        raise ValueError(
            f"{ARCHITECTURE}: SGLang {__version__} is not known to work; allowed is SGLang {', '.join(KNOWN_VERSIONS)}"
        )


# Options that SGLang would apply to base alone, and what they are when they are off.
REFUSED = {
    "speculative_algorithm": (None, "speculative decoding verifies drafts by base alone"),
    "pp_size": (1, "pipelines are not supported"),
    "attn_cp_size": (1, "context parallelism is not supported"),
    "dcp_size": (1, "context parallelism is not supported"),
    "attn_dp_size": (1, "attention data parallelism is not supported"),
    "enable_dp_attention": (False, "attention data parallelism is not supported"),
    "enable_lora": (None, "an adapter belongs to one of the models; merge it (`eft-kernels compose --merge`)"),
    "lora_paths": (None, "an adapter belongs to one of the models; merge it (`eft-kernels compose --merge`)"),
    "enable_hierarchical_cache": (False, "it would store the keys and values of base alone"),
    "enable_unified_cache_external_linker": (False, "it would store the keys and values of base alone"),
    "enable_lmcache": (False, "it would store the keys and values of base alone"),
    "enable_flexkv": (False, "it would store the keys and values of base alone"),
    "enable_hisparse": (False, "it would apply to base alone"),
    "enable_unified_memory": (False, "it would size the memory for base alone"),
    "enable_kv_cache_sharding": (False, "it would apply to base alone"),
    "prefill_only_disable_kv_cache": (False, "it would apply to base alone"),
    "enable_memory_saver": (False, "it would release and restore the memory of base alone"),
    "disaggregation_mode": ("null", "it would send the keys and values of base alone"),
    "enable_pdmux": (False, "split prefills are not supported"),
    "enable_two_batch_overlap": (False, "it is not supported"),
    "enable_single_batch_overlap": (False, "it is not supported"),
    "enable_eplb": (False, "it would move the experts of base alone"),
    "elastic_ep_backend": (None, "it is not supported"),
    "dllm_algorithm": (None, "diffusion models are not supported"),
    "is_embedding": (False, "an emulated model generates text"),
    "cpu_offload_gb": (0, "it would offload base alone"),
    "offload_group_size": (-1, "it would offload base alone"),
    "enable_return_hidden_states": (False, "they would be those of base"),
    "enable_return_aux_hidden_states": (False, "they would be those of base"),
    "enable_return_routed_experts": (False, "they would be those of base"),
    "enable_watermark": (False, "it is not supported"),
    "enable_mis": (False, "it would score with base alone"),
    "startup_weight_load_mode": ("serial", "it would load base alone"),
    "custom_weight_loader": (None, "it would load base alone"),
    "weight_cache_mode": ("off", "it would hold the weights of base alone"),
}


def refuse_options(options: Any) -> None:
    """ValueError naming the first option that would change the distribution, or be ignored."""
    from sglang.srt.environ import envs

    for name, (off, why) in REFUSED.items():
        if (given := getattr(options, name)) != off and (given or off):
            raise ValueError(f"{ARCHITECTURE}: {name}: got {given!r}, allowed is {off!r}: {why}")
    if envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get():
        raise ValueError(
            f"{ARCHITECTURE}: SGLANG_ENABLE_POST_CAPTURE_KV_SIZING: it would size the memory for base alone"
        )


def check_tokenizers(composition: Composition, model: Any, options: Any) -> None:
    """Models that write other tokens at the same id would be combined into nonsense. `compose` has looked already."""
    if composition.base_within or options.skip_tokenizer_init:
        return
    from transformers import AutoTokenizer

    from ..hf import check_tokenizers as check

    found = []
    for name, folder in zip(composition.names, (model.model_path, *composition.folders[1:])):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
            found.append((name, tokenizer))
        except Exception as error:  # a folder without one says nothing about its ids
            log.warning("eft: %s: no tokenizer in %s to compare (%s)", name, folder, str(error).splitlines()[0][:100])
    names, tokenizers = zip(*found)
    check(tokenizers, names, model.vocab_size, True)


@functools.lru_cache(maxsize=1)
def mode_of(model_config: Any) -> str:
    return Composition.parse(model_config.hf_config.eft, model_config.model_path).mode


def check_request(request: Any, model_config: Any) -> None:
    """ValueError, the client's, for what base would answer alone, and for strengths that there are not."""
    from sglang.srt.runtime_context import get_exec

    def refuse(what: str, why: str) -> NoReturn:
        raise ValueError(f"{ARCHITECTURE}: {what}: {why}")

    params = request.sampling_params or {}
    if request.return_hidden_states:
        refuse("return_hidden_states", "they would be those of base")
    if request.return_routed_experts:
        refuse("return_routed_experts", "they would be those of base")
    if request.input_embeds is not None or request.positional_embed_overrides is not None:
        refuse("input_embeds", "an embedding belongs to one of the models, not to all")
    if (params.get("beam_width") or 1) > 1:
        refuse("beam_width", "beams are not supported")
    if request.multi_item_delimiter_indices is not None or request.token_indices_to_pool is not None:
        refuse("multi-item scoring", "base would score alone")
    given = request_of(params.get("custom_params"), "custom_params")
    if get_exec().kernel.sampling_backend == SAMPLING_BACKEND:
        strength_of(given, mode_of(model_config), "custom_params: eft")
        if request.return_sampling_mask:
            refuse("return_sampling_mask", "the fused sampler makes no list of the tokens that filters keep")
    elif given:
        refuse("custom_params", f"a request's own weights need --sampling-backend {SAMPLING_BACKEND}")
