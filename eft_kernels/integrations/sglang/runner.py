"""Base's model runner with those of the other models beside it."""

from __future__ import annotations

import copy
import dataclasses

from sglang.srt.configs.model_config import AttentionArch, ModelConfig
from sglang.srt.layers.sampler import register_sampler_backend
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput
from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import get_device, get_schedule

import eft_kernels as eft

from ..composition import ARCHITECTURE, Composition
from . import SAMPLING_BACKEND
from .prompts import install
from .sampler import EftSampler, Requests, Step, changes_scores


class EftModelRunner(ModelRunner):
    """Runs each batch through all models and hands SGLang's sampler the combined scores.

    Each of the other models has a model runner of its own, as SGLang's draft models have: weights, keys and values,
    attention backend and CUDA graphs of its own geometry. All share base's table of requests and its allocator, so
    that a token has the same slot in each; the scheduler and the prefix cache see base alone.
    """

    @classmethod
    def of_worker(cls, worker) -> EftModelRunner:
        """What SGLang's worker would make, from the worker's own settings."""
        outer = worker.model_config
        given = dict(
            mem_fraction_static=get_schedule().mem_fraction_static,
            gpu_id=worker.gpu_id,
            nccl_port=worker.nccl_port,
            server_args=worker.server_args,
            load_group=worker.load_group,
        )
        return cls(Composition.parse(outer.hf_config.eft, outer.model_path), outer, given)

    def __init__(self, composition: Composition, outer: ModelConfig, given: dict):
        register_sampler_backend(SAMPLING_BACKEND, EftSampler)
        self.composition = composition
        self.others: list[OtherRunner] = []
        self.vocab_size = outer.vocab_size
        folders = (composition.folders[0] or outer.model_path, *composition.folders[1:])
        configs = [config_of(folder, outer, given["server_args"]) for folder in folders]
        check_models(composition.names, configs, outer)
        super().__init__(model_config=configs[0], **given)
        self.others = [OtherRunner(model_config=config, is_draft_worker=True, **given) for config in configs[1:]]
        self.prompts = install([runner.model for runner in (self, *self.others)], self.vocab_size)
        # the scheduler asks what kind of model it serves
        ModelRegistry.models[ARCHITECTURE] = type(self.model)
        self.requests: Requests | None = None
        if isinstance(self.sampler, EftSampler):
            self.requests = Requests(composition, get_device().random_seed, self.device)
            ends = outer.hf_eos_token_id
            self.sampler.end = min(ends) if ends else 0

    def init_weight_updater(self) -> None:
        self.weight_updater = NoUpdates()

    def init_kv_cache_configurator(self, draft_parallel_layout=None) -> None:
        super().init_kv_cache_configurator(draft_parallel_layout)
        for other in self.others:
            other.init_kv_cache_configurator()
        sizes = [token_bytes(runner.kv_cache_configurator) for runner in (self, *self.others)]
        self.kv_cache_configurator = recast(self.kv_cache_configurator, SharedBudget)
        self.kv_cache_configurator.share = (sizes[0], sum(sizes))

    def alloc_memory_pool(self, memory_pool_config=None, **kwargs) -> None:
        super().alloc_memory_pool(memory_pool_config, **kwargs)
        for other in self.others:
            other.req_to_token_pool = self.req_to_token_pool
            other.token_to_kv_pool_allocator = self.token_to_kv_pool_allocator
            other.alloc_memory_pool(self.memory_pool_config)

    def init_attention_backends(self) -> None:
        super().init_attention_backends()
        for other in self.others:
            other.init_attention_backends()

    def init_cuda_graphs(self, *args, **kwargs) -> None:
        super().init_cuda_graphs(*args, **kwargs)
        for other in self.others:
            other.init_cuda_graphs(*args, **kwargs)

    def forward(self, forward_batch, *args, **kwargs) -> ModelRunnerOutput:
        """The output of base's forward pass, with the combined scores as its logits, float32 [rows, vocab_size].

        Where `EftSampler` samples from the models' logits, base's stand in for the scores.
        """
        step = self.step(forward_batch)
        given = self.prompts.strengths = self.composition.default if step is None else step.rows
        # a forward pass writes into its batch
        logits = [other.forward(copy.copy(forward_batch)).logits_output.next_token_logits for other in self.others]
        out = super().forward(forward_batch, *args, **kwargs)
        own = out.logits_output.next_token_logits
        if own is None:
            return out
        fused = step is not None and not needs_scores(forward_batch)
        models = None
        if any(z is None for z in logits):  # log-probs of the prompt: base's are the combined scores
            scores = own
        else:
            models = [z[:, : self.vocab_size] for z in (own, *logits)]
            scores = models[0]
            if not fused:
                scores = eft.combine(models, given.weights, upscale_top_p=given.upscale_top_p)
        # a copy, because a graph's output is written again at the next replay
        out.logits_output = dataclasses.replace(out.logits_output, next_token_logits=scores)
        if step is not None:
            step.models = models if fused else None
            out.logits_output.eft = step
        return out

    def step(self, forward_batch) -> Step | None:
        """What `EftSampler` needs to know of the batch; None where SGLang's sampler is to sample."""
        if self.requests is None:
            return None
        rows = self.requests.rows(forward_batch.eft_requests)
        return Step(None, rows, (forward_batch.seq_lens - rows.prompt_length).clamp(min=0))


