"""Calls that nobody would write, at random: of the public functions, of torch.ops, of the extension itself, and from
several threads at once. ``make fuzz``; or, for one case, what a failure prints.

    python tests/fuzz/fuzz.py --seconds 60 --seed 1 [--target functions] [--extension build/asan/.../_cpu.abi3.so]

A call returns or raises one of the errors below. Where it returns, and the definition returns for the same arguments,
tokens are the same and log-probs agree; where values change during the call, tokens are of the vocabulary.
"""

from __future__ import annotations

import argparse
import faulthandler
import fractions
import importlib.machinery
import importlib.util
import inspect
import random
import sys
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

RAISED = (ValueError, TypeError, MemoryError, NotImplementedError)
TRACED = (*RAISED, RuntimeError)  # torch.ops has torch's own errors, too
MAX = 1 << 63


def use(library: str):
    """``library`` in the place of `eft_kernels._cpu`."""
    loader = importlib.machinery.ExtensionFileLoader("eft_kernels._cpu", library)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module
    loader.exec_module(module)


# --- hostile arguments ---------------------------------------------------------------------------------------------


class Named(torch.Tensor):
    pass


NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    300,
    -300,
    1 << 31,
    (1 << 31) - 1,
    -(1 << 31),
    (1 << 32) + 1,
    MAX - 1,
    MAX,
    -MAX,
    -MAX - 1,
    2 * MAX - 1,
    2 * MAX,
    10**400,
    0.0,
    -0.0,
    0.5,
    1.0,
    1e-45,
    1e-38,
    3.4e38,
    1e39,
    1e300,
    -1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
    True,
    False,
    1j,
    fractions.Fraction(1, 3),
]
OBJECTS = [
    None,
    "",
    "sample",
    "draft",
    "token",
    "block",
    b"x",
    [],
    (),
    {},
    object(),
    [1],
    [[1.0]],
    [None],
    range(3),
    torch.Tensor,
    ValueError,
    print,
    "\ud800",
]
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
FLOATS = [0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, 65504.0]
INTEGERS = [0, 1, -1, 5, 100, MAX - 1, -MAX, 1 << 32]


def shape_near(pick: random.Random, shape) -> list[int]:
    shape = list(shape)
    kind = pick.randrange(7)
    if kind == 0 and shape:
        shape[pick.randrange(len(shape))] += pick.choice([-1, 1, 2])
    elif kind == 1 and shape:
        shape[pick.randrange(len(shape))] = pick.choice([0, 1])
    elif kind == 2:
        shape.insert(pick.randint(0, len(shape)), pick.choice([0, 1, 2]))
    elif kind == 3 and shape:
        del shape[pick.randrange(len(shape))]
    return [max(0, n) for n in shape]


def hostile_tensor(pick: random.Random, shape, dtype) -> torch.Tensor:
    """A tensor of about this shape and type, of any layout, kind and values."""
    if pick.random() < 0.4:
        shape = shape_near(pick, shape)
    if pick.random() < 0.4 or dtype not in DTYPES:
        dtype = pick.choice(DTYPES)
    shape = list(shape)
    values = FLOATS if dtype.is_floating_point or dtype.is_complex else INTEGERS
    x = torch.zeros(shape, dtype=torch.float64 if values is FLOATS else torch.int64)
    if x.numel():
        for _ in range(pick.randint(0, 4)):
            x.view(-1)[pick.randrange(x.numel()) :: pick.choice([1, 3, 100])] = pick.choice(values)
    x = x.to(dtype)
    kind = pick.randrange(22)
    if kind == 0 and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif kind == 1 and x.dim():
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif kind == 2 and x.dim() and x.shape[0]:
        x = x[:1].expand_as(x)
    elif kind == 3 and x.dim() and x.shape[-1]:
        x = x[..., :1].expand_as(x)
    elif kind == 4 and x.numel():
        x = x.flatten().as_strided(x.shape, [pick.choice([0, 1])] * x.dim())
    elif kind == 5 and x.numel():
        x = torch.cat([x.flatten()[:3], x.flatten()])[-x.numel() :].view(x.shape)
    elif kind == 6 and not dtype.is_complex and dtype is not torch.bool and dtype not in DTYPES[8:12] + DTYPES[-1:]:
        x = torch._neg_view(x)
    elif kind == 7:
        x = x.to("meta")
    elif kind == 8 and x.dim() == 2 and dtype in DTYPES[:4]:
        x = x.to_sparse()
    elif kind == 9 and x.dim() == 2 and dtype is torch.float32:
        x = x.to_sparse_csr()
    elif kind == 10 and x.dim() > 1 and x.shape[0] and dtype is torch.float32:
        x = torch.nested.nested_tensor(list(x), layout=pick.choice([torch.strided, torch.jagged]))
    elif kind == 11:
        x = x.as_subclass(Named)
    elif kind == 12 and x.is_floating_point():
        x = torch.nn.Parameter(x)
    elif kind == 13 and x.is_floating_point():
        x = x.requires_grad_() * 1 if dtype in DTYPES[:4] else x
    elif kind == 14 and getattr(pick, "freed", True):
        x = x.clone()
        x.untyped_storage().resize_(0)
    elif kind == 15 and dtype in DTYPES[:4]:
        x = torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    return x


