"""One GGUF model in llama.cpp: its context, its vocabulary, and its logits without a copy."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .library import BYTE, KV_TYPES, NORMAL, UNUSED, Library, library

# what llama_decode returns beside 0
FAILURES = {1: "no room in the KV cache", 2: "aborted", -1: "invalid batch"}
SENTENCEPIECE = 1  # llama_vocab_type


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Model:
    """A GGUF model and the text that it has read so far.

    Args:
      path: the GGUF file; of a split model the first.
      n_ctx: tokens of a text at most; None: the context that the model was trained with, or 4096 where that is longer.
      n_batch: tokens that one pass reads at most.
      n_threads: CPU threads, at most (and by default) the cores of this process.
      gpu_layers: layers that a GPU computes; None: llama.cpp's default.
      kv_type: of the KV cache: "f16" as llama.cpp's default is, "f32" (not in ik_llama.cpp), or "q8_0" (with flash
        attention).
      flash_attention: None: llama.cpp's choice; off in ik_llama.cpp, whose kernels end the process on some CPUs.

    Raises: ValueError naming the argument, also where the file cannot be loaded. What llama.cpp logs goes to the logger
    ``eft_kernels.llama_cpp``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_threads: int | None = None,
        gpu_layers: int | None = None,
        kv_type: str = "f16",
        flash_attention: bool | None = None,
    ):
        self.path = os.path.expanduser(os.fsdecode(path))
        if not os.path.isfile(self.path):
            raise ValueError(f"{self.path}: no such file; a GGUF model is expected")
        with open(self.path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{self.path}: is not a GGUF file")
        for name, value, low, high in (
            ("n_ctx", n_ctx, 1, 1 << 30),
            ("n_batch", n_batch, 1, 1 << 30),
            ("n_threads", n_threads, 1, cores()),
            ("gpu_layers", gpu_layers, -1, 1 << 30),
        ):
            if value is not None and (type(value) is not int or not low <= value <= high):
                raise ValueError(f"{name}: got {value!r}, allowed is an integer from {low} to {high}")
        if kv_type not in KV_TYPES:
            raise ValueError(f"kv_type: got {kv_type!r}, allowed are {', '.join(KV_TYPES)}")
        self.lib = lib = library()
        if lib.fork and kv_type == "f32":
            raise ValueError("kv_type: f32 is not supported by ik_llama.cpp; use f16")

        lib.errors.clear()
        params = lib.model_default_params()
        if gpu_layers is not None:
            params.n_gpu_layers = gpu_layers
        model = lib.load_model(os.fsencode(self.path), params)
        if not model:
            raise ValueError(f"{self.path}: llama.cpp cannot load it{lib.reason()}")
        self._handles: list[int] = [model]  # and the context; emptied where both are freed
        self._free = weakref.finalize(self, _free, lib, self._handles)
        try:
            self._check()
            trained = max(1, lib.n_ctx_train(model))
            self.n_ctx = min(trained, 4096) if n_ctx is None else n_ctx
            if self.n_ctx > trained:
                raise ValueError(f"n_ctx: got {n_ctx}, allowed is up to {trained}, what {self.path} was trained with")
            threads = cores() if n_threads is None else n_threads
            context = lib.new_context(model, self._context_params(n_batch, threads, kv_type, flash_attention))
            if not context:
                raise ValueError(f"{self.path}: llama.cpp cannot make a context for it{lib.reason()}")
        except BaseException:
            self.close()
            raise
        self._handles.append(context)
        self.n_ctx = min(self.n_ctx, lib.n_ctx(context))
        self.n_batch = min(n_batch, lib.n_batch(context))
        self.tokens: list[int] = []  # the text so far
        self._invalid = False  # it made NaN, which the cache then holds
        self._busy = threading.Lock()
        self._batch = Batch(lib, self.n_batch)

    def _check(self) -> None:
        """Refuses what llama.cpp would end the process for."""
        lib, model = self.lib, self._handles[0]
        if lib.has_encoder(model):
            raise ValueError(f"{self.path}: has an encoder; decoder-only models are supported")
        hybrid = lib.is_hybrid(model)
        self.recurrent = bool(lib.is_recurrent(model) or hybrid)
        if lib.fork and self.recurrent and not hybrid:
            raise ValueError(f"{self.path}: recurrent models are not supported by ik_llama.cpp; use llama-cpp-python")
        vocab = lib.get_vocab(model)
        if not vocab or lib.vocab_type(vocab) == 0 or lib.n_vocab(vocab) < 1:
            raise ValueError(f"{self.path}: holds no tokenizer")
        self._vocab: int = vocab
        self.n_vocab = int(lib.n_vocab(vocab))
        if any(add(vocab) and token(vocab) < 0 for add, token in ((lib.add_bos, lib.bos), (lib.add_eos, lib.eos))):
            raise ValueError(f"{self.path}: its tokenizer adds a token that it does not name")

    def _context_params(self, n_batch: int, threads: int, kv_type: str, flash_attention: bool | None) -> Any:
        params = self.lib.context_default_params()
        params.n_ctx = self.n_ctx
        params.n_batch = n_batch
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = 1
        fields = {name for name, *_ in params._fields_}
        for name in fields:
            if name.startswith(("type_k", "type_v")):
                setattr(params, name, KV_TYPES[kv_type])
        if "flash_attn" in fields:
            params.flash_attn = bool(flash_attention)
        elif flash_attention is not None:
            params.flash_attn_type = int(flash_attention)
        return params

    @property
    def handle(self) -> int:
        """llama.cpp's model; ValueError once it is freed."""
        if not self._handles:
            raise ValueError(f"{self.path}: the model was closed")
        return self._handles[0]

    @property
    def vocab(self) -> int:
        """llama.cpp's vocabulary; ValueError once the model is freed."""
        return self._vocab if self.handle else 0

    @property
    def context(self) -> int:
        """llama.cpp's context; ValueError once it is freed."""
        if not self._handles:
            raise ValueError(f"{self.path}: the model was closed")
        context: int = self._handles[1]
        return context

    def close(self) -> None:
        """Frees the model; every later use raises ValueError."""
        with getattr(self, "_busy", threading.Lock()):
            self._free()

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, tokens: Sequence[int], keep: int = 1) -> torch.Tensor:
        """Appends tokens to the text; the logits of its last ``keep`` tokens, float32 [keep, n_vocab].

        The tensor is llama.cpp's own memory: the next call overwrites it, and closing the model frees it. RuntimeError
        where llama.cpp fails; `reset` then begins anew.
        """
        if not 1 <= keep <= min(len(tokens), self.n_batch):
            raise ValueError(f"keep: got {keep}, allowed is 1 to {min(len(tokens), self.n_batch)}")
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise ValueError(
                f"tokens: got {len(tokens)} after {len(self.tokens)}, allowed are {self.n_ctx} together, the context "
                f"of {self.path}"
            )
        for token in tokens:
            if not 0 <= token < self.n_vocab:
                raise ValueError(f"tokens: got {token}, allowed is 0 to {self.n_vocab - 1}")
        with self._busy:
            context = self.context
            first = len(tokens) % self.n_batch or self.n_batch  # the rest are full passes
            start = 0
            for stop in range(first, len(tokens) + 1, self.n_batch):
                last = stop == len(tokens)
                batch = self._batch.fill(tokens[start:stop], len(self.tokens), keep if last else 0)
                self.lib.errors.clear()
                code = self.lib.decode(context, batch)
                if code:
                    what = FAILURES.get(code, "failure")
                    raise RuntimeError(f"{self.path}: llama_decode returned {code}, {what}{self.lib.reason()}")
                self.tokens += tokens[start:stop]
                count, start = stop - start, stop
            rows = [self.lib.logits(context, i) for i in range(count - keep, count)]
            if not all(rows):
                raise RuntimeError(f"{self.path}: llama.cpp gives no logits{self.lib.reason()}")
            size = 4 * self.n_vocab
            if rows == list(range(rows[0], rows[0] + keep * size, size)):
                logits = _view(rows[0], keep, self.n_vocab)
            else:
                logits = torch.cat([_view(row, 1, self.n_vocab) for row in rows])
            self._invalid = self._invalid or bool(logits.sum().isnan())
            return logits

    def forget(self, count: int) -> None:
        """Takes the newest tokens back. RuntimeError where the model's memory cannot, as that of a recurrent one."""
        if not 0 <= count <= len(self.tokens):
            raise ValueError(f"count: got {count}, allowed is 0 to {len(self.tokens)}, the tokens read")
        kept = self.tokens[: len(self.tokens) - count]
        if self._invalid:  # attention reads forgotten cells, too, with weight 0, but 0 * NaN is NaN
            self.reset()
            if kept:
                self.read(kept)
            return
        with self._busy:
            memory = self.lib.memory(self.context)
            if not self.lib.seq_rm(memory, 0, len(kept), -1):
                raise RuntimeError(f"{self.path}: its memory cannot take back {count} tokens")
            self.tokens = kept

    def reset(self) -> None:
        """Forgets the whole text."""
        with self._busy:
            self.lib.clear(self.lib.memory(self.context), self._invalid)
            self.tokens, self._invalid = [], False

    # --- the vocabulary -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def texts(self) -> list[bytes]:
        """How the vocabulary spells each token, [n_vocab]."""
        text, vocab = self.lib.token_text, self.vocab
        return [text(vocab, i) or b"" for i in range(self.n_vocab)]

    def attributes(self, token: int) -> int:
        """llama.cpp's attributes of a token, a set of bits."""
        return int(self.lib.token_attr(self.handle if self.lib.of_model else self.vocab, token))

    def added(self, token: int) -> bool:
        """Not of the vocabulary that was trained: a control token, an added or a reserved one."""
        return not self.attributes(token) & (NORMAL | BYTE)

    def padding(self, token: int) -> bool:
        """A row that only fills the vocabulary up."""
        pad = self.lib.pad(self.handle if self.lib.of_model else self.vocab)
        return bool(self.attributes(token) & UNUSED) or token == pad

    @functools.cached_property
    def ends(self) -> list[int]:
        """Ids that end a text or a turn, by llama.cpp's list, ascending."""
        is_end, vocab = self.lib.is_end, self.vocab
        return [i for i in range(self.n_vocab) if is_end(vocab, i)]

    @functools.cached_property
    def _byte_tokens(self) -> bool:
        if self.lib.vocab_type(self.vocab) != SENTENCEPIECE:
            return True
        there = set(self.texts)
        return all(b"<0x%02X>" % byte in there or bytes([byte]) in there for byte in range(256))

    def tokenize(self, text: str, *, special: bool = True, parse: bool = False) -> list[int]:
        """The ids of a text. special: with the tokens that begin (and end) every text; parse: names of special tokens
        in the text mean these tokens."""
        if not self._byte_tokens:  # llama.cpp would end the process at the first unknown byte
            raise ValueError(f"{self.path}: its vocabulary lacks bytes; give token ids")
        data = text.encode("utf-8")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self.lib.tokenize(self.vocab, data, len(data), ids, room, special, parse)
        if -(1 << 31) < count < 0:
            ids = (ctypes.c_int32 * -count)()
            count = self.lib.tokenize(self.vocab, data, len(data), ids, -count, special, parse)
        if count < 0:
            raise ValueError(f"{self.path}: llama.cpp cannot tokenize the text")
        return ids[:count]

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that a token adds to a text; none for a special token, unless ``special``."""
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token: got {token}, allowed is 0 to {self.n_vocab - 1}")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self.lib.token_piece(self.vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that comes with the model."""
        template = self.lib.chat_template(self.handle, None) if self.lib.chat_template is not None else None
        return None if template is None else template.decode("utf-8")

    def special_text(self, name: str) -> str:
        """The text of the "bos" or "eos" token, "" without one."""
        token = getattr(self.lib, name)(self.vocab)
        return self.texts[token].decode("utf-8", "replace") if 0 <= token < self.n_vocab else ""


