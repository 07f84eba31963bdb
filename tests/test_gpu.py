"""The package on a GPU: every backend that runs there against the definition on the CPU, generate, CUDA graphs.

EFT_KERNELS_TEST_DEVICE=cpu runs the same tests on the CPU, all but the recording of the graphs, with fewer rows; with
TRITON_INTERPRET=1 also the Triton backend, slowly: choose a few cases.
"""

import copy
import os
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_map_only

import eft_kernels as eft
from eft_kernels import dispatch, ops, testing
from eft_kernels.testing import (
    BF16,
    CASES,
    F16,
    F32,
    Case,
    check_logprobs,
    check_sample,
    check_tree,
    check_verify,
    make,
    per_row,
)
from tools import sanitize

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
@pytest.mark.parametrize("extra", [dict(top_logprobs=3), dict(diagnostics=True)], ids=str)
def test_sample_without_logprobs_but_more(extra, name):
    for case in CASES:
        if case.name in ("plain", "top-k", "top-p", "min-p", "everything"):
            check_sample(case, name, device=DEVICE, logprobs=False, **extra)


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
@over_the_table
def test_verify_of_trees(case, name):
    check_tree(case, name, device=DEVICE)


@on_every_backend
@pytest.mark.parametrize("logprobs", (True, False))
@over_the_table
def test_runners_up(case, logprobs, name):
    check_sample(case, name, device=DEVICE, logprobs=logprobs, runners_up=4)


@on_every_backend
@pytest.mark.parametrize("method", METHODS)
def test_verify_of_a_deterministic_proposer(method, name):
    for case in CASES:
        if case.name in ("plain", "a chunk and one", "top-p ties", "everything", "bad rows filtered"):
            check_verify(case, name, method, draft=None, seed=1, device=DEVICE)


MIXED = dict(
    temperature=per_row(1.0, 0.0, 0.6, 1.7, 0.9),
    top_k=per_row(0, 0, 5, 100),
    top_p=per_row(1.0, 0.9),
    min_p=per_row(0.0, 0.0, 0.02),
    upscale_top_p=per_row(1.0, 1.0, 1.0, 0.8),
)


@pytest.mark.parametrize(
    "name, launch", [(name, launch) for name in BACKENDS if name != "reference" for launch in sanitize.launches(name)]
)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in sanitize.NAMES], ids=lambda case: case.name)
def test_configurations_of_launches(case, name, launch):
    """What the memory checkers look at: with several tiles a program, too, and programs that share a row."""
    assert sanitize.calls(case, name, launch, DEVICE)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA")
def test_what_cuda_tensors_take():
    """The CUDA kernels where they are built, else the Triton ones."""
    assert dispatch.status("triton")[0], dispatch.status("triton")[1]
    name = "cuda" if dispatch.status("cuda")[0] else "triton"
    assert dispatch.choose("auto", DEVICE).__name__ == f"eft_kernels._backends.{name}"


@on_every_backend
def test_no_mismatch_in_bulk(name):
    for kwargs in ({}, MIXED):
        check_sample(
            Case("bulk", rows=4000, vocab=(523,), dtypes=(BF16, F32, F16), kwargs=kwargs),
            name,
            device=DEVICE,
            logprobs=True,
        )


def test_layouts_survive_the_device():
    """The cases about layout have it there too: a copy to a device would make them contiguous and aligned."""
    cases = {case.name: case for case in CASES}
    for case, odd in (
        ("strided", lambda z: z.stride(0) > z.shape[1]),
        ("transposed", lambda z: z.stride(-1) > 1),
        ("unaligned", lambda z: z.data_ptr() % 16),
    ):
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


@on_every_backend
@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_opcheck(op, name):
    """As on the CPU, for one type: schema, fake against real outputs, dispatch with dynamic shapes (not where NaN
    pads)."""
    pytest.importorskip("hypothesis")
    import test_ops

    arguments = [args for args in test_ops.op_arguments(op, "reference") if args[0][0].dtype == BF16]
    assert arguments
    for args in arguments:
        args = (*tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), args[:-1]), name)
        padded = op == "verify" and args[-2]
        torch.library.opcheck(
            getattr(torch.ops.eft_kernels, op).default,
            args,
            test_utils=("test_schema", "test_faketensor", *(() if padded else ("test_aot_dispatch_dynamic",))),
        )


