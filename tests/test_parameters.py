"""The table of parameters: what is written from it is current, what is made of it is complete, and languages agree."""

import ctypes
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eft_kernels as eft
from eft_kernels import ops, parameters, reference
from eft_kernels.arguments import dtype_of
from eft_kernels.combination import MODES
from eft_kernels.parameters import DRAFTED, FILTERS, NAMES, OFF, PARAMETERS, PER_ROW, Params
from eft_kernels.testing import out_of_range

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which(os.environ.get("CXX", "g++"))


def written():
    spec = importlib.util.spec_from_file_location("tools_parameters", ROOT / "tools/parameters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_written_is_current():
    for path, text in written().current().items():
        assert path.read_text("utf-8") == text, f"{path.relative_to(ROOT)}: run python tools/parameters.py"


def test_the_writer_finds_its_blocks():
    """A block whose marker is misspelt, or missing, would be current for ever."""
    tool = written()
    found = [m[3] for path in tool.FILES for m in tool.BLOCK.finditer(path.read_text("utf-8"))]
    assert set(found) == set(tool.BLOCKS)
    assert found.count("arguments") == found.count("values") == 4  # sample, verify, logprobs, token_logprobs
    assert sum(len(tool.DOCSTRING.findall(path.read_text("utf-8"))) for path in tool.FILES) == 1


@pytest.mark.parametrize("name", ["sample", "verify", "logprobs", "token_logprobs", "draft"])
def test_public_functions_show_every_parameter(name):
    shown = inspect.signature(getattr(eft, name)).parameters
    rows = DRAFTED if name == "draft" else PARAMETERS
    assert {p.name: shown[p.name].default for p in rows} == {p.name: p.off for p in rows}
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in shown.values())
    if name == "verify":
        assert all(shown[f"draft_{p.name}"].default is None for p in DRAFTED)
    if name == "sample":
        assert all(f"\n        {p.name}: " in eft.sample.__doc__ for p in PARAMETERS)


def test_hf_generate_names_every_parameter():
    """transformers hands over what a callable names, and nothing else."""
    shown = inspect.signature(eft.hf.generate).parameters
    want = {p.name: None if p.warper else p.off for p in PARAMETERS}
    assert {p.name: shown[p.name].default for p in PARAMETERS} == want


def test_command_line_has_every_parameter():
    from eft_kernels import cli

    args = cli.parser().parse_args(["generate", "--base", "a", "--tuned", "b", "--ref", "c"])
    assert all(getattr(args, p.name) is None for p in PARAMETERS)


def test_schemas_have_every_parameter():
    for name in ops.SCHEMAS:
        schema = getattr(torch.ops.eft_kernels, name).default._schema
        types = {a.name: str(a.type) for a in schema.arguments}
        for p in PER_ROW.values():
            assert types[p.name] == "Optional[Tensor]" and types[f"{p.name}_value"] == p.type.__name__
        for p in DRAFTED if name == "verify" else ():
            assert types[f"draft_{p.name}"] == "Optional[Tensor]"
            assert types[f"draft_{p.name}_value"] == f"Optional[{p.type.__name__}]"


def test_rows_of_the_table_are_sound():
    assert Params._fields == (
        "weights",
        *NAMES,
        "seed",
        "position",
        "token_mask",
        "token_bias",
        "vocab_size",
        "tuned",
        "row_index",
    )
    for p in PER_ROW.values():
        assert p.low <= p.off <= p.high and all(p.low <= x <= p.high for x in p.tried), p.name
        assert all(type(x) is p.type for x in (p.off, *p.tried)) and p.allowed and p.doc, p.name
        if p.stage != "noise":
            assert p.tried[0] == p.off != p.tried[1], p.name
    in_ours = [p.name for p in PARAMETERS if p.warper]
    assert in_ours == sorted(in_ours, key=[p.name for p in PARAMETERS].index)


# --- one meaning in every language ---------------------------------------------------------------------------------

V = 40


def rows():
    """Every parameter at every value, the others off and on: {name: [R]}."""
    found = []
    for p in PARAMETERS:
        values = (*p.tried, *out_of_range(p), *((V - 1, V, V + 1, 1 << 40) if p.type is int else ()))
        others = (OFF, OFF | dict(temperature=0.0), OFF | {q.name: q.tried[1] for q in PARAMETERS})
        found += [other | {p.name: x} for x in values for other in others]
    return {p.name: torch.tensor([row[p.name] for row in found], dtype=dtype_of(p)) for p in PARAMETERS}


def of_reference(values):
    n = len(values["top_k"])
    p = Params((1.0,), **values, seed=0, position=0, token_mask=None, token_bias=None, vocab_size=V, tuned=0)
    r = reference.Rows([torch.zeros(n, V)], p)
    return r.in_range, r.filtered()


def test_filtered_is_what_it_says():
    """A row is filtered where a filter is on by its value in range, and it is not greedy."""
    values = rows()
    valid, filtered = of_reference(values)
    fine = torch.stack(
        [(x >= p.low) & (x <= p.high) for p in PARAMETERS if p.type is float for x in [values[p.name]]]
    ).all(0)
    on = torch.stack([values[p.name] != p.off for p in FILTERS if p.type is float]).any(0)
    on |= (values["top_k"] > 0) & (values["top_k"] < V)
    assert torch.equal(valid, fine)
    assert torch.equal(filtered, fine & on & ~(values["temperature"] < parameters.GREEDY))
    assert 0.2 < float(filtered.float().mean()) < 0.8