class Batch:
    """llama.cpp's batch over arrays of our own: tokens of the one sequence at consecutive positions."""

    def __init__(self, lib: Library, size: int):
        zero = ctypes.pointer(ctypes.c_int32(0))
        self.batch = lib.batch()
        self.token = (ctypes.c_int32 * size)()
        self.pos = (ctypes.c_int32 * size)()
        self.logits = (ctypes.c_int8 * size)()
        self.sequences = (ctypes.POINTER(ctypes.c_int32) * size)(*[zero] * size)
        self.counts = (ctypes.c_int32 * size)(*[1] * size)
        self.batch.token = ctypes.cast(self.token, type(self.batch.token))
        self.batch.pos = ctypes.cast(self.pos, type(self.batch.pos))
        self.batch.logits = ctypes.cast(self.logits, type(self.batch.logits))
        self.batch.seq_id = ctypes.cast(self.sequences, type(self.batch.seq_id))
        self.batch.n_seq_id = ctypes.cast(self.counts, type(self.batch.n_seq_id))

    def fill(self, tokens: Sequence[int], start: int, keep: int) -> ctypes.Structure:
        """Tokens at positions from ``start`` on; logits are wanted of the last ``keep``."""
        count = len(tokens)
        wanted: list[Any] = [0] * (count - keep) + [1] * keep
        self.token[:count] = list(tokens)
        self.pos[:count] = list(range(start, start + count))
        self.logits[:count] = wanted
        self.batch.n_tokens = count
        return self.batch


def _view(address: int, rows: int, columns: int) -> torch.Tensor:
    array = (ctypes.c_float * (rows * columns)).from_address(address)
    return torch.from_numpy(np.ctypeslib.as_array(array)).view(rows, columns)


def _free(lib: Library, handles: list[int]) -> None:
    if len(handles) > 1:
        lib.free_context(handles[1])
    if handles:
        lib.free_model(handles[0])
    handles.clear()