def needs_scores(forward_batch) -> bool:
    """Whether more than tokens is read off the scores, or SGLang changes them first."""
    return forward_batch.return_logprob or forward_batch.is_prefill_only or changes_scores(forward_batch.sampling_info)


class NoUpdates:
    """In the place of SGLang's updater of weights, whose answers are (success, message)."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: (False, f"{ARCHITECTURE}: {name}: it would change the weights of base alone")


class OtherRunner(ModelRunner):
    """The runner of a model beside base, over base's table of requests and allocator."""

    def init_kv_cache_configurator(self, draft_parallel_layout=None) -> None:
        super().init_kv_cache_configurator(draft_parallel_layout)
        self.kv_cache_configurator = recast(self.kv_cache_configurator, GivenSizes)


class GivenSizes(KVCacheConfigurator):
    """Pools of the sizes that base's have."""

    def _resolve_memory_pool_config(self, pre_model_load_memory):
        return self.memory_pool_config


class SharedBudget(KVCacheConfigurator):
    """Base's pool, with room left for those of the other models."""

    share = (1, 1)  # bytes that a token takes in base's pool, and in all

    def config_from_budget(self, budget_bytes, *, cap_tokens=None):
        own, total = self.share
        return super().config_from_budget(budget_bytes * own // total, cap_tokens=cap_tokens)


def token_bytes(configurator: KVCacheConfigurator) -> int:
    return create_memory_pool_configurator(configurator)._cell_size


def recast(configurator: KVCacheConfigurator, kind: type[KVCacheConfigurator]):
    """The configurator again, as one of ``kind``."""
    fields = [field.name for field in dataclasses.fields(configurator) if field.init]
    return kind(**{name: getattr(configurator, name) for name in fields})


def config_of(folder: str, outer: ModelConfig, server_args) -> ModelConfig:
    """One model's config. Overrides of the config (``--json-model-override-args``) are the emulated model's alone."""
    return ModelConfig(
        model_path=folder,
        trust_remote_code=server_args.trust_remote_code,
        context_length=outer.context_len,
        enable_multimodal=False,
        dtype=server_args.dtype,
        quantization=server_args.quantization,
        model_impl=server_args.model_impl,
        quantize_and_serve=server_args.quantize_and_serve,
        disable_hybrid_swa_memory=server_args.disable_hybrid_swa_memory,
        model_config_parser=server_args.model_config_parser,
    )


def check_models(names, configs: list[ModelConfig], outer: ModelConfig) -> None:
    """ValueError for models that the runners cannot hold side by side."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    widths = {name: config.vocab_size for name, config in zip(names, configs)}
    if outer.vocab_size != min(widths.values()):
        raise ValueError(
            f"eft: vocab_size: got {outer.vocab_size}, the models share {min(widths.values())} ids ({widths}); pass "
            f'--json-model-override-args with "vocab_size": {min(widths.values())}, or use a folder made by '
            "`eft-kernels compose`"
        )
    for name, config in zip(names, configs):
        kind = config.hf_config.architectures[0]
        if config.attention_arch != AttentionArch.MHA or mambaish_config(config) is not None:
            raise ValueError(f"eft: {name}: {kind} keeps other states than keys and values of each head")
        if config.is_hybrid_swa:
            raise ValueError(f"eft: {name}: {kind} has two kinds of caches; pass --disable-hybrid-swa-memory")
        if config.num_nextn_predict_layers:
            raise ValueError(f"eft: {name}: {kind} has layers for speculation, which are not supported")
        if config.is_multimodal or config.model_is_mrope or config.is_encoder_decoder or not config.is_generation:
            raise ValueError(f"eft: {name}: {kind} is not a language model of text alone")
