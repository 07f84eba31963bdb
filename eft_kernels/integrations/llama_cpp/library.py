"""llama.cpp's C functions under one name each, whichever version and Python package brings them.

Known to work: llama-cpp-python 0.3.36 (`llama_cpp`) and ik-llama-cpp-python 0.1.5 (`ik_llama_cpp`). Structures, whose
layout differs between versions, are the package's own.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
import logging
from typing import Any

PACKAGES = {"llama_cpp": "llama-cpp-python", "ik_llama_cpp": "ik-llama-cpp-python"}
STRUCTURES = {"llama_cpp": "llama_cpp.llama_cpp", "ik_llama_cpp": "ik_llama_cpp._ctypes_api"}

LOG = logging.getLogger("eft_kernels.llama_cpp")
LOG.addHandler(logging.NullHandler())  # silent unless the program asks
# llama.cpp's levels; 5 goes on with the line before
LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

# bits of a token's attributes
UNUSED, NORMAL, BYTE = 2, 4, 32
KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}

POINTER, INT, UINT, BOOL, BYTES = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_bool, ctypes.c_char_p


class Library:
    """The functions that this package calls; `errors` holds the newest lines that llama.cpp logged as errors."""

    def __init__(self, package: str):
        self.package, self.fork = package, package == "ik_llama_cpp"
        module = importlib.import_module(STRUCTURES[package])
        self.dll: ctypes.CDLL = module._lib
        self.batch: type[ctypes.Structure] = module.llama_batch
        model_params, context_params = module.llama_model_params, module.llama_context_params
        bind, find = self._bind, self._find

        self.backend_init = bind(None, [], "llama_backend_init")
        self.model_default_params = bind(model_params, [], "llama_model_default_params")
        self.context_default_params = bind(context_params, [], "llama_context_default_params")
        self.load_model = bind(
            POINTER, [BYTES, model_params], "llama_model_load_from_file", "llama_load_model_from_file"
        )
        self.free_model = bind(None, [POINTER], "llama_model_free", "llama_free_model")
        self.new_context = bind(
            POINTER, [POINTER, context_params], "llama_init_from_model", "llama_new_context_with_model"
        )
        self.free_context = bind(None, [POINTER], "llama_free")
        self.n_ctx = bind(UINT, [POINTER], "llama_n_ctx")
        self.n_batch = bind(UINT, [POINTER], "llama_n_batch")
        self.n_ctx_train = bind(INT, [POINTER], "llama_model_n_ctx_train", "llama_n_ctx_train")
        self.has_encoder = bind(BOOL, [POINTER], "llama_model_has_encoder")
        self.is_recurrent = bind(BOOL, [POINTER], "llama_model_has_recurrent", "llama_model_is_recurrent")
        self.is_hybrid = find(BOOL, [POINTER], "llama_model_is_hybrid") or (lambda model: False)
        self.chat_template = find(BYTES, [POINTER, BYTES], "llama_model_chat_template")

        self.decode = bind(INT, [POINTER, self.batch], "llama_decode")
        self.logits = bind(POINTER, [POINTER, INT], "llama_get_logits_ith")

        # the cache: an object of its own, or functions of the context under two older names
        self.memory = find(POINTER, [POINTER], "llama_get_memory")
        if self.memory is not None:
            self.clear = bind(None, [POINTER, BOOL], "llama_memory_clear")
            self.seq_rm = bind(BOOL, [POINTER, INT, INT, INT], "llama_memory_seq_rm")
        else:
            self.memory = lambda context: context
            clear = bind(None, [POINTER], "llama_kv_self_clear", "llama_kv_cache_clear")
            self.clear = lambda context, data: clear(context)
            self.seq_rm = bind(BOOL, [POINTER, INT, INT, INT], "llama_kv_self_seq_rm", "llama_kv_cache_seq_rm")

        # the vocabulary: an object of its own; in the fork some functions take the model
        self.get_vocab = bind(POINTER, [POINTER], "llama_model_get_vocab")
        self.vocab_type = bind(INT, [POINTER], "llama_vocab_type")
        self.n_vocab = bind(INT, [POINTER], "llama_vocab_n_tokens")
        self.token_text = bind(BYTES, [POINTER, INT], "llama_vocab_get_text")
        self.is_end = bind(BOOL, [POINTER, INT], "llama_vocab_is_eog")
        self.bos = bind(INT, [POINTER], "llama_vocab_bos")
        self.eos = bind(INT, [POINTER], "llama_vocab_eos")
        self.add_bos = bind(BOOL, [POINTER], "llama_vocab_get_add_bos")
        self.add_eos = bind(BOOL, [POINTER], "llama_vocab_get_add_eos")
        tokenize = [POINTER, BYTES, INT, ctypes.POINTER(INT), INT, BOOL, BOOL]
        self.tokenize = bind(INT, tokenize, "llama_vocab_tokenize", "llama_tokenize")
        piece = [POINTER, INT, BYTES, INT, INT, BOOL]
        self.token_piece = bind(INT, piece, "llama_token_to_piece_vocab", "llama_token_to_piece")
        self.of_model = find(INT, [POINTER, INT], "llama_vocab_get_attr") is None
        self.token_attr = bind(INT, [POINTER, INT], "llama_vocab_get_attr", "llama_token_get_attr")
        self.pad = bind(INT, [POINTER], "llama_vocab_pad", "llama_token_pad")

        self.errors: collections.deque[str] = collections.deque(maxlen=3)
        self._level = logging.INFO
        self._log_callback = LOG_CALLBACK(self._log)  # llama.cpp keeps the pointer
        bind(None, [LOG_CALLBACK, POINTER], "llama_log_set")(self._log_callback, None)
        self.backend_init()

    def _find(self, result: Any, arguments: list[Any], *names: str) -> Any:
        """The first of the functions that the library has, with a prototype of our own; None if it has none."""
        for name in names:
            try:
                function = self.dll[name]  # not the attribute, which the package shares and types itself
            except AttributeError:
                continue
            function.restype, function.argtypes = result, arguments
            return function
        return None

    def _bind(self, result: Any, arguments: list[Any], *names: str) -> Any:
        function = self._find(result, arguments, *names)
        if function is None:
            raise ImportError(
                f"{PACKAGES[self.package]}: its llama.cpp has no {' or '.join(names)}; known to work are "
                "llama-cpp-python 0.3.36 and ik-llama-cpp-python 0.1.5"
            )
        return function

    def _log(self, level: int, text: bytes | None, _: int | None) -> None:
        self._level = LEVELS.get(level, self._level)
        line = (text or b"").decode("utf-8", "replace").strip()
        if line.strip("."):
            if self._level == logging.ERROR:
                self.errors.append(line)
            LOG.log(self._level, "%s", line)

    def reason(self) -> str:
        """What llama.cpp logged as errors since `errors` was cleared, for the end of a message of our own."""
        return f": {'; '.join(self.errors)}" if self.errors else ""


@functools.cache
def library() -> Library:
    """llama.cpp of the first package that is installed."""
    for package, module in STRUCTURES.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in (package, module):
                raise
        else:
            return Library(package)
    raise ModuleNotFoundError("llama.cpp is needed: pip install llama-cpp-python", name="llama_cpp")