def hostile(pick: random.Random, like, rows: int = 3):
    """Something in the place of ``like``; a tensor [rows] where none was."""
    kind = pick.random()
    if kind < 0.5 and (like is None or type(like) in (int, float)):
        return hostile_tensor(pick, [rows], torch.int64 if isinstance(like, int) else torch.float32)
    if isinstance(like, torch.Tensor) and not like.is_nested and kind < 0.6:
        return hostile_tensor(pick, like.shape, like.dtype)
    if isinstance(like, (list, tuple)) and like and kind < 0.6:  # models, or weights
        out = list(like)
        for _ in range(pick.randint(1, 2)):
            at = pick.randrange(len(out))
            out[at] = hostile(pick, out[at])
        if pick.random() < 0.2:
            out = out[:-1] if pick.random() < 0.5 else out * pick.choice([2, 9])
        return tuple(out) if pick.random() < 0.5 else out
    if kind < 0.8:
        return pick.choice(NUMBERS)
    if kind < 0.9:
        x = hostile_tensor(pick, [pick.choice([0, 1, 3, 5])], pick.choice(DTYPES[:12]))
        try:
            return x.tolist() if pick.random() < 0.5 else x.numpy()
        except (TypeError, RuntimeError, NotImplementedError):
            return x
    return pick.choice(OBJECTS)


# --- targets -------------------------------------------------------------------------------------------------------


def outputs(out) -> list:
    return [out] if isinstance(out, torch.Tensor) else list(out)


def compare(got, want, words: str):
    """Exactly the same integers and flags, log-probs within rounding."""
    for i, (x, y) in enumerate(zip(outputs(got), outputs(want))):
        assert (x is None) == (y is None), f"{words}: output {i}: {x} for {y}"
        if x is None or x.device.type == "meta":
            continue
        if x.is_floating_point():
            torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-4, equal_nan=True, msg=lambda m: f"{words}: {m}")  # noqa: B023
        else:
            assert x.dtype == y.dtype and torch.equal(x, y), f"{words}: output {i}: {x.tolist()} for {y.tolist()}"


def tame(call):
    """``call`` with its values in range, so that what is hostile in it is what was put there later."""
    from eft_kernels.parameters import PER_ROW

    K = call.params.lead(call.logits)[-1] - 1
    V, p = call.params.vocab_size, call.params
    changed = {}
    for name, row in PER_ROW.items():
        x = getattr(p, name)
        if isinstance(x, torch.Tensor):
            changed[name] = (
                x.clamp(row.low, min(row.high, MAX - 1))
                if row.type is int
                else x.nan_to_num(row.tried[1]).clamp(row.low, row.high)
            )
    if not isinstance(p.position, torch.Tensor):
        changed["position"] = max(0, p.position)
    if isinstance(p.weights, torch.Tensor):
        changed["weights"] = p.weights.nan_to_num(1.0, 1.0, 1.0)
    if p.row_index is not None:
        changed["row_index"] = p.row_index.clamp(0, len(call.logits[0]) - 1)
    args = list(call.args)
    if call.operation == "verify":
        args[:2] = args[0].clamp(0, V - 1), args[1].clamp(0, K)
        if args[2] is not None:
            args[2] = args[2].clamp(min=0).minimum(torch.arange(args[2].shape[1]))
    elif call.operation == "token_logprobs":
        args[0] = args[0].clamp(0, V - 1)
    return call._replace(params=p._replace(**changed), args=tuple(args))


def attempt(function, allowed):
    """(what it returns, None), or (None, the error) where that is allowed."""
    try:
        return function(), None
    except allowed as error:
        return None, error


