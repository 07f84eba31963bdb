"""A tiny random model of every decoder class that the installed transformers has, and what `generate` makes of it.

python -m tests.families [MODEL TYPE ...]           what each does, in each setting
python -m tests.families --write docs/models.md     the table of all
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.util
import logging
import re
import time
import traceback
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import eft_kernels as eft

V, TEXT = 40, 32  # ids of the vocabulary; texts use those below TEXT, so that no special token is ever drawn
EOS, BOS, PAD, OTHER = 36, 37, 38, 39

# What a size is set to, by the field's name, in any config and sub-config that has it.
SIZES = {
    32: "hidden_size d_model n_embd embedding_dim emb_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim attention_hidden_size lru_width pronunciation_embed_dim shape_embed_dim "
    "backbone_hidden_size ple_embed_dim mamba_d_ssm model_dim n_ctx dim",
    48: "intermediate_size moe_intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff dim_ff "
    "d_inner feed_forward_size expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp "
    "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size n_inner "
    "moe_shared_expert_intermediate_size",
    64: "max_position_embeddings n_positions max_seq_len max_target_positions context_length model_max_length "
    "position_bias_max_distance prompt_mid_dim relative_max_distance image_size",
    16: "index_n_heads kv_lora_rank q_lora_rank o_lora_rank mamba_dt_rank router_hidden_size laurel_rank adapter_rank "
    "gated_norm_rank loop_gate_rank hc_lowrank time_step_rank hidden_size_per_layer_input num_buckets rel_extent "
    "prompt_types segment_types position_bias_num_buckets query_pre_attn_scalar num_mel_bins max_source_positions",
    8: "head_dim qk_nope_head_dim v_head_dim swa_head_dim d_head dim_head attention_head_size kv_channels "
    "index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim d_rel mamba_d_state state_size "
    "ssm_state_size mamba_d_head mamba_head_dim mamba_headdim local_attn_chunk_length lsh_attn_chunk_length "
    "attention_chunk_size chunk_size mamba_chunk_size floor_scale log_scaling_n_floor "
    "patch_size prompt_length dim_model_base image_seq_length classifier_proj_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim rotary_dim linear_num_heads "
    "linear_num_value_heads sliding_window sliding_window_size window_size attention_window_size local_attention "
    "local_attention_window_len index_topk index_block_size block_size ffn_round_up_to_multiple_of "
    "shape_vocab_size pronunciation_vocab_size task_type_vocab_size n_mamba_heads num_codebooks "
    "heads_per_ngram mm_tokens_per_image",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_blocks "
    "num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_k moe_topk n_group num_expert_group o_groups linear_num_key_heads n_groups "
    "mamba_n_groups mamba_ngroups index_topk_blocks n_input_layers n_output_layers n_recurrent_layers "
    "num_layers_per_stack type_vocab_size zero_expert_num num_query_groups split_ngram_parts "
    "ffn_num_layers n_layers_per_attn_res_block",
    1: "topk_group first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts num_dense_layers "
    "num_random_blocks",
    V: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base "
    "encoder_hash_byte_group_vocab",
    0.3: "initializer_range init_std init_range emb_init_std std",
    0.0: "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout activation_dropout layerdrop",
}
SIZES = {name: size for size, names in SIZES.items() for name in names.split()}
SIZES.update(eos_token_id=EOS, bos_token_id=BOS, pad_token_id=PAD, decoder_start_token_id=BOS)

# Where the recipe does not do, by model type; "a.b" is field b of sub-config a.
GEMMA4 = dict(
    num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    per_layer_config={1: {"head_dim": 16}, 3: {"head_dim": 16}},
)
ASSISTANT = dict(GEMMA4, num_kv_shared_layers=4, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8)
OVERRIDES: dict[str, dict] = {
    "bamba": dict(MAMBA2, attn_layer_indices=[1]),
    "falcon_h1": dict(mamba_n_heads=4, mamba_d_ssm=32, mamba_d_head=8),
    "granitemoehybrid": dict(MAMBA2, layer_types=["linear_attention", "full_attention"]),
    "inkling_text": dict(logits_mup_width_multiplier=1.0),  # logits far enough apart that drafts are accepted
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "hrm_text": dict(num_layers_per_stack=None),
    "prophetnet": dict(pad_token_id=0),
    "blt": {"encoder_config.hidden_size_global": 32, "decoder_config.hidden_size_global": 32},
    "cohere_compass_text": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "ffn_config.ffn_hidden_size": 48,
        "ffn_config.moe_num_experts": 4,
        "ffn_config.moe_top_k": 2,
        "attn_config.clip_qkv": 8.0,
    },
    "deepseek_v2": dict(num_experts_per_tok=2, first_k_dense_replace=1),
    "dots1": dict(
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, max_window_layers=1
    ),
    "dots3_note_text": dict(
        num_hidden_layers=2,
        layer_types=["indexed_attention", "sliding_attention"],
        head_dim=8,
        qk_nope_head_dim=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        mlp_layer_types=["dense", "sparse"],
        swa_head_dim=8,
        swa_qk_nope_head_dim=4,
        swa_v_head_dim=8,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
    ),
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "gemma4": {f"text_config.{k}": v for k, v in GEMMA4.items()},
    "gemma4_unified": {f"text_config.{k}": v for k, v in GEMMA4.items()},
    "gemma4_assistant": {f"text_config.{k}": v for k, v in ASSISTANT.items()},
    "gemma4_unified_assistant": {f"text_config.{k}": v for k, v in ASSISTANT.items()},
    "doge": dict(keep_window_size=64),  # beyond it the keys of a token that repeats tie, and which is kept is chance
    "dory": dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        n_input_layers=1,
        n_recurrent_layers=2,
        n_output_layers=1,
    ),
    "gemma3n_text": dict(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
        intermediate_size=48,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "mamba2": dict(num_heads=8),
    "longcat_flash": dict(head_dim=4),
    "lfm2": dict(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mpt": {"attn_config.attn_pdrop": ...},
    "roc_bert": dict(pad_token_id=3),
    "xmod": dict(default_language="en_XX"),
    "reformer": dict(axial_pos_shape=(8, 8), axial_pos_embds_dim=(16, 16)),
    "zaya": dict(num_experts_per_tok=1),
    "zamba": dict(
        attention_head_dim=16,
        attention_hidden_size=64,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
    ),
    "qwen4_exp_text": dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
        ple_layer_ids=[1],
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=2,
    ),
    "cohere": dict(logit_scale=1.0),
    "cohere2": dict(logit_scale=1.0),
    "cohere2_moe": dict(logit_scale=1.0),
}


def fields(config_class) -> set[str]:
    return {f.name for f in dataclasses.fields(config_class)} if dataclasses.is_dataclass(config_class) else set()


def layers_to_keep(default) -> tuple[dict, int | None]:
    """Per-layer lists of a default config, cut to the first layers in which every entry of each has been seen."""
    count = getattr(default, "num_hidden_layers", None)
    lists = {
        k: list(v)
        for k, v in vars(default).items()
        if isinstance(v, (list, tuple)) and len(v) == count and k in fields(type(default))
    }
    lists = {k: v for k, v in lists.items() if all(isinstance(e, (str, int, float)) for e in v)}
    if not lists:
        return {}, None
    keep = []
    for values in lists.values():
        for kind in dict.fromkeys(values):
            if not any(values[i] == kind for i in keep):
                keep.append(values.index(kind))
    keep = sorted(keep)[:4]
    keep = (keep + [i for i in range(count) if i not in keep])[: max(len(keep), 2)]
    keep.sort()
    return {k: [v[i] for i in keep] for k, v in lists.items()}, len(keep)


def tiny(config_class, overrides: dict):
    """A config with every size that SIZES names shrunk."""
    own = {k: v for k, v in overrides.items() if "." not in k}
    try:
        default = config_class()
    except Exception:
        default = config_class(
            **own,
            **{
                k.split(".")[0]: {n.split(".")[1]: v for n, v in overrides.items() if "." in n}
                for k in overrides
                if "." in k
            },
        )
    known = fields(config_class)
    values = {k: SIZES[k] for k in known & SIZES.keys() if vars(default).get(k) is not None or k.endswith("token_id")}
    values.update({k: OTHER for k in known if k.endswith(("_token_id", "_token_index")) and k not in SIZES})
    if "head_dim" in known:
        values["head_dim"] = SIZES["head_dim"]
    if "num_key_value_heads" in known and (
        vars(default).get("num_key_value_heads") is None or "qk_rope_head_dim" in known
    ):
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    lists, count = layers_to_keep(default)
    values.update(lists)
    if count:
        values.update({k: count for k in known & {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}})
    for k, v in vars(default).items():
        if isinstance(v, transformers.PreTrainedConfig) and k in known:
            values[k] = tiny(type(v), {n[len(k) + 1 :]: o for n, o in overrides.items() if n.startswith(k + ".")})
    values.update(own)
    return config_class(**{k: v for k, v in values.items() if v is not ...})


def classes() -> dict[str, str]:
    """{model type: class} of the causal-LM mapping; of several types of a class the one whose config it names."""
    found: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name not in found or CONFIG_MAPPING[model_type] is class_of(model_type).config_class:
            found[name] = model_type
    return {model_type: name for name, model_type in found.items()}


def config_of(model_type: str, **changes):
    config = tiny(class_of(model_type).config_class, {**OVERRIDES.get(model_type, {}), **changes})
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "is_decoder"):
            part.is_decoder, part.is_encoder_decoder = True, False
    return config


def class_of(model_type: str):
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return cls[0] if isinstance(cls, (tuple, list)) else cls


def make(model_type: str, count: int = 3, **changes) -> list:
    """``count`` random models: the first is drawn, the others lie around it, so that drafts are accepted at times."""
    models, first = [], None
    for n in range(count):
        torch.manual_seed(n)
        model = class_of(model_type)._from_config(config_of(model_type, **changes)).eval().float()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn_like(p) * (0.05 if p.numel() > 1 and float(p.std()) > 0 else 0.2))
                if first is not None:
                    p.mul_(0.3).add_(first[name], alpha=0.7)
        if first is None:
            first = dict(model.named_parameters())
        model.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
        models.append(model)
    return models


# --- the sweep -----------------------------------------------------------------------------------------------------

SEEDS = (7, 8, 9)
SAMPLED = dict(do_sample=True, temperature=1.0, top_k=0)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.0, 1.0, 1.0],
    factor=4.0,
    long_factor=[4.0, 8.0, 16.0, 32.0],
    original_max_position_embeddings=16,
)


@dataclasses.dataclass
class Case:
    """A model type, changes to its tiny config, and how long the prompts and the new text are."""

    model_type: str
    changes: dict = dataclasses.field(default_factory=dict)
    lengths: tuple = (6, 2, 4)
    steps: int = 10

    @property
    def prompts(self) -> list[list[int]]:
        """Of every length, no two alike."""
        return [[3 + (7 * b + 5 * i) % (TEXT - 3) for i in range(n)] for b, n in enumerate(self.lengths)]

    @property
    def equal(self) -> list[list[int]]:
        """Of the first length, no two alike."""
        return dataclasses.replace(self, lengths=self.lengths[:1] * len(self.lengths)).prompts


# Texts that cross a limit at which something changes, by what the table calls them.
PHI3 = dict(rope_parameters=LONGROPE, original_max_position_embeddings=16)
LONG = {
    "phi3, longrope": Case("phi3", PHI3, (12, 6, 9), 12),
    "phi3, longrope, one row": Case("phi3", PHI3, (10,), 16),
    "phimoe, longrope": Case(
        "phimoe", dict(rope_parameters=dict(LONGROPE, short_mscale=1.1, long_mscale=1.3)), (12, 6, 9), 12
    ),
    "phi4_multimodal, longrope": Case("phi4_multimodal", PHI3, (12, 6, 9), 12),
    "llama, longrope": Case("llama", dict(rope_parameters=LONGROPE), (12, 6, 9), 12),
    "llama, dynamic rope": Case(
        "llama",
        dict(max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)),
        (12, 6, 9),
        12,
    ),
    "llama, yarn": Case(
        "llama",
        dict(
            rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
        ),
        (12, 6, 9),
        12,
    ),
    "ministral3, scaled queries": Case(
        "ministral3",
        dict(
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10000.0,
                factor=4.0,
                original_max_position_embeddings=16,
                llama_4_scaling_beta=0.5,
            )
        ),
        (12, 6, 9),
        12,
    ),
    "llama4_text, chunks and scaled queries": Case(
        "llama4_text", dict(attn_temperature_tuning=True, floor_scale=4, attn_scale=0.5), (12, 6, 9), 12
    ),
    "qwen2, windows": Case("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "big_bird, sparse blocks": Case("big_bird", dict(max_position_embeddings=96), (40, 26, 37), 12),
}


@functools.cache
def cases() -> dict[str, Case]:
    """What is swept, by name: every class under its model type, and LONG."""
    return {**{t: Case(t) for t in classes()}, **{k: v for k, v in LONG.items() if v.model_type in CONFIG_MAPPING}}


def padded(prompts) -> dict:
    longest = max(map(len, prompts))
    return dict(
        input_ids=torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    )


class Oracle:
    """Logits of full forwards without a cache, of one unpadded row."""

    def __init__(self, model):
        self.model, self.seen = model, {}
        self.causal = None  # the logits of a text's prefixes are among its own

    @torch.no_grad()
    def forward(self, ids: list[int]) -> torch.Tensor:
        """Logits [n, V], inputs as the model itself prepares them where no cache is used (XLM appends a token)."""
        ids = torch.tensor([ids])
        inputs = self.model.prepare_inputs_for_generation(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        inputs.pop("logits_to_keep", None)
        return self.model(**inputs, return_dict=True).logits[0].float()

    def last(self, ids: list[int]) -> torch.Tensor:
        if tuple(ids) not in self.seen:
            self.seen[tuple(ids)] = self.forward(ids)[-1]
        return self.seen[tuple(ids)]

    def each(self, ids: list[int], prompt: int) -> torch.Tensor:
        """Logits [n, V] from which the tokens after a prompt follow; one forward for all where that is the same."""
        whole = self.forward(ids[:-1]) if self.causal is not False else None
        if self.causal is None:
            ends = (prompt, (prompt + len(ids)) // 2, len(ids) - 2)
            self.causal = len(whole) == len(ids) - 1 and all(
                torch.allclose(whole[n - 1], self.last(ids[:n]), rtol=1e-4, atol=1e-4) for n in ends
            )
        if self.causal:
            return whole[prompt - 1 :]
        return torch.stack([self.last(ids[:n]) for n in range(prompt, len(ids))])


def wrong_rows(got, prompts, oracles, weights, sampled=False, coupled=False) -> list[str]:
    """What differs from full forwards: of each row the first step whose logits do, or its text."""
    found, start = [], got.sequences.shape[1] - len(got.logits)
    for b, prompt in enumerate(prompts):
        new = got.sequences[b, start:].tolist()
        want = sum(w * o.each(prompt + new, len(prompt)) for w, o in zip(weights, oracles))[:, :TEXT]
        have = torch.stack([z[b] for z in got.logits]).float()[:, :TEXT]
        off = ((want - have).abs().amax(1) / want.std()).nan_to_num(9.0, 9.0)
        bad = (off > 1e-2).nonzero()
        if len(bad):
            n = int(bad[0])
            found.append(f"row {b} step {n}: logits off by {float(off[n]):.2g} std (most {float(off.max()):.2g})")
        elif coupled:
            steps = torch.arange(len(new))
            tokens = eft.sample(
                [want.contiguous()],
                [1.0],
                seed=torch.full_like(steps, SEEDS[b]),
                position=steps,
                temperature=1.0 if sampled else 0.0,
            ).tokens.tolist()
            if tokens != new:
                found.append(f"row {b}: text {new} is not {tokens}")
    return found


def vocabulary(model) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def emulated(models, prompts, steps: int, sampled: bool, k: int, verify: str, width: int = 1):
    base, tuned, ref = models
    options = SAMPLED if sampled else dict(do_sample=False)
    return base.generate(
        **padded(prompts),
        custom_generate=eft.hf.generate,
        tuned=tuned,
        ref=ref,
        draft_tokens=k,
        draft_width=width,
        verify=verify,
        seed=torch.tensor(SEEDS[: len(prompts)]),
        max_new_tokens=steps,
        vocab_size=TEXT,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def plain(base, prompts, steps: int):
    """transformers' own greedy text."""
    return base.generate(
        **padded(prompts),
        do_sample=False,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=list(range(TEXT, vocabulary(base))),
    )


