"""States of recurrent layers after tokens are taken back, against a model that never read those tokens."""

import threading
import time

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.0")

from eft_kernels.integrations.hf import recurrent  # noqa: E402
from eft_kernels.integrations.hf.emulated import EmulatedModel  # noqa: E402
from eft_kernels.integrations.hf.models import cache_name  # noqa: E402
from eft_kernels.integrations.hf.recurrent import Recurrence  # noqa: E402
from eft_kernels.integrations.hf.texts import Place  # noqa: E402
from tests import families  # noqa: E402
from tests.test_hf import SAMPLED, run  # noqa: E402

pytestmark = pytest.mark.skipif(
    recurrent.Linear is None or not recurrent.holds_states(recurrent.Linear()),
    reason="this transformers keeps states in caches of the models' own",
)

PURE = ["mamba", "mamba2", "falcon_mamba"]
HYBRID = [
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "inkling2_loop_text",
    "kimi_linear",
    "lfm2_moe",
    "nemotron_h",
    "qwen3_next",
    "zamba",
    "zamba2",
    "zaya",
]
N = 5  # tokens a pass


class Reader:
    """A tiny model with a cache; ``texts`` are what its rows have read."""

    def __init__(self, model, texts):
        self.model, self.texts = model, [list(t) for t in texts]
        config = model.config.get_text_config(decoder=True)
        self.cache = transformers.DynamicCache(config=config)
        self.cache.layers = [recurrent.with_text(layer, Place()) for layer in self.cache.layers]
        self.recurrence = Recurrence(model, self.cache)
        self.read(torch.tensor(texts), first=True)
        self.recurrence.keep([len(texts[0])] * len(texts))

    @torch.no_grad()
    def read(self, ids, first=False):
        start = 0 if first else len(self.texts[0])
        known = {cache_name(self.model): self.cache, "use_cache": True}
        if not first:
            self.texts = [t + new for t, new in zip(self.texts, ids.tolist())]
        positions = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
        with self.recurrence.reading(ids.shape[1]):
            return self.model(ids, position_ids=positions, **known).logits

    def keep(self, counts):
        pending = self.recurrence.pending
        self.recurrence.keep(counts)
        self.texts = [t[: len(t) - pending + count] for t, count in zip(self.texts, counts)]

    def states(self):
        return [state.clone() for state in self.recurrence._states()]


def small(model_type):
    return families.make(model_type, 1)[0]


def ids(rows, count, seed=0):
    return torch.randint(3, families.TEXT, (rows, count), generator=torch.Generator().manual_seed(seed))


def close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("passes, kernel", [([N], False), ([N], True), ([1] * N, False), ([2, 1, 2], False)], ids=str)
@pytest.mark.parametrize("model_type", PURE + HYBRID)
def test_states_are_those_of_the_kept_tokens(model_type, passes, kernel, monkeypatch):
    """With a kernel a scan takes all tokens of a pass at once."""
    if kernel:
        monkeypatch.setattr(recurrent, "PADDED", set())
    model, prompt, new = small(model_type), ids(6, 4), ids(6, N, seed=1)
    reader = Reader(model, prompt.tolist())
    for part in new.split(passes, 1):
        reader.read(part)
    full = reader.states()
    counts = [3, 0, 5, 1, 3, 4]
    reader.keep(counts)
    for b, count in enumerate(counts):
        alone = Reader(model, prompt[b : b + 1].tolist())
        for i in range(count):
            alone.read(new[b : b + 1, i : i + 1])
        close([s[b : b + 1] for s in reader.states()], alone.states())
        if count < N:  # and not those of all tokens
            assert any(not torch.allclose(s[b], f[b], rtol=1e-3, atol=1e-3) for s, f in zip(reader.states(), full))


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("model_type", PURE)
def test_rows_drift_apart_over_rounds(model_type, kernel, monkeypatch):
    """Logits of every pass against full forwards of each row."""
    if kernel:
        monkeypatch.setattr(recurrent, "PADDED", set())
    model, generator = small(model_type), torch.Generator().manual_seed(2)
    reader = Reader(model, ids(4, 3).tolist())
    for seed in range(5):
        passes = ([N], [1] * N, [3, 2])[seed % 3]
        logits = torch.cat([reader.read(part) for part in ids(4, N, seed + 3).split(passes, 1)], 1)
        for b, text in enumerate(reader.texts):
            with torch.no_grad():
                want = model(torch.tensor([text]), use_cache=False).logits[0, -N:]
            torch.testing.assert_close(logits[b], want, rtol=1e-4, atol=1e-4)
        reader.keep(torch.randint(0, N + 1, (4,), generator=generator).tolist())
    assert len({len(text) for text in reader.texts}) > 2


@pytest.mark.parametrize(
    "model_type, again",
    [("qwen3_next", set()), ("mamba2", set()), ("kimi_linear", set()), ("mamba", {"x_proj"})],  # which is small
)
def test_going_back_reads_no_projection_again(model_type, again):
    model, called = small(model_type), set()
    reader = Reader(model, ids(2, 4).tolist())
    reader.read(ids(2, N))
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda m, args, name=name: called.add(name.rpartition(".")[2]))
    reader.keep([2, 3])
    assert called == again
    reader.read(ids(2, 1))
    assert called > again