class Fuzz:
    def __init__(self):
        import eft_kernels
        from eft_kernels import ops, testing
        from eft_kernels._backends import cpu, workspace

        self.eft, self.ops, self.testing, self.cpu, self.workspace = eft_kernels, ops, testing, cpu, workspace

    def usual(self, pick: random.Random):
        """A call as `testing.random_call` makes them, small."""
        return self.testing.random_call(pick.randrange(1 << 30), largest=pick.choice([60, 600]))

    def values(self, seed: int):
        """torch.ops with values of any kind, in plain forms."""
        self.testing.check_call(self.testing.random_call(seed), "cpu")

    def functions(self, seed: int):
        """`eft.sample` and the others: ValueError that begins with an argument's name, or what the reference gives."""
        pick = random.Random(seed)
        call = tame(self.usual(pick))
        scores = call.operation == "logprobs" and call.args[0]
        function = getattr(self.eft, "combine" if scores else call.operation)
        kwargs = dict(call.params._asdict(), logits=call.logits)
        if scores:
            kwargs = {k: v for k, v in kwargs.items() if k in inspect.signature(function).parameters}
        if call.operation == "sample":
            kwargs.update(zip(("stream", "slot", "logprobs", "top_logprobs", "diagnostics", "runners_up"), call.args))
        elif call.operation == "verify":
            names = ("draft_tokens", "draft_lengths", "parents", "method", "draft")
            kwargs.update(zip(names, call.args), logprobs=call.args[-1])
            kwargs.update({f"draft_{name}": None for name in call.args[5]._fields})
            kwargs["draft"] = None if kwargs["draft"] == -1 else kwargs["draft"]
            index = kwargs.pop("row_index")
            if index is not None:  # as rounds one after the other
                at, lead = index.flatten(), index.shape
                kwargs["logits"] = [z[at] for z in call.logits]
                kwargs["offsets"] = torch.arange(lead[0] + 1) * lead[1]
                for name in ("token_mask", "token_bias"):
                    if isinstance(kwargs[name], torch.Tensor):
                        kwargs[name] = kwargs[name].flatten(0, 1)
                    elif kwargs[name] is not None:
                        kwargs[name] = tuple(x.flatten(0, 1) for x in kwargs[name])
        elif call.operation == "token_logprobs":
            kwargs["ids"] = call.args[0]
        if call.operation not in ("sample", "verify"):
            kwargs = {name: x for name, x in kwargs.items() if name not in ("seed", "position")}
        for _ in range(pick.choice([1, 1, 1, 2, 3])):
            name = pick.choice(sorted(kwargs))
            kwargs[name] = hostile(pick, kwargs[name], len(call.logits[0]))
        if kwargs.get("seed", 0) is None:
            kwargs["seed"] = 1
        got, error = attempt(lambda: function(**kwargs, backend="cpu"), RAISED)
        if isinstance(error, ValueError):
            name = str(error).split(":")[0].split("[")[0]
            assert name in kwargs or name == "backend", f"an error that names no argument: {error}"
        elif error is not None:
            assert isinstance(error, MemoryError), f"{type(error).__name__}: {error}"
        want, other = attempt(lambda: function(**kwargs, backend="reference"), RAISED)
        if got is not None and want is not None:
            compare(got, want, call.operation)
        elif not isinstance(error, MemoryError) and not isinstance(other, MemoryError) and "backend" not in str(error):
            assert (got is None) == (want is None), f"{error!r} here, {other!r} there"

    def operators(self, seed: int):
        """torch.ops with wrong shapes, types, counts and devices."""
        pick = random.Random(seed)
        pick.freed = False  # torch's own errors print tensors
        call = self.usual(pick)
        args = [call.logits, *self.ops._flatten(call.params, *call.args)]
        for _ in range(pick.choice([1, 1, 2])):
            at = pick.randrange(len(args))
            args[at] = hostile(pick, args[at], len(call.logits[0]))
        if pick.random() < 0.05:
            args = args[: pick.randrange(len(args))]
        operator = getattr(torch.ops.eft_kernels, call.operation)
        got, error = attempt(lambda: operator(*args, "cpu"), TRACED)
        assert not isinstance(error, AssertionError)
        want, _ = attempt(lambda: operator(*args, "reference"), TRACED)
        if got is not None and want is not None:
            compare(got, want, call.operation)

    def sorted_bias(self, pick: random.Random, call):
        """token_bias as the extension takes it; its numbers may be any."""
        bias = self.workspace.sorted_bias(call.params.token_bias, call.params.vocab_size)
        if bias is None or pick.random() < 0.6:
            return bias
        return bias._replace(
            starts=torch.randint(-(1 << 31), 1 << 31, bias.starts.shape).to(torch.int32) >> pick.choice([0, 8, 24]),
            ids=torch.randint(-(1 << 31), 1 << 31, bias.ids.shape).to(torch.int32) >> pick.choice([0, 20]),
        )

    def penalties(self, seed: int):
        """`eft.penalties` with arguments of any kind: ValueError that begins with one's name, or a `TokenBias`."""
        pick = random.Random(seed)
        B, V = pick.choice([0, 1, 3]), 50
        tokens = [torch.randint(-1, V, (B, pick.choice([0, 1, 9]))) for _ in range(2)]
        kwargs = dict(
            prompt=pick.choice([None, tokens[0]]),
            output=pick.choice([None, tokens[1], tokens[1]]),
            presence=pick.choice([0.0, 0.5, torch.rand(B)]),
            frequency=pick.choice([0.0, -0.5, torch.rand(B)]),
            repetition=pick.choice([1.0, 1.2, torch.rand(B) + 0.5]),
            logit_bias=pick.choice([None, {}, {3: 1.0, V + 5: -2.0}]),
            logits=[torch.randn(B, V) for _ in range(3)],
            weights=self.eft.upscale(),
        )
        for _ in range(pick.choice([0, 1, 1, 2])):
            name = pick.choice(sorted(kwargs))
            kwargs[name] = hostile(pick, kwargs[name], 3)
        bias, error = attempt(lambda: self.eft.penalties(**kwargs), RAISED)
        if isinstance(error, ValueError):
            assert str(error).split(":")[0].split("[")[0] in kwargs, f"an error that names no argument: {error}"
        elif error is not None:
            assert isinstance(error, MemoryError), f"{type(error).__name__}: {error}"
        elif bias.ids.device.type == "cpu" and bias.ids.shape[0] == B:
            z = [torch.randn(B, V) for _ in range(3)]
            out = self.eft.sample(z, self.eft.upscale(), seed=1, position=0, token_bias=bias)
            assert out.tokens.shape == (B,)

    def bindings(self, seed: int):
        """The extension's own functions: None, or tokens of the vocabulary; never anything worse than an error."""
        pick = random.Random(seed)
        call = self.usual(pick)
        module, args = self.cpu._cpu, list(call.args)
        if call.operation == "sample":
            args[0] = self.ops.STREAM_NAMES.index(args[0])
        elif call.operation == "verify":
            args[3:6] = self.ops.METHODS.index(args[3]), None if args[4] < 0 else args[4], *args[5]
        elif call.operation == "logprobs":
            args = [None, *args]
        elif call.operation == "token_logprobs":
            args = [*args, False]
        function = getattr(module, "logprobs" if "logprobs" in call.operation else call.operation)
        if call.operation == "sample" and pick.random() < 0.3:  # where to write the tokens
            args.append(torch.empty(call.params.lead(call.logits), dtype=torch.int64))
        *params, index = call.params._replace(token_bias=self.sorted_bias(pick, call))
        args = [pick.choice([1, 2, 3]), pick.random() < 0.5, call.logits, index, *params, *args]
        for _ in range(pick.choice([0, 1, 1, 2, 4])):
            at = pick.randrange(1, len(args))  # threads are the caller's business
            args[at] = hostile(pick, args[at], len(call.logits[0]))
        if pick.random() < 0.1:
            args = args[: pick.randrange(len(args))] if pick.random() < 0.5 else [*args, hostile(pick, None)]
        out, _ = attempt(lambda: function(*args), (TypeError, ValueError, MemoryError, RuntimeError))
        if out is not None and "logprobs" not in call.operation:
            tokens = out[0]
            assert tokens.numel() == 0 or (int(tokens.min()) >= -1 and int(tokens.max()) < 1 << 22)
        for name in ("set_isa", "philox", "attach", "set_poison"):
            if pick.random() < 0.03:
                few = [hostile(pick, 1) for _ in range(pick.randint(0, 7))]
                attempt(lambda: getattr(module, name)(*few), (TypeError, ValueError, AttributeError))  # noqa: B023
                module.set_isa(None)
                module.attach(torch.Tensor, torch.nn.Parameter)
                module.set_poison(False)

    def threads(self, seed: int):
        """Callers of several thread counts, while others replace the models of a list and write into tensors."""
        pick = random.Random(seed)
        B, K, V = pick.choice([1, 3, 17]), 2, pick.choice([40, 3000, 40000])
        z, zz = ([torch.randn(*lead, V) for _ in range(3)] for lead in ((B,), (B, K + 1)))
        numbers = dict(
            temperature=torch.ones(B),
            top_p=torch.full((B,), 0.9),
            top_k=torch.zeros(B, dtype=torch.int64),
            seed=torch.arange(B),
            position=torch.zeros(B, dtype=torch.int64),
        )
        drafts = torch.zeros(B, K, dtype=torch.int64)
        over, failures = threading.Event(), []

        def guarded(function):
            def run():
                try:
                    while not over.is_set():
                        function()
                except BaseException as error:
                    failures.append(error)
                    over.set()

            return threading.Thread(target=run)

        def caller(threads, kind):
            mine = random.Random(kind)

            def run():
                torch.set_num_threads(threads)
                kwargs = {name: x for name, x in numbers.items() if name in ("seed", "position") or mine.random() < 0.7}
                if kind % 2:
                    out, _ = attempt(
                        lambda: self.eft.sample(
                            z,
                            self.eft.upscale(),
                            top_logprobs=mine.choice([0, 3]),
                            diagnostics=mine.random() < 0.3,
                            runners_up=mine.choice([0, 2]),
                            **kwargs,
                        ),
                        RAISED,
                    )
                else:
                    out, _ = attempt(
                        lambda: self.eft.verify(
                            zz,
                            self.eft.upscale(),
                            drafts,
                            logprobs=True,
                            method=mine.choice(self.ops.METHODS),
                            **kwargs,
                        ),
                        RAISED,
                    )
                if out is not None:
                    assert ((out.tokens >= -1) & (out.tokens < V)).all(), out.tokens

            return run

        def replace():
            for models, lead in ((z, (B,)), (zz, (B, K + 1))):
                models[pick.randrange(3)] = torch.randn(*lead, V)

        def write():
            for x in (*z, *zz):
                x[..., pick.randrange(V) :: pick.choice([1, 7, 256])] = pick.choice(FLOATS)
            for x in (*numbers.values(), drafts):
                x.fill_(pick.choice(FLOATS if x.is_floating_point() else INTEGERS))
                time.sleep(0)
            for name, usual in dict(temperature=1, top_p=0.9, top_k=0, position=0).items():
                if pick.random() < 0.7:
                    numbers[name].fill_(usual)

        before = torch.get_num_threads()
        workers = [guarded(caller(n, kind)) for kind, n in enumerate((1, 2, 4, 1))] + [guarded(replace), guarded(write)]
        for worker in workers:
            worker.start()
        over.wait(0.5)
        over.set()
        for worker in workers:
            worker.join()
        torch.set_num_threads(before)
        if failures:
            raise failures[0]