# setting: (K, calls: "greedy" or "sampled", how drafts are verified, and children of a node where it is not one)
SETTINGS = {
    "one row": (0, ["sampled coupled"]),
    "padded": (0, ["sampled coupled"]),
    "drafts": (3, ["greedy coupled", "sampled token"]),  # rows of one length that accept differently
    "padded drafts": (3, ["sampled coupled"]),
    "trees": (2, ["sampled coupled 2"]),  # padded
}


def attempt(prompts, k, calls, models, oracles, steps) -> tuple[str, bool]:
    """("right", "refused: ...", "wrong: ..." or "raised ..."; whether drafts were accepted and rejected)."""
    found, both = [], False
    try:
        for call in calls:
            how, verify, *width = call.split()
            got = emulated(models, prompts, steps, how == "sampled", k, verify, *map(int, width))
            found += wrong_rows(got, prompts, oracles, (1, 1, -1), how == "sampled", verify == "coupled")
            both |= bool(k) and 0 < int(got.speculation.accepted.sum()) < int(got.speculation.drafted.sum())
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        if isinstance(e, ValueError) and "eft_kernels" in last.filename:
            return f"refused: {e}", both
        where = f"{last.filename.rpartition('site-packages/')[2]}:{last.lineno}"
        return f"raised {type(e).__name__}: {str(e)[:160]} ({where})", both
    return ("wrong: " + "; ".join(found) if found else "right"), both


