// eft_kernels._cpu: the CPU kernels as a Python module.
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED  // free-threaded Python has no limited API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "../cpu/kernels.h"
#include "../cpu/pool.h"
#include "../semantics/noise.h"
#include "arguments.h"

namespace {

using namespace eft;
using namespace eft::bindings;

const Kernels* choose(const char* wanted) {
#if defined(__x86_64__) && defined(EFT_X86)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (!wanted || !strcmp(wanted, "avx512"))) return &kernels_avx512();
  if (avx2 && (!wanted || !strcmp(wanted, "avx2"))) return &kernels_avx2();
#endif
  return !wanted || !strcmp(wanted, "baseline") ? &kernels_baseline() : nullptr;
}

const Kernels* kernels = nullptr;

// Each takes a number of threads, then what prepare() reads. It returns a tuple of tensors (None: not asked for), or
// None where an argument is unusual. The kernel runs with the interpreter lock released; MemoryError where it finds no
// memory.
template <class C>
PyObject* run(PyObject* const* args, Py_ssize_t n, void (*kernel)(const C&)) {
  Reader r(args, n, dlpack::kCPU);
  C call{};
  call.threads = static_cast<int>(r.integer(1, INT32_MAX));
  Outputs outputs;
  if (!prepare(r, call, outputs)) Py_RETURN_NONE;
  if (outputs.failed()) return nullptr;
  bool memory = true;
  if (call.rows) {
    Py_BEGIN_ALLOW_THREADS try { kernel(call); } catch (const std::bad_alloc&) {
      memory = false;
    }
    Py_END_ALLOW_THREADS
  }
  if (!memory) return PyErr_NoMemory();
  return outputs.tuple();
}

PyObject* sample(PyObject*, PyObject* const* args, Py_ssize_t n) { return run(args, n, kernels->sample); }
PyObject* verify(PyObject*, PyObject* const* args, Py_ssize_t n) { return run(args, n, kernels->verify); }
PyObject* logprobs(PyObject*, PyObject* const* args, Py_ssize_t n) { return run(args, n, kernels->logprobs); }

PyObject* scratch(PyObject*, PyObject*) { return PyLong_FromLongLong(scratch_bytes.load()); }

// set_isa(name or None): the instruction set to use; returns its name, or raises ValueError where it is not here
PyObject* set_isa(PyObject*, PyObject* name) {
  const Kernels* k = nullptr;
  if (name == Py_None) {
    k = choose(nullptr);
  } else if (const char* text = PyUnicode_AsUTF8AndSize(name, nullptr)) {
    k = choose(text);
    if (!k) PyErr_Format(PyExc_ValueError, "instruction set %s is not supported by this machine or build", text);
  }
  if (!k) return nullptr;
  kernels = k;
  return PyUnicode_FromString(k->isa);
}

// philox(seed, position, stream, slot, kind, index) -> four words: the counters' layout, for tests
PyObject* philox(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Reader r(args, n, dlpack::kCPU);
  int64_t v[6];
  for (int64_t& x : v) x = r.integer();
  if (r.unusual) {
    PyErr_SetString(PyExc_TypeError, "expected six integers");
    return nullptr;
  }
  auto source = scalar::source(v[0], v[1], static_cast<uint32_t>(v[2]), static_cast<uint32_t>(v[3]));
  auto w = scalar::words(source, static_cast<uint32_t>(v[4]), static_cast<uint32_t>(v[5]));
  return Py_BuildValue("(IIII)", w.r[0], w.r[1], w.r[2], w.r[3]);
}

PyMethodDef methods[] = {{"sample", EFT_FAST(sample), nullptr},
                         {"verify", EFT_FAST(verify), nullptr},
                         {"logprobs", EFT_FAST(logprobs), nullptr},
                         {"attach", EFT_FAST(attach), nullptr},
                         {"scratch_bytes", scratch, METH_NOARGS, nullptr},
                         {"set_poison", set_poison, METH_O, nullptr},
                         {"set_isa", set_isa, METH_O, nullptr},
                         {"philox", EFT_FAST(philox), nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  kernels = choose(nullptr);
  return PyModule_Create(&module);
}
