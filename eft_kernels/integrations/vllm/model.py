"""`EftForCausalLM`: base, tuned and ref as one model of vLLM, each an architecture of vLLM's own."""

from __future__ import annotations

import glob
import json
import os

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.interfaces import SupportsPP, is_attention_free, is_hybrid
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.config import get_config

import eft_kernels as eft

from ..composition import Composition
from . import ARCHITECTURE
from .startup import check_version


class EftForCausalLM(nn.Module, SupportsPP):
    """All models read the same tokens; each has layers, and so a KV cache, of its own.

    `forward` lays their hidden states side by side, because vLLM gathers the rows to sample in one tensor;
    `compute_logits` takes them apart and combines the logits by the config's weights. Where `sampler.EftSampler` is to
    sample, it hands on base's logits instead and keeps all (`take_logits`).
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        check_version()
        outer = vllm_config.model_config
        self.config = outer.hf_config
        self.composition = Composition.parse(getattr(outer.hf_config, "eft", None), outer.model)
        folders = (self.composition.folders[0] or outer.model, *self.composition.folders[1:])
        configs = [get_config(folder, outer.trust_remote_code) for folder in folders]
        texts = [config.get_text_config() for config in configs]
        self.vocab_size = outer.get_vocab_size()
        check_sizes(self.composition.names, texts, self.vocab_size, outer.max_model_len)
        self.experts = nn.ModuleDict()
        for name, config in zip(self.composition.names, configs):
            own = expert_config(vllm_config, config, name)
            with set_model_tag(f"eft_{name}"):
                self.experts[name] = initialize_model(vllm_config=own, prefix=maybe_prefix(prefix, f"experts.{name}"))
            if is_hybrid(self.experts[name]) or is_attention_free(self.experts[name]):
                raise ValueError(f"eft: {name}: {config.architectures[0]} keeps states; allowed are attention models")
        self.widths = [text.hidden_size for text in texts]
        if self.composition.base_within:
            self.allow_patterns_overrides = weight_files(outer.model, self.composition.base_within)
        self.secondary_weights = [
            DefaultModelLoader.Source(folder, revision=None, prefix=f"experts.{name}.")
            for name, folder in zip(self.composition.names[1:], folders[1:])
        ]
        self._next_is_sampled = False
        self._logits: list[torch.Tensor] | None = None

    def load_weights(self, weights) -> set[str]:
        def named():
            for name, tensor in weights:
                yield name if name.startswith("experts.") else f"experts.base.{name}", tensor

        return AutoWeightsLoader(self).load_weights(named())

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.experts["base"].embed_input_ids(input_ids)

    def make_empty_intermediate_tensors(self, batch_size, dtype, device) -> IntermediateTensors:
        made = {name: m.make_empty_intermediate_tensors(batch_size, dtype, device) for name, m in self.experts.items()}
        return joined(made)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """[tokens, sum of hidden sizes]; between the stages of a pipeline, the tensors of all models."""
        if inputs_embeds is not None:
            raise ValueError(f"{ARCHITECTURE}: inputs_embeds: an embedding belongs to one of the models, not to all")
        out = {
            name: m(
                input_ids=input_ids,
                positions=positions,
                intermediate_tensors=part_of(intermediate_tensors, name),
                inputs_embeds=None,
                **kwargs,
            )
            for name, m in self.experts.items()
        }
        if any(isinstance(h, IntermediateTensors) for h in out.values()):
            return joined(out)
        return torch.cat(list(out.values()), -1)

    def expert_logits(self, hidden_states: torch.Tensor) -> list[torch.Tensor] | None:
        """The logits of all models, [rows, vocab_size] each; None on ranks that do not sample."""
        parts = hidden_states.split(self.widths, -1)
        logits = [m.compute_logits(h.contiguous()) for m, h in zip(self.experts.values(), parts)]
        return None if any(z is None for z in logits) else [z[:, : self.vocab_size] for z in logits]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The combined scores, float32 [rows, vocab_size]; once after `expect_sampling`, base's logits."""
        logits = self.expert_logits(hidden_states)
        sampled, self._next_is_sampled = self._next_is_sampled, False
        if logits is None:
            return None
        if sampled:
            self._logits = logits
            return logits[0]
        default = self.composition.default
        return eft.combine(logits, default.weights, upscale_top_p=default.upscale_top_p, tuned=min(1, len(logits) - 1))

    def expect_sampling(self) -> None:
        """The next logits go to the fused sampler: there is no need to combine them."""
        self._next_is_sampled = True

    def take_logits(self, handed: torch.Tensor) -> list[torch.Tensor] | None:
        """The models' logits where ``handed`` is what `compute_logits` handed on for them."""
        logits, self._logits = self._logits, None
        return logits if logits is not None and logits[0] is handed else None

    def get_model_state_cls(self):
        from .sampler import EftModelState

        return EftModelState