def own(base, oracle, prompts, steps) -> str:
    """What `attempt` says, of transformers' own greedy text of the base model."""
    try:
        found = wrong_rows(plain(base, prompts, steps), prompts, [oracle], [1.0])
    except Exception as e:
        return f"raised {type(e).__name__}: {str(e)[:160]}"
    return "wrong: " + "; ".join(found) if found else "right"


def unlike(models, prompts, steps: int, k: int) -> list[str]:
    """How the emulation differs from transformers' own greedy text where tuned has ref's weights: it is base alone."""
    base, _, ref = models
    got = emulated((base, copy.deepcopy(ref), ref), prompts, steps, False, k, "coupled")
    want = plain(base, prompts, steps)
    found, start = [], got.sequences.shape[1] - len(got.logits)
    for b in range(len(prompts)):
        for n, (have, theirs) in enumerate(zip(got.logits, want.logits)):
            have, theirs = have[b, :TEXT].float(), theirs[b, :TEXT].float()
            if not float((have - theirs).abs().max()) < 1e-2 * float(theirs.std()):
                found.append(f"row {b} step {n}: is not transformers' either")
                break
            if got.sequences[b, start + n] != want.sequences[b, start + n]:
                break
    return found


def sweep(case: Case, models: list) -> dict[str, str]:
    """{setting: "right", "refused: ...", "own: what transformers has wrong", "wrong: ..." or "raised ..."}."""
    oracles, out = [Oracle(m) for m in models], {}
    for setting, (k, calls) in SETTINGS.items():
        prompts = case.prompts[:1] if setting == "one row" else case.equal if setting == "drafts" else case.prompts
        out[setting], both = attempt(prompts, k, calls, models, oracles, case.steps)
        kind = out[setting].split()[0]
        if kind in ("wrong:", "raised"):
            theirs = own(models[0], oracles[0], prompts, case.steps)
            found = [] if kind == "raised" else unlike(models, prompts, case.steps, k)
            if theirs.startswith(kind) and not found:
                out[setting] = f"own: {theirs} (here {out[setting]})"
            elif found:
                out[setting] += "; where tuned has ref's weights " + "; ".join(found)
        elif k and kind == "right" and not both:
            out[setting] = "wrong: no draft was accepted, or none rejected, which tests nothing"
    return out


