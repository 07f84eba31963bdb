// eft_kernels._cpu: the CPU kernels as a Python module. Limited API (one binary for every Python >= 3.10) and no torch
// header (one binary for every torch): backends/cpu.py passes addresses, and keeps the tensors alive.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdlib>
#include <cstring>

#include "../cpu/kernels.h"
#include "../semantics/noise.h"

namespace {

using namespace eft;

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

// Arguments one after the other; the first wrong type sets the Python error and stops the call.
class Reader {
 public:
  Reader(PyObject* const* args, Py_ssize_t n) : args_(args), n_(n) {}
  PyObject* next() {
    if (i_ < n_) return args_[i_++];
    failed_ = true;
    PyErr_SetString(PyExc_TypeError, "too few arguments");
    return nullptr;
  }
  int64_t integer() {
    if (failed_) return 0;
    PyObject* o = next();
    if (!o) return 0;
    int64_t v = PyLong_AsLongLong(o);
    failed_ = v == -1 && PyErr_Occurred();
    return v;
  }
  double real() {
    if (failed_) return 0;
    PyObject* o = next();
    if (!o) return 0;
    double v = PyFloat_AsDouble(o);
    failed_ = v == -1 && PyErr_Occurred();
    return v;
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(integer());
  }
  template <class T>
  PerRow<T> per_row() {
    const T* p = pointer<const T>();
    if constexpr (sizeof(T) == 4) return {p, static_cast<T>(real())};
    else return {p, static_cast<T>(integer())};
  }
  bool ok() {
    if (!failed_ && i_ != n_) {
      failed_ = true;
      PyErr_SetString(PyExc_TypeError, "too many arguments");
    }
    return !failed_;
  }

 private:
  PyObject* const* args_;
  Py_ssize_t n_, i_ = 0;
  bool failed_ = false;
};

// the arguments that every operation has, in the order of backends/cpu.py
void read(Reader& r, Call& c, float* weights) {
  c.rows = r.integer();
  c.slots = r.integer();
  c.vocab_size = static_cast<int>(r.integer());
  c.tuned = static_cast<int>(r.integer());
  c.threads = static_cast<int>(r.integer());
  c.models = static_cast<int>(r.integer());
  if (c.models > kMaxModels) c.models = kMaxModels;
  for (int j = 0; j < c.models; ++j) {
    c.model[j].data = r.pointer<const void>();
    c.model[j].row_stride = r.integer();
    c.model[j].slot_stride = r.integer();
    c.model[j].dtype = static_cast<int>(r.integer());
  }
  c.weights = r.pointer<const float>();
  c.weights_stride = r.integer();
  if (!c.weights) {
    for (int j = 0; j < c.models; ++j) weights[j] = static_cast<float>(r.real());
    c.weights = weights;
  }
  c.temperature = r.per_row<float>();
  c.top_k = r.per_row<int64_t>();
  c.top_p = r.per_row<float>();
  c.min_p = r.per_row<float>();
  c.upscale_top_p = r.per_row<float>();
  c.seed = r.per_row<int64_t>();
  c.position = r.per_row<int64_t>();
  c.mask = r.pointer<const int32_t>();
}

template <class C>
PyObject* run(void (*kernel)(const C&), const C& call) {
  Py_BEGIN_ALLOW_THREADS
  kernel(call);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

PyObject* sample(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Reader r(args, n);
  SampleCall c{};
  float weights[kMaxModels];
  read(r, c, weights);
  c.stream = static_cast<uint32_t>(r.integer());
  c.slot = static_cast<uint32_t>(r.integer());
  c.top_n = r.integer();
  c.tokens = r.pointer<int64_t>();
  c.valid = r.pointer<bool>();
  c.logprobs = r.pointer<float>();
  c.raw_logprobs = r.pointer<float>();
  c.top_ids = r.pointer<int64_t>();
  c.top_logprobs = r.pointer<float>();
  c.entropy = r.pointer<float>();
  c.tv = r.pointer<float>();
  return r.ok() ? run(kernels->sample, c) : nullptr;
}

PyObject* verify(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Reader r(args, n);
  VerifyCall c{};
  float weights[kMaxModels];
  read(r, c, weights);
  c.draft_tokens = r.pointer<const int64_t>();
  c.draft_lengths = r.pointer<const int64_t>();
  c.method = static_cast<int>(r.integer());
  c.draft = static_cast<int>(r.integer());
  c.tokens = r.pointer<int64_t>();
  c.emitted = r.pointer<int64_t>();
  c.valid = r.pointer<bool>();
  c.logprobs = r.pointer<float>();
  c.raw_logprobs = r.pointer<float>();
  return r.ok() ? run(kernels->verify, c) : nullptr;
}

PyObject* logprobs(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Reader r(args, n);
  LogprobsCall c{};
  float weights[kMaxModels];
  read(r, c, weights);
  c.ids = r.pointer<const int64_t>();
  c.n_ids = r.integer();
  c.out = r.pointer<float>();
  return r.ok() ? run(kernels->logprobs, c) : nullptr;
}

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
  Reader r(args, n);
  int64_t v[6];
  for (int64_t& x : v) x = r.integer();
  if (!r.ok()) return nullptr;
  auto source = scalar::source(v[0], v[1], static_cast<uint32_t>(v[2]), static_cast<uint32_t>(v[3]));
  auto w = scalar::words(source, static_cast<uint32_t>(v[4]), static_cast<uint32_t>(v[5]));
  return Py_BuildValue("(IIII)", w.r[0], w.r[1], w.r[2], w.r[3]);
}

#define EFT_FAST(f) reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)), METH_FASTCALL
PyMethodDef methods[] = {{"sample", EFT_FAST(sample), nullptr},
                         {"verify", EFT_FAST(verify), nullptr},
                         {"logprobs", EFT_FAST(logprobs), nullptr},
                         {"set_isa", set_isa, METH_O, nullptr},
                         {"philox", EFT_FAST(philox), nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  kernels = choose(nullptr);
  return PyModule_Create(&module);
}
