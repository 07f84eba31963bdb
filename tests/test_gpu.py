"""The package on a GPU: every backend that runs there against the definition on the CPU, generate, CUDA graphs.

EFT_KERNELS_TEST_DEVICE=cpu runs the same tests on the CPU, all but the recording of the graphs.
"""

import copy
import os

import pytest
import torch

import eft_kernels as eft
from eft_kernels import dispatch, ops
from eft_kernels.testing import BF16, CASES, F16, F32, Case, check_logprobs, check_sample, check_verify, make, per_row

DEVICE = torch.device(os.environ.get("EFT_KERNELS_TEST_DEVICE", "cuda"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device (EFT_KERNELS_TEST_DEVICE=cpu runs these tests on the CPU)", allow_module_level=True)

OTHER = "meta" if DEVICE.type == "cpu" else "cpu"  # a second device
HERE = [b for b in dispatch.TABLE if dispatch.status(b.name)[0]]
BACKENDS = [b.name for b in HERE if not b.devices or DEVICE.type in b.devices]
METHODS = ops.METHODS
on_every_backend = pytest.mark.parametrize("name", BACKENDS)
over_the_table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# --- the case table ------------------------------------------------------------------------------------------------

@on_every_backend
@over_the_table
def test_sample(case, name):
    check_sample(case, name, device=DEVICE)


@on_every_backend
@over_the_table
def test_sample_alone(case, name):
    check_sample(case, name, seed=1, device=DEVICE, logprobs=False)


@on_every_backend
@over_the_table
def test_logprobs(case, name):
    check_logprobs(case, name, device=DEVICE)


@on_every_backend
@pytest.mark.parametrize("method", METHODS)
@over_the_table
def test_verify(case, method, name):
    check_verify(case, name, method, device=DEVICE)


@on_every_backend
@pytest.mark.parametrize("method", METHODS)
def test_verify_of_a_deterministic_proposer(method, name):
    for case in CASES:
        if case.name in ("plain", "a chunk and one", "top-p ties", "everything", "bad rows filtered"):
            check_verify(case, name, method, draft=None, seed=1, device=DEVICE)


@on_every_backend
def test_no_mismatch_in_bulk(name):
    mixed = dict(temperature=per_row(1.0, 0.0, 0.6, 1.7, 0.9), top_k=per_row(0, 0, 5, 100), top_p=per_row(1.0, 0.9),
                 min_p=per_row(0.0, 0.0, 0.02), upscale_top_p=per_row(1.0, 1.0, 1.0, 0.8))
    for kwargs in ({}, mixed):
        check_sample(Case("bulk", rows=4000, vocab=(523,), dtypes=(BF16, F32, F16), kwargs=kwargs), name, device=DEVICE,
                     logprobs=True)


def test_layouts_survive_the_device():
    """The cases about layout have it there too: a copy to a device would make them contiguous and aligned."""
    cases = {case.name: case for case in CASES}
    for case, odd in (("strided", lambda z: z.stride(0) > z.shape[1]), ("transposed", lambda z: z.stride(-1) > 1),
                      ("unaligned", lambda z: z.data_ptr() % 16)):
        logits, *_ = make(cases[case], device=DEVICE)
        assert all(odd(z) and z.device.type == DEVICE.type for z in logits), case


@on_every_backend
def test_outputs_are_on_the_device(name):
    logits, weights, kwargs = make(Case("plain"), device=DEVICE)
    out = eft.sample(logits, weights, top_logprobs=2, diagnostics=True, backend=name, **kwargs)
    slots, _, _ = make(Case("plain"), slots=4, device=DEVICE)
    drafts = torch.zeros(4, 3, dtype=torch.int64, device=DEVICE)
    ver = eft.verify(slots, weights, drafts, logprobs=True, backend=name, **kwargs)
    lp = eft.logprobs(logits, weights, backend=name)
    given = eft.token_logprobs(logits, weights, drafts, backend=name)
    assert {x.device for x in (*out, *ver, lp, given)} == {logits[0].device}


# --- arguments on another device -----------------------------------------------------------------------------------

def elsewhere(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=OTHER)


@pytest.mark.parametrize("argument, value", [
    ("temperature", elsewhere(4)), ("top_k", elsewhere(4, dtype=torch.int64)), ("top_p", elsewhere(4)),
    ("min_p", elsewhere(4)), ("upscale_top_p", elsewhere(4)), ("seed", elsewhere(4, dtype=torch.int64)),
    ("position", elsewhere(4, dtype=torch.int64)), ("weights", elsewhere(3)), ("weights", elsewhere(4, 3)),
    ("token_mask", elsewhere(4, 32, dtype=torch.int32)), ("logits[1]", elsewhere(4, 1000)),
    ("draft_tokens", elsewhere(4, 3, dtype=torch.int64)), ("draft_lengths", elsewhere(4, dtype=torch.int64)),
    ("ids", elsewhere(4, dtype=torch.int64)),
])
def test_an_argument_on_another_device_is_refused(argument, value):
    logits, weights, kwargs = make(Case("plain"), device=DEVICE)
    with pytest.raises(ValueError) as error:
        if argument.startswith("draft"):
            logits, _, _ = make(Case("plain"), slots=4, device=DEVICE)
            drafts = torch.zeros(4, 3, dtype=torch.int64, device=DEVICE)
            eft.verify(logits, weights, **{"draft_tokens": drafts, argument: value})
        elif argument == "ids":
            eft.token_logprobs(logits, weights, value)
        elif argument == "logits[1]":
            eft.sample([logits[0], value, logits[2]], weights)
        else:
            eft.sample(logits, **{"weights": weights, **kwargs, argument: value})
    text = str(error.value)
    assert text.startswith(argument) and OTHER in text and DEVICE.type in text, text


def test_a_backend_of_another_device_is_refused():
    refused = [(b.name, d) for b in HERE for d in (DEVICE.type, OTHER) if b.devices and d not in b.devices]
    assert refused or {*BACKENDS} == {"reference"}
    for name, device in refused:
        logits, weights, kwargs = make(Case("plain"), device=device)
        with pytest.raises(ValueError, match=f"'{name}' runs on .*the logits are on {device}"):
            eft.sample(logits, weights, backend=name, **kwargs)


# --- generate ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("transformers", minversion="5.0")
    import test_hf

    return test_hf


@pytest.fixture(scope="module")
def models(hf):
    """base, tuned, ref: float32 on the CPU"""
    return [hf.make("llama", seed) for seed in (1, 2, 4)]


def moved(models, dtype):
    return [copy.deepcopy(m).to(DEVICE, dtype) for m in models]


def generate(hf, models, **options):
    inputs = {name: x.to(models[0].device) for name, x in hf.padded().items()}
    return hf.run(models, inputs, return_dict_in_generate=True, **options)


BLUR = 0.1  # nats that bfloat16 may cost a greedy token; 0.025 at most was seen on a CPU
KS = [("coupled", 0), *((method, k) for method in METHODS for k in (1, 4))]


@pytest.mark.parametrize("method, k", KS)
def test_generate_float32(hf, models, method, k):
    """The tokens of the CPU: greedily whatever verifies, sampled for plain and coupled decoding (same noise)."""
    there = moved(models, F32)
    for sampling in (dict(do_sample=False), hf.SAMPLED):
        got = generate(hf, there, draft_tokens=k, verify=method, **sampling)
        assert got.sequences.device.type == DEVICE.type
        assert k == 0 or int(got.speculation.emitted.sum()) == 4 * 12
        if method == "coupled" or not sampling["do_sample"]:
            assert torch.equal(got.sequences.cpu(), generate(hf, models, **sampling).sequences), sampling


@pytest.mark.parametrize("method, k", KS)
def test_generate_bf16(hf, models, method, k):
    """Forwards of other lengths round differently, so near ties may fall otherwise: each greedy token is the best of
    its prefix up to what bfloat16 blurs."""
    there = moved(models, BF16)
    rounded = [m.bfloat16().float() for m in copy.deepcopy(models)]  # the same weights on the CPU in float32
    out = generate(hf, there, draft_tokens=k, verify=method).sequences.cpu()
    for row, prompt in zip(out, hf.PROMPTS):
        text = row[6 - len(prompt) :].tolist()
        scores = sum(w * hf.full_logits(m, text) for w, m in zip((1, 1, -1), rounded))
        for n in range(len(prompt), len(text)):
            assert scores[n - 1].max() - scores[n - 1, text[n]] < BLUR, (prompt, n)
    sampled = [generate(hf, there, draft_tokens=k, verify=method, **hf.SAMPLED).sequences for _ in range(2)]
    assert torch.equal(*sampled) and int(sampled[0].min()) >= 0


# --- CUDA graphs ---------------------------------------------------------------------------------------------------

def recorded(call):
    """``call`` as a CUDA graph: a function that replays it and gives its outputs. Elsewhere ``call`` itself."""
    if DEVICE.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay():
        graph.replay()
        return out

    return replay


def replays_what_eager_gives(name, call):
    """``call(position)`` recorded once, its position tensor advanced in place: eager's tokens, new ones each time."""
    if name == "reference":
        pytest.skip("the definition may synchronise, which a CUDA graph cannot hold")
    position, seen = torch.zeros(4, dtype=torch.int64, device=DEVICE), []
    replay = recorded(lambda: call(position))
    for n in range(5):
        got = replay()
        for x, want in zip(got, call(n)):
            torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)
        seen.append(tuple(got.tokens.flatten().tolist()))
        position += 1
    assert len(set(seen)) == 5


@on_every_backend
@pytest.mark.parametrize("case", [
    Case("graph", vocab=(32000,), dtypes=(BF16,)),
    Case("graph, filters", vocab=(32000,), kwargs=dict(temperature=1.3, top_k=400, top_p=0.95, min_p=1e-4)),
    Case("graph, rows", vocab=(32000,), dtypes=(BF16,), special="mask", kwargs=dict(
        temperature=per_row(1.0, 1.5), top_k=per_row(0, 500), top_p=per_row(1.0, 0.95), min_p=per_row(0.0, 1e-4),
        upscale_top_p=per_row(1.0, 0.9))),
], ids=lambda case: case.name)
def test_graph_of_sample(case, name):
    logits, weights, kwargs = make(case, device=DEVICE)
    kwargs.pop("position")
    replays_what_eager_gives(name, lambda position: eft.sample(
        logits, weights, position=position, top_logprobs=3, diagnostics=True, backend=name, **kwargs))


@on_every_backend
@pytest.mark.parametrize("method", METHODS)
def test_graph_of_verify(method, name):
    logits, weights, kwargs = make(Case("graph of verify", dtypes=(BF16,), scale=1.0), slots=4, device=DEVICE)
    kwargs.pop("position")
    drafts = logits[1][:, :-1].argmax(-1)
    replays_what_eager_gives(name, lambda position: eft.verify(
        logits, weights, drafts, method=method, position=position, logprobs=True, backend=name, **kwargs))