@on_every_backend
def test_compiled_whole(name):
    """torch.compile takes the operators as they are: no graph break, eager's tokens."""
    logits, _, kwargs = make(Case("compiled", vocab=(3000,), dtypes=(BF16,)), device=DEVICE)
    slots, _, _ = make(Case("compiled", vocab=(3000,), dtypes=(BF16,)), slots=3, device=DEVICE)

    def step(logits, slots):
        out = eft.sample(logits, eft.upscale(), top_p=0.9, backend=name, **kwargs)
        drafts = torch.stack([out.tokens, out.tokens], 1)
        ver = eft.verify(slots, eft.upscale(), drafts, method="block", backend=name, **kwargs)
        return out.tokens, ver.tokens, eft.logprobs(logits, eft.upscale(), backend=name).argmax(1)

    torch._dynamo.reset()
    for got, want in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(logits, slots), step(logits, slots)):
        assert torch.equal(got, want)


# --- a million rows ------------------------------------------------------------------------------------------------


class Bulk(NamedTuple):
    """A share of `ROWS` of logits over one vocabulary; with ``method``, 4 slots of drafts to verify."""

    label: str
    share: float
    vocab: int
    kwargs: dict = {}  # noqa: RUF012
    dtypes: tuple[torch.dtype, ...] = (BF16, BF16, BF16)
    method: str | None = None


ROWS = 1_000_000 if DEVICE.type == "cuda" else 100
LONGEST = 1 << 30 if DEVICE.type == "cuda" else 1003
AT_ONCE = 1 << 27  # logits of a model
SHARP = dict(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02)
BULK = [
    Bulk("plain", 0.2, 1003),
    Bulk("plain", 0.03, 32000),
    Bulk("plain", 0.005, 128256),
    Bulk("hot", 0.1, 777, dict(temperature=1.7)),
    Bulk("mixed", 0.2, 523, MIXED, (BF16, F32, F16)),
    Bulk("top-p", 0.1, 1003, dict(top_p=0.9)),
    Bulk("top-p", 0.02, 32000, dict(top_p=0.9)),
    Bulk("top-p", 0.005, 128256, dict(top_p=0.9)),
    Bulk("all filters", 0.1, 1003, SHARP),
    Bulk("all filters", 0.01, 50257, SHARP),
    Bulk("up-scaling", 0.05, 1003, dict(upscale_top_p=0.8)),
    Bulk("coupled", 0.06, 523, method="coupled"),
    Bulk("token", 0.06, 523, method="token"),
    Bulk("block", 0.06, 523, method="block"),
    Bulk("block, mixed", 0.06, 523, MIXED, method="block"),
]
COMPARED = [name for name in BACKENDS if name != "cpu" and (name != "reference" or DEVICE.type == "cpu")]


def bulk_arguments(shape: Bulk, batch: int, g: torch.Generator):
    """Positional and other arguments on the device; some rows hold NaN, some exclude tokens."""
    lead = (batch, 4) if shape.method else (batch,)

    def whole(low, high, *size):
        return torch.randint(low, high, size, generator=g, device=DEVICE)

    shared = torch.randn(*lead, shape.vocab, generator=g, device=DEVICE) * 3
    logits = [(shared + torch.randn(shared.shape, generator=g, device=DEVICE)).to(dtype) for dtype in shape.dtypes]
    logits[0][3::101, ..., 5] = float("nan")
    logits[1][5::53, ..., ::7] = float("-inf")
    kwargs = {name: x(batch).to(DEVICE) if callable(x) else x for name, x in shape.kwargs.items()}
    kwargs |= dict(seed=whole(-(1 << 62), 1 << 62, batch), position=whole(0, 1 << 40, batch))
    if not shape.method:
        return (logits, eft.upscale()), kwargs
    own = {name: x for name, x in kwargs.items() if name not in ("position", "upscale_top_p")}
    drafts = [
        eft.draft(logits[1][:, i], slot=i, method=shape.method, position=kwargs["position"] + i, **own).tokens
        for i in range(3)
    ]
    return (logits, eft.upscale(), torch.stack(drafts, 1).clamp(min=0), whole(0, 4, batch)), kwargs