# --- the table -----------------------------------------------------------------------------------------------------

DOC = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Which transformers classes work

Written by `python -m tests.families --write docs/models.md` and held by tests/test_families.py; transformers {version}.

Every class of transformers' causal-LM mapping as a tiny random model, three of them as base, tuned and ref, float32,
greedy and sampled: each text and its logits against full forwards without a cache of one unpadded row.

- one row: K = 0. padded: three rows of different length, K = 0. drafts: K = 3, three rows of one length that accept
  differently. padded drafts: the same with rows of different length; coupled and token. trees: two levels of two
  children a node, rows of different length, coupled.
- yes: right. no: refused with a ValueError before anything is computed, for the reason below the table.
  theirs: transformers' own `generate` of the base model differs from full forwards in this setting (or fails), and the
  emulation is as it: with ref's weights in tuned it is transformers' text.

| model type | class | {settings} |
|---|---|{rules}|
"""


def reason(text: str, name: str) -> str:
    """A refusal without what is the class's own."""
    return re.sub(r"\b(model|tuned|ref)\b", "model", text.partition(": ")[2].replace(name, "CLASS"))


def row(name: str, case: Case, out: dict[str, str]) -> tuple[str, dict[str, str]]:
    """(the table's line, {reason: settings} of what was refused)."""
    cells, refused = [], {}
    for setting, text in out.items():
        kind = text.split()[0].rstrip(":")
        cells.append({"right": "yes", "refused": "no", "own": "theirs"}.get(kind, kind.upper()))
        if kind == "refused":
            refused.setdefault(reason(text, class_of(case.model_type).__name__), []).append(setting)
    return f"| {name} | {class_of(case.model_type).__name__} | {' | '.join(cells)} |", refused