SOURCE = """
#include "semantics/filters.h"
using namespace eft;
extern "C" void filters(const void* const* values, int64_t rows, int vocab, bool* valid, bool* filtered) {
  Sampling s{};
  int i = 0;
#define EFT_SET(T, name, off, low, high) s.name = {static_cast<const T*>(values[i++]), 0};
  EFT_PARAMETERS(EFT_SET)
  for (int64_t r = 0; r < rows; ++r) {
    const auto f = scalar::filters_of(s, r, vocab);
    valid[r] = f.valid, filtered[r] = f.filtered();
  }
}
extern "C" bool may(const void* const* values, const bool* tensors, int64_t row, int vocab) {
  Call c{};
  c.vocab_size = vocab;
  int i = 0;
#define EFT_NUMBER(T, name, off, low, high) \\
  c.name = {tensors[i] ? static_cast<const T*>(values[i]) : nullptr, static_cast<const T*>(values[i])[row]}, ++i;
  EFT_PARAMETERS(EFT_NUMBER)
  return scalar::may_filter(c);
}
"""


@pytest.fixture(scope="module")
def semantics(tmp_path_factory):
    if CXX is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("filters")
    (folder / "filters.cpp").write_text(SOURCE)
    subprocess.run(
        [
            CXX,
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-ffp-contract=off",
            f"-I{ROOT / 'csrc'}",
            folder / "filters.cpp",
            "-o",
            folder / "filters.so",
        ],
        check=True,
    )
    return ctypes.CDLL(str(folder / "filters.so"))


def pointers(values):
    return (ctypes.c_void_p * len(NAMES))(*(values[name].data_ptr() for name in NAMES))


def test_filtered_is_the_same_in_cpp(semantics):
    values = rows()
    valid, filtered = (torch.zeros(len(values["top_k"]), dtype=torch.bool) for _ in range(2))
    semantics.filters(
        pointers(values),
        ctypes.c_int64(len(valid)),
        V,
        ctypes.c_void_p(valid.data_ptr()),
        ctypes.c_void_p(filtered.data_ptr()),
    )
    for got, want in zip((valid, filtered), of_reference(values)):
        assert torch.equal(got, want)


def test_the_host_knows_what_may_be_filtered(semantics):
    """Of numbers exactly, of a tensor it does not."""
    values = rows()
    _, filtered = of_reference(values)
    semantics.may.restype = ctypes.c_bool
    for tensor in (None, "temperature", "top_k", "upscale_top_p"):
        tensors = (ctypes.c_bool * len(NAMES))(*(name == tensor for name in NAMES))
        known = OFF if tensor is None else {tensor: torch.full_like(values[tensor], OFF[tensor])}
        _, want = of_reference(values if tensor is None else values | known)
        if tensor in [p.name for p in FILTERS]:
            want = torch.ones_like(want)
        got = [semantics.may(pointers(values), tensors, ctypes.c_int64(i), V) for i in range(len(filtered))]
        assert got == want.tolist(), tensor


TRITON = """
import pickle, sys
import torch, triton, triton.language as tl
from eft_kernels.parameters import NAMES
from eft_kernels._backends.triton.rows import Sampling, params_of

@triton.jit
def kernel(s, V, valid, filtered):
    b = tl.program_id(0).to(tl.int64)
    q = params_of(s, 0, 0, V, b, 0)
    tl.store(valid + b, q.valid)
    tl.store(filtered + b, q.filtered)

values, V = pickle.load(open(sys.argv[1], "rb"))
n = len(values["top_k"])
valid, filtered = (torch.zeros(n, dtype=torch.bool) for _ in range(2))
given = Sampling(tuple(values[name] for name in NAMES), (0.0,) * len(NAMES), None, None, None, 1)
kernel[(n,)](given, V, valid, filtered)
pickle.dump((valid, filtered), open(sys.argv[2], "wb"))
"""


def test_filtered_is_the_same_in_triton(tmp_path):
    import pickle

    pytest.importorskip("triton")
    values = rows()
    (tmp_path / "kernel.py").write_text(TRITON)
    with open(tmp_path / "in", "wb") as f:
        pickle.dump((values, V), f)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=path)
    subprocess.run([sys.executable, tmp_path / "kernel.py", tmp_path / "in", tmp_path / "out"], check=True, env=env)
    with open(tmp_path / "out", "rb") as f:
        for got, want in zip(pickle.load(f), of_reference(values)):
            assert torch.equal(got, want)


def test_the_modes_are_the_presets_with_their_defaults():
    for name, mode in MODES.items():
        (*strength,) = inspect.signature(getattr(eft, name)).parameters.values()
        assert mode.weights is getattr(eft, name)
        assert [(p.name, p.default) for p in strength] == ([(mode.strength, mode.default)] if mode.strength else [])