def bulk_mismatches(name: str, shape: Bulk, batch: int, seed: int) -> tuple[int, float]:
    """Rows of the batch whose tokens, validity or number of them the cpu backend has otherwise; how far log-probs are
    apart, in nats."""
    args, kwargs = bulk_arguments(shape, batch, torch.Generator(DEVICE).manual_seed(seed))
    call = eft.verify if shape.method else eft.sample
    kwargs |= dict(method=shape.method) if shape.method else {}
    got = call(*args, logprobs=True, backend=name, **kwargs)
    there, options = tree_map_only(torch.Tensor, lambda x: x.cpu(), (args[:1] + args[2:], kwargs))
    want = call(there[0], args[1], *there[1:], logprobs=True, backend="cpu", **options)
    wrong, apart = torch.zeros(batch, dtype=torch.bool), 0.0
    for field, b in want._asdict().items():
        if b is not None:
            a = getattr(got, field).cpu()
            if b.is_floating_point():
                wrong |= (a.isnan() != b.isnan()).view(batch, -1).any(1)
                apart = max(apart, float((a - b).nan_to_num(0.0).abs().max()))
            else:
                wrong |= (a != b).view(batch, -1).any(1)
    return int(wrong.sum()), apart


@pytest.mark.skipif(not dispatch.status("cpu")[0], reason="the C++ extension is not built")
@pytest.mark.parametrize("name", COMPARED)
def test_equality_with_the_cpu_backend(name):
    """A million rows of logits (a hundred on the CPU) give the cpu backend's tokens; prints how many do not."""
    threads, rows, mismatches, farthest = torch.get_num_threads(), 0, 0, 0.0
    torch.set_num_threads(len(os.sched_getaffinity(0)) if DEVICE.type == "cuda" else threads)
    try:
        for n, shape in enumerate(s for s in BULK if s.vocab <= LONGEST):
            slots = 4 if shape.method else 1
            left, wrong, seed = max(1, round(shape.share * ROWS / slots)), 0, n * 1000
            rows += left * slots
            while left > 0:
                batch = min(left, max(1, AT_ONCE // (shape.vocab * slots)))
                more, apart = bulk_mismatches(name, shape, batch, seed)
                left, wrong, seed, farthest = left - batch, wrong + more, seed + 1, max(farthest, apart)
            print(f"{shape.label}, V = {shape.vocab}: {wrong} mismatches", flush=True)
            mismatches += wrong
    finally:
        torch.set_num_threads(threads)
    print(f"{name}: {mismatches} mismatches in {rows} rows of logits, log-probs within {farthest:.1e} nats of cpu's")
    assert mismatches == 0 and farthest < 1e-4


# --- arguments on another device -----------------------------------------------------------------------------------


def elsewhere(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=OTHER)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("temperature", elsewhere(4)),
        ("top_k", elsewhere(4, dtype=torch.int64)),
        ("top_p", elsewhere(4)),
        ("min_p", elsewhere(4)),
        ("upscale_top_p", elsewhere(4)),
        ("seed", elsewhere(4, dtype=torch.int64)),
        ("position", elsewhere(4, dtype=torch.int64)),
        ("weights", elsewhere(3)),
        ("weights", elsewhere(4, 3)),
        ("token_mask", elsewhere(4, 32, dtype=torch.int32)),
        ("logits[1]", elsewhere(4, 1000)),
        ("draft_tokens", elsewhere(4, 3, dtype=torch.int64)),
        ("draft_lengths", elsewhere(4, dtype=torch.int64)),
        ("ids", elsewhere(4, dtype=torch.int64)),
    ],
)
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


TREE = dict(draft_tokens=3, draft_width=2, draft_budget=7)


@pytest.mark.parametrize("drafts", [TREE, dict(draft_tokens="auto"), dict(draft_tokens=3, draft="lookup")])
def test_generate_trees_and_other_drafts(hf, models, drafts):
    """In float32 the tokens of the CPU; times are those of the GPU's own events."""
    there = moved(models, F32)
    got = generate(hf, there, **drafts, **hf.SAMPLED)
    assert torch.equal(got.sequences.cpu(), generate(hf, models, **hf.SAMPLED).sequences)
    assert len(got.speculation.seconds) == 4 and all(0 <= s < 60 for s in got.speculation.seconds)


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
        for x, want in ((a, b) for a, b in zip(got, call(n)) if b is not None):
            torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)
        seen.append(tuple(got.tokens.flatten().tolist()))
        position += 1
    assert len(set(seen)) == 5