def test_the_first_pass_is_kept_or_forgotten_as_a_whole():
    model, prompt = small("qwen3_next"), ids(2, 4)
    reader = Reader(model, prompt.tolist())
    after, reader.recurrence.passes = reader.states(), []
    fresh = Reader.__new__(Reader)
    fresh.model, fresh.texts = model, [[], []]
    fresh.cache = transformers.DynamicCache(config=model.config)
    fresh.recurrence = Recurrence(model, fresh.cache)
    with pytest.raises(ValueError, match="counts: got .*5.*, allowed are 0 to 4"):
        fresh.read(prompt, first=True)
        fresh.keep([5, 4])
    for counts in ([3, 4], [0, 4], [1, 1]):
        with pytest.raises(ValueError, match="counts: got .*, allowed are 4 to 4, or 0 for all rows"):
            fresh.keep(counts)
    fresh.read(prompt[:, :2])
    fresh.keep([0, 0])
    assert fresh.states() == [] and not fresh.recurrence.passes
    for layer in fresh.cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.crop(-layer.get_seq_length())
    fresh.read(prompt, first=True)
    fresh.keep([4, 4])
    close(fresh.states(), after)
    with pytest.raises(ValueError, match="counts: got .*-1.*, allowed are 0 to 0"):
        fresh.keep([-1, 0])


def test_a_pass_that_raises_leaves_the_model_as_it_was():
    model = small("mamba2")
    reader = Reader(model, ids(2, 4).tolist())
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    last = model.backbone.layers[-1].mixer.norm

    def fail(*args):
        raise FloatingPointError

    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError):
        reader.read(ids(2, N))
    hook.remove()
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before
    assert not recurrent._patched and not reader.recurrence.pending


def test_a_forward_of_the_modules_own_is_put_back():
    model = small("mamba2")
    mixer = model.backbone.layers[0].mixer
    mixer.forward = own = mixer.forward
    reader = Reader(model, ids(2, 4).tolist())
    reader.read(ids(2, N))
    assert mixer.__dict__["forward"] is own


def test_threads_share_a_model():
    """Two that record and one that does not, in the midst of each other's passes."""
    model, new = small("qwen3_next"), ids(2, N, seed=1)

    def alone(seed):
        reader = Reader(model, ids(2, 4, seed).tolist())
        for _ in range(6):
            reader.read(new)
            reader.keep([2, 4])
        return reader.states()

    @torch.no_grad()
    def plain():
        return [model(new, use_cache=False).logits for _ in range(20)]

    want, got = [alone(1), alone(2), plain()], [None] * 3
    jobs = [lambda: alone(1), lambda: alone(2), plain]
    mixers = [m for m in model.modules() if recurrent._names(m) & recurrent.UPDATES]
    hooks = [m.register_forward_pre_hook(lambda m, args: time.sleep(0.001)) for m in mixers]  # so that passes overlap

    def work(i):
        got[i] = jobs[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    for have, expected in zip(got, want):
        close(have, expected)
    assert not recurrent._patched


class Quantised(nn.Module):
    """A projection in 8 bits, as libraries put one in the place of an nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("quantised", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.quantised * self.scale, self.bias)


@pytest.mark.parametrize("model_type", ["mamba2", "qwen3_next", "zamba"])
def test_quantised_projections(model_type):
    models = families.make(model_type)
    for model in models:
        for parent in [m for m in model.modules() if recurrent._names(m) & recurrent.UPDATES]:
            for name, child in list(parent.named_children()):
                if name in ("in_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"):
                    setattr(parent, name, Quantised(child))
    check(models)


def check(models, **options):
    """Speculation writes the text of plain decoding."""
    for sampling in (SAMPLED, dict(do_sample=False)):
        want = run(models, vocab_size=families.TEXT, **sampling)
        assert torch.equal(run(models, vocab_size=families.TEXT, draft_tokens=3, **sampling), want)


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "bamba"])
def test_one_module_is_base_and_tuned(model_type):
    """With an adapter in its mixers that is off for one of them."""
    peft = pytest.importorskip("peft")
    base = small(model_type)
    torch.manual_seed(3)
    adapted = ["in_proj_qkvz", "in_proj_ba", "out_proj"] if model_type == "qwen3_next" else ["in_proj"]
    config = peft.LoraConfig(target_modules=adapted, r=4)
    tuned = peft.get_peft_model(base, config)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3)
    check([base, tuned.eval(), None])


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "qwen3_next"])
def test_weights_that_accelerate_brings(model_type):
    """And takes away after each module's call."""
    accelerate = pytest.importorskip("accelerate")
    models = families.make(model_type)
    want = run(models, vocab_size=families.TEXT, **SAMPLED)
    models = [accelerate.cpu_offload(model, execution_device="cpu") for model in models]
    assert torch.equal(run(models, vocab_size=families.TEXT, draft_tokens=3, **SAMPLED), want)
    assert all(p.device.type == "meta" for model in models for p in model.parameters())


def test_what_cannot_go_back_is_refused():
    model = small("recurrent_gemma")
    with pytest.raises(ValueError, match="its states are not in its cache"):
        Recurrence(model, transformers.DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"draft_tokens: model \(Recurrent.*\(its states are not in its cache\)"):
        run(families.make("recurrent_gemma"), draft_tokens=2, vocab_size=families.TEXT)


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "bamba"])
def test_assisted_decoding_and_prompt_lookup_are_greedy(model_type):
    emulated = EmulatedModel(*families.make(model_type))
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 9]])
    options = dict(max_new_tokens=14, pad_token_id=families.PAD, eos_token_id=families.EOS)
    want = emulated.generate(prompt, **options)
    assert torch.equal(emulated.generate(prompt, prompt_lookup_num_tokens=3, **options), want)
    assert torch.equal(emulated.generate(prompt, assistant_model=small("llama"), **options), want)