def packed(allowed: torch.Tensor) -> torch.Tensor:
    """bool [rows, V] as a token mask, int32 [rows, ceil(V / 32)]."""
    rows, width = allowed.shape
    bits = nn.functional.pad(allowed, (0, -width % 32)).view(rows, -1, 32).to(torch.int64)
    words = (bits << torch.arange(32, device=allowed.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def expert_config(vllm_config: VllmConfig, config, name: str) -> VllmConfig:
    """vLLM's configuration as one model alone would have it."""
    own = vllm_config.with_hf_config(config, architectures=config.architectures)
    if getattr(config, "quantization_config", None) != getattr(
        vllm_config.model_config.hf_config, "quantization_config", None
    ):
        own.model_config.quantization = None
        own.model_config._verify_quantization()
        own.quant_config = VllmConfig.get_quantization_config(own.model_config, own.load_config)
    # part of the key of the compile cache: models of equal configs are not the same graph
    own.additional_config = {**(vllm_config.additional_config or {}), "eft_expert": name}
    return own


def check_sizes(names, texts, vocab_size: int, max_model_len: int) -> None:
    """ValueError where the engine was told of more tokens or positions than every model has."""
    widths = {name: text.vocab_size for name, text in zip(names, texts)}
    if vocab_size != min(widths.values()):
        raise ValueError(
            f"eft: vocab_size: got {vocab_size}, the models share {min(widths.values())} ids ({widths}); pass "
            f'hf_overrides={{"vocab_size": {min(widths.values())}}}, or use a folder made by `eft-kernels compose`'
        )
    for name, text in zip(names, texts):
        rope = getattr(text, "rope_parameters", None) or {}
        stretched = rope.get("factor", 1) if rope.get("rope_type") in ("linear", "dynamic", "yarn") else 1
        limit = (getattr(text, "max_position_embeddings", None) or max_model_len) * stretched
        if limit < max_model_len:
            raise ValueError(
                f"eft: max_model_len: got {max_model_len}, {name} has {limit:g} positions; pass "
                f"max_model_len={limit:g} (vllm serve --max-model-len {limit:g})"
            )


def weight_files(folder: str, base: str) -> list[str]:
    """Base's weight files below ``folder``, as patterns for vLLM's loader; those of the index where there is one."""
    index = os.path.join(folder, base, "model.safetensors.index.json")
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            files = sorted(set(json.load(file)["weight_map"].values()))
        # vLLM stops at the first pattern that matches something
        return [os.path.join(base, files[0])] if len(files) == 1 else [_one_pattern(base, files)]
    kinds = ("*.safetensors", "*.bin", "*.pt")
    return next(([os.path.join(base, k)] for k in kinds if glob.glob(os.path.join(folder, base, k))), [base])


def _one_pattern(base: str, files: list[str]) -> str:
    """A pattern for numbered shards: model-00001-of-00005.safetensors."""
    start, end = os.path.commonprefix(files), os.path.commonprefix([f[::-1] for f in files])[::-1]
    return os.path.join(base, f"{start}*{end}")


def joined(parts: dict[str, IntermediateTensors]) -> IntermediateTensors:
    return IntermediateTensors({f"{name}.{key}": t for name, part in parts.items() for key, t in part.items()})


def part_of(tensors: IntermediateTensors | None, name: str) -> IntermediateTensors | None:
    if tensors is None:
        return None
    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    return IntermediateTensors(own)