@on_every_backend
@pytest.mark.parametrize("extras", [{}, dict(logprobs=False), dict(top_logprobs=3, diagnostics=True)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("graph", vocab=(32000,), dtypes=(BF16,)),
        Case("graph, filters", vocab=(32000,), kwargs=dict(temperature=1.3, top_k=400, top_p=0.95, min_p=1e-4)),
        Case(
            "graph, rows",
            vocab=(32000,),
            dtypes=(BF16,),
            special="mask",
            kwargs=dict(
                temperature=per_row(1.0, 1.5),
                top_k=per_row(0, 500),
                top_p=per_row(1.0, 0.95),
                min_p=per_row(0.0, 1e-4),
                upscale_top_p=per_row(1.0, 0.9),
            ),
        ),
    ],
    ids=lambda case: case.name,
)
def test_graph_of_sample(case, extras, name):
    logits, weights, kwargs = make(case, device=DEVICE)
    kwargs.pop("position")
    replays_what_eager_gives(
        name, lambda position: eft.sample(logits, weights, position=position, backend=name, **kwargs, **extras)
    )


@on_every_backend
def test_graphs_and_eager_calls_beside_each_other(name):
    """On streams of their own, over and over: nothing of one launch is another's."""
    if name == "reference" or DEVICE.type != "cuda":
        pytest.skip("CUDA graphs of a compiled backend")
    rows, streams = 64, [torch.cuda.Stream() for _ in range(3)]
    inputs = [make(Case(f"beside {i}", rows=rows, vocab=(32000,), dtypes=(BF16,)), device=DEVICE) for i in range(3)]
    calls = [lambda z=z, w=w, k=k: eft.sample(z, w, backend=name, **k).tokens for z, w, k in inputs]
    want, graphs = [call() for call in calls], [recorded(call) for call in calls[:2]]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, work in zip(streams, (*graphs, calls[2])):
            with torch.cuda.stream(stream):
                got.append([work().clone() for _ in range(5)])
        torch.cuda.synchronize()
        for tokens, right in zip(got, want):
            assert all(torch.equal(x, right) for x in tokens)


@on_every_backend
def test_a_graph_of_very_many_calls(name):
    """More than counters were put aside for."""
    if name == "reference":
        pytest.skip("the definition may synchronise, which a CUDA graph cannot hold")
    logits, weights, kwargs = make(Case("many", rows=1, vocab=(4000,), dtypes=(BF16,)), device=DEVICE)
    kwargs.pop("position")
    replay = recorded(
        lambda: torch.cat(
            [
                eft.sample(logits, weights, position=n, backend=name, **kwargs).tokens
                for n in range(1100 if DEVICE.type == "cuda" else 3)
            ]
        )
    )
    first = replay().clone()
    assert torch.equal(first, replay()) and len(first.unique()) > 1
    for n in (0, 1, 2, len(first) - 1):
        assert first[n] == eft.sample(logits, weights, position=n, backend=name, **kwargs).tokens


@on_every_backend
@pytest.mark.parametrize("method", METHODS)
def test_graph_of_verify(method, name):
    logits, weights, kwargs = make(Case("graph of verify", dtypes=(BF16,), scale=1.0), slots=4, device=DEVICE)
    kwargs.pop("position")
    drafts = logits[1][:, :-1].argmax(-1)
    replays_what_eager_gives(
        name,
        lambda position: eft.verify(
            logits, weights, drafts, method=method, position=position, logprobs=True, backend=name, **kwargs
        ),
    )


@on_every_backend
@pytest.mark.parametrize("part", range(8))
def test_odd_and_random_calls(name, part):
    """Values that nobody has checked, and calls of every kind, against the definition on the CPU."""
    calls = testing.odd_calls()[part::8] + [testing.random_call(seed) for seed in range(part, 400, 8)]
    for call in calls:
        testing.check_call(call.to(DEVICE), name, call.run("reference"))