TARGETS = dict(values=4, functions=8, operators=4, bindings=8, penalties=2, threads=0.02)  # how often each is chosen


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="of the first case (the others follow); default: the time")
    parser.add_argument("--cases", type=int, default=1 << 62, help="stop after so many")
    parser.add_argument("--target", choices=TARGETS, help="this one alone")
    parser.add_argument("--extension", help="a build of the C++ extension to use instead of the installed one")
    options = parser.parse_args(argv)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    if options.extension:
        use(options.extension)
    torch.set_num_threads(1)
    fuzz, start = Fuzz(), time.monotonic()
    seed = int(time.time()) * 1000 if options.seed is None else options.seed
    counts = dict.fromkeys(TARGETS, 0)
    while time.monotonic() - start < options.seconds and sum(counts.values()) < options.cases:
        target = options.target or random.Random(seed).choices([*TARGETS], [*TARGETS.values()])[0]
        again = f"reproduce: python tests/fuzz/fuzz.py --target {target} --cases 1 --seed {seed}"
        again += f" --extension {options.extension}" * bool(options.extension)
        # before the call: a process that dies says nothing afterwards
        print(f"\r{again}\033[K" if sys.stderr.isatty() else again, file=sys.stderr, flush=True)
        try:
            getattr(fuzz, target)(seed)
        except BaseException:
            print(f"\n{again}", file=sys.stderr)
            raise
        counts[target] += 1
        seed += 1
    print(f"{sum(counts.values())} cases: {', '.join(f'{n} {name}' for name, n in counts.items())}; next seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