def missing(error: Exception) -> str | None:
    """The package that a class needs and this environment lacks."""
    found = re.search(r"requires the (\w+) library", str(error))
    return found[1] if found and importlib.util.find_spec(found[1]) is None else None


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.families")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    lines, reasons = [], {}
    for name, case in cases().items():
        if args.names and name not in args.names:
            continue
        start = time.process_time()
        try:
            out = sweep(case, make(case.model_type, **case.changes))
        except ImportError as e:
            if (package := missing(e)) is None:
                raise
            lines.append(f"| {name} | {class_of(case.model_type).__name__} |" + f" needs {package} |" * len(SETTINGS))
            print(name, "needs", package)
            continue
        line, refused = row(name, case, out)
        lines.append(line)
        for why, settings in refused.items():
            reasons.setdefault(why, []).append(f"{name} ({', '.join(settings)})" if len(settings) < len(out) else name)
        print(f"{name} {class_of(case.model_type).__name__} {time.process_time() - start:.1f}s")
        for setting, text in out.items():
            print(f"    {setting}: {text}", flush=True)
    if args.write:
        text = (
            HEAD.format(
                version=transformers.__version__, settings=" | ".join(SETTINGS), rules="|".join("---" for _ in SETTINGS)
            )
            + "\n".join(lines)
            + "\n\n## Why refused\n"
        )
        for why, names in sorted(reasons.items()):
            text += f"\n- {why}\n  {', '.join(names)}\n"
        args.write.parent.mkdir(exist_ok=True)
        args.write.write_text(text)


if __name__ == "__main__":
    main()
