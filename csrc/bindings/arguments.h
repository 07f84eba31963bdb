// What every module of kernels needs: the arguments of a call out of Python objects, and the tensors that it returns.
// Arguments are checked here in their usual forms, because at batch 1 Python costs more than the kernel does. Limited
// API (one binary for every Python >= 3.10) and no torch header (one binary for every torch): tensors come and go by
// DLPack's C exchange interface. To be included after Python.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "../semantics/call.h"
#include "dlpack.h"

namespace eft::bindings {

// torch.Tensor, torch.nn.Parameter, and how tensors of these types are read and made: attach().
inline PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
inline PyObject* is_neg = nullptr;  // torch.Tensor.is_neg
inline const dlpack::ExchangeAPI* api = nullptr;
constexpr dlpack::DataType kInt64{dlpack::kInt, 64, 1}, kInt32{dlpack::kInt, 32, 1}, kFloat32{dlpack::kFloat, 32, 1},
    kFloat16{dlpack::kFloat, 16, 1}, kBfloat16{dlpack::kBfloat, 16, 1}, kBool8{dlpack::kBool, 8, 1},
    kUint8{dlpack::kUint, 8, 1};

// The arguments of a call. Whatever is not in its plain form (exact types, contiguous tensors on one device, values
// that are allowed) sets `unusual`: the caller then looks closer, converts it, or says what is wrong with it
// (arguments.py).
struct Reader {
  PyObject* const* args;
  Py_ssize_t n;
  dlpack::Device device;  // its id is that of logits[0]
  Py_ssize_t i = 0;
  bool unusual = false;
  bool strict = true;  // look at values, too
  int64_t rows = 0, slots = 1;
  PyObject* models = nullptr;  // a tuple: a list's items may be replaced while the call runs

  Reader(PyObject* const* args, Py_ssize_t n, int32_t device_type) : args(args), n(n), device{device_type, -1} {}
  ~Reader() { Py_DecRef(models); }
  Reader(const Reader&) = delete;

  bool need(bool ok) {
    unusual |= !ok;
    return ok;
  }
  PyObject* next() { return need(i < n) ? args[i++] : Py_None; }
  int64_t integer(int64_t low = INT64_MIN, int64_t high = INT64_MAX) {
    PyObject* o = next();
    if (!need(PyLong_CheckExact(o))) return 0;
    int64_t v = PyLong_AsLongLong(o);
    if (v == -1 && PyErr_Occurred()) PyErr_Clear(), unusual = true;
    need(v >= low && v <= high);
    return v;
  }
  bool boolean() {
    PyObject* o = next();
    need(o == Py_True || o == Py_False);
    return o == Py_True;
  }
  // values of tensors are looked at: where the host can
  bool values() const { return strict && device.type == dlpack::kCPU; }

  // DLPack tells neither that the values are the negatives of what is in memory nor that the memory was freed
  bool plain(PyObject* o, const dlpack::Tensor& t) {
    PyObject* negative = PyObject_CallFunctionObjArgs(is_neg, o, nullptr);
    if (!negative) return PyErr_Clear(), false;
    Py_DecRef(negative);
    if (negative != Py_False) return false;
    bool empty = false;
    for (int d = 0; d < t.ndim; ++d) empty |= t.shape[d] == 0;
    return t.data || empty;
  }
  // a tensor on the device
  bool view(PyObject* o, dlpack::Tensor& t) {
    if (!need(Py_TYPE(o) == tensor_type || Py_TYPE(o) == parameter_type)) return false;
    if (api->tensor_from_object(o, &t)) {
      PyErr_Clear();
      return need(false);
    }
    if (!need(plain(o, t))) return false;
    t.data = static_cast<char*>(t.data) + t.byte_offset;
    if (device.id < 0) device.id = t.device.id;
    return need(t.device.type == device.type && t.device.id == device.id);
  }
  // a contiguous tensor of this type and shape, or null
  template <class T>
  const T* tensor(PyObject* o, dlpack::DataType dtype, std::initializer_list<int64_t> shape) {
    dlpack::Tensor t;
    if (!view(o, t)) return nullptr;
    bool ok = t.dtype == dtype && t.ndim == static_cast<int>(shape.size()), contiguous = true;
    int64_t elements = 1;
    for (int d = t.ndim - 1; ok && d >= 0; --d) {
      ok = t.shape[d] == shape.begin()[d];
      contiguous &= t.strides[d] == elements || t.shape[d] == 1;
      elements *= t.shape[d];
    }
    // an empty tensor has no order, and maybe no address, where null means none
    return need(ok && (contiguous || elements == 0)) ? static_cast<const T*>(t.data ? t.data : this) : nullptr;
  }
  template <class T>
  PerRow<T> per_row(T low, T high) {
    PyObject* o = next();
    if (PyFloat_CheckExact(o) || PyLong_CheckExact(o)) {
      --i;
      if constexpr (sizeof(T) == 8) return {nullptr, integer(strict ? low : INT64_MIN, strict ? high : INT64_MAX)};
      double v = PyFloat_AsDouble(args[i++]);
      if (v == -1 && PyErr_Occurred()) PyErr_Clear(), unusual = true;
      need(!strict || (v >= low && v <= high));
      return {nullptr, static_cast<T>(v)};
    }
    const T* p = tensor<T>(o, sizeof(T) == 8 ? kInt64 : kFloat32, {rows});
    if (p && values())
      for (int64_t r = 0; r < rows; ++r) need(p[r] >= low && p[r] <= high);
    return {p, 0};
  }

  // true: one was given. None leaves x as it is.
  template <class T>
  bool per_row(PerRow<T>& x, T low, T high) {
    if (i < n && args[i] == Py_None) return ++i, false;
    x = per_row<T>(low, high);
    return true;
  }
  void sampling(Sampling& s) {
#define EFT_READ(T, name, off, low, high) s.name = per_row<T>(low, high);
    EFT_PARAMETERS(EFT_READ)
#undef EFT_READ
  }
  // what drafts were drawn by, where it is not the target's
  bool drawn_by(Sampling& s) {
    bool given = false;
#define EFT_READ(T, name, off, low, high) given |= per_row<T>(s.name, low, high);
    EFT_DRAFTED(EFT_READ)
#undef EFT_READ
#define EFT_OFF(T, name, off, low, high) s.name = {nullptr, off};
    EFT_COMBINING(EFT_OFF)
#undef EFT_OFF
    return given;
  }

  // what every operation has: strict, logits [rows, (slots,) V] and None, or [n, V] and an index [rows, (slots)], and
  // the other fields of parameters.py's Params
  void call(Call& c, int dims) {
    strict = boolean();
    PyObject *logits = next(), *index = next();
    if (PyList_Check(logits)) {
      models = PyList_AsTuple(logits);
      if (!models) PyErr_Clear();
    } else if (PyTuple_Check(logits)) {
      Py_IncRef(models = logits);
    }
    if (!need(models)) return;
    const Py_ssize_t count = PyTuple_Size(models);
    if (!need(count >= 1 && count <= kMaxModels)) return;
    c.models = static_cast<int>(count);
    if (index != Py_None) {
      dlpack::Tensor t;
      if (!view(index, t) || !need(t.ndim == dims - 1)) return;
      rows = t.shape[0], slots = dims == 3 ? t.shape[1] : 1;
      c.row_index = dims == 3 ? tensor<int64_t>(index, kInt64, {rows, slots}) : tensor<int64_t>(index, kInt64, {rows});
      if (!c.row_index) return;
    }
    const int logit_dims = c.row_index ? 2 : dims;
    int64_t vocab = INT64_MAX;
    for (int j = 0; j < c.models; ++j) {
      dlpack::Tensor t;
      if (!view(PyTuple_GetItem(models, j), t)) return;
      const int last = logit_dims - 1;
      if (!need(t.ndim == logit_dims && (t.strides[last] == 1 || t.shape[last] < 2 || t.shape[0] == 0))) return;
      if (j == 0) c.logit_rows = t.shape[0];
      if (j == 0 && !c.row_index) rows = t.shape[0], slots = dims == 3 ? t.shape[1] : 1;
      need(t.shape[0] == c.logit_rows && (logit_dims == 2 || t.shape[1] == slots) && slots >= 1);
      c.model[j] = {t.data, t.strides[0], logit_dims == 3 ? t.strides[1] : 0, kF32};
      if (t.dtype == kFloat16) c.model[j].dtype = kF16;
      else if (t.dtype == kBfloat16) c.model[j].dtype = kBF16;
      else need(t.dtype == kFloat32);
      vocab = std::min(vocab, t.shape[last]);
    }
    // a row is read even where the index names none
    if (c.row_index && !need(c.logit_rows > 0 || rows == 0)) return;
    if (c.row_index && values())
      for (int64_t k = 0; k < rows * slots; ++k) need(c.row_index[k] >= 0 && c.row_index[k] < c.logit_rows);
    c.rows = rows;
    c.slots = slots;
    PyObject* w = next();
    if (PyTuple_Check(w)) {
      if (!need(PyTuple_Size(w) == count)) return;
      for (int j = 0; j < c.models; ++j) {
        PyObject* o = PyTuple_GetItem(w, j);
        if (!need(PyFloat_CheckExact(o))) return;
        c.weight[j] = static_cast<float>(PyFloat_AsDouble(o));
      }
    } else {
      dlpack::Tensor t;
      if (!view(w, t)) return;
      c.weights = t.ndim == 2 ? tensor<float>(w, kFloat32, {rows, count}) : tensor<float>(w, kFloat32, {count});
      if (!c.weights) return;
      c.weights_stride = t.ndim == 2 ? count : 0;
    }
    const float* weights = c.weights ? c.weights : c.weight;
    if (c.weights ? values() : strict)
      for (int64_t k = 0; k < (c.weights_stride ? rows : 1) * count; ++k) need(std::isfinite(weights[k]));
    sampling(c);
    c.seed = per_row<int64_t>(INT64_MIN, INT64_MAX);
    c.position = per_row<int64_t>(0, INT64_MAX);
    PyObject *mask = next(), *bias = next();
    if (i < n && args[i] == Py_None) ++i;
    else vocab = integer(1, vocab);
    if (!need(vocab >= 1 && vocab <= kMaxVocab)) return;
    c.vocab_size = static_cast<int>(vocab);
    // sorted by whoever checked the arguments (workspace.py), who alone may pass it
    if (bias != Py_None && need(!strict && PyTuple_Check(bias) && PyTuple_Size(bias) == 3)) {
      const int64_t starts = (vocab + kChunkSize - 1) / kChunkSize + 1;
      dlpack::Tensor t;
      if (!view(PyTuple_GetItem(bias, 1), t) || !need(t.ndim == dims)) return;
      const int64_t size = t.shape[dims - 1];
      const auto part = [&](int at, auto type, dlpack::DataType dtype, int64_t n) {
        using T = decltype(type);
        PyObject* o = PyTuple_GetItem(bias, at);
        return dims == 3 ? tensor<T>(o, dtype, {rows, slots, n}) : tensor<T>(o, dtype, {rows, n});
      };
      c.bias = {part(0, int32_t{}, kInt32, starts), part(1, int32_t{}, kInt32, size), part(2, float{}, kFloat32, size),
                size};
      if (unusual) return;
    }
    const int64_t words = (vocab + 31) / 32;
    if (mask != Py_None)
      c.mask = dims == 3 ? tensor<int32_t>(mask, kInt32, {rows, slots, words})
                         : tensor<int32_t>(mask, kInt32, {rows, words});
    c.tuned = static_cast<int>(integer(0, kMaxModels - 1));
    needs_tuned(c, c.upscale_top_p.data || c.upscale_top_p.value != 1);
  }
  void needs_tuned(const Call& c, bool needed) { need(!needed || (c.tuned >= 0 && c.tuned < c.models)); }
  bool done() const { return !unusual && i == n; }
};

inline bool poison = false;  // outputs on the host hold a mark until they are written: set_poison()
inline void mark(int64_t* x, int64_t n) { std::fill(x, x + n, -77); }
inline void mark(float* x, int64_t n) { std::fill(x, x + n, NAN); }
inline void mark(bool* x, int64_t n) { std::fill(x, x + n, true); }

// What torch says of a tensor that it could not make: torch.OutOfMemoryError of a device, MemoryError of the host.
inline void set_error(void*, const char*, const char* message) {
  PyObject *kind = nullptr, *torch = nullptr;
  if (strstr(message, "out of memory") && (torch = PyImport_ImportModule("torch")))
    kind = PyObject_GetAttrString(torch, "OutOfMemoryError");
  PyErr_Clear();
  const bool host = strstr(message, "allocate memory");
  PyErr_SetString(kind ? kind : host ? PyExc_MemoryError : PyExc_RuntimeError, message);
  Py_DecRef(kind);
  Py_DecRef(torch);
}

// a tensor of unset values; null, and Python's error is set, where there is no memory
inline dlpack::Managed* allocate(dlpack::Device device, dlpack::DataType dtype, std::initializer_list<int64_t> shape) {
  dlpack::Tensor t{};
  int64_t sizes[3];
  std::copy(shape.begin(), shape.end(), sizes);
  t.device = device;
  t.ndim = static_cast<int32_t>(shape.size());
  t.dtype = dtype;
  t.shape = sizes;
  dlpack::Managed* managed = nullptr;
  return api->allocate(&t, &managed, nullptr, set_error) ? nullptr : managed;
}
inline void* address(const dlpack::Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// The tensors that a call returns: made before it, given to a tuple after it.
class Outputs {
 public:
  ~Outputs() {
    for (int i = 0; i < n_; ++i) Py_DecRef(objects_[i]);
  }
  template <class T>
  T* make(bool wanted, dlpack::Device device, dlpack::DataType dtype, std::initializer_list<int64_t> shape) {
    if (failed_) return nullptr;
    PyObject* o = nullptr;
    void* data = nullptr;
    if (wanted) {
      dlpack::Managed* managed = allocate(device, dtype, shape);
      failed_ = !managed;
      if (failed_) return nullptr;
      data = address(managed->tensor);
      failed_ = api->object_from_managed(managed, reinterpret_cast<void**>(&o)) != 0;
      if (failed_) return nullptr;
      if (poison) {
        int64_t elements = 1;
        for (int64_t size : shape) elements *= size;
        mark(static_cast<T*>(data), elements);
      }
    } else {
      o = Py_None;
      Py_IncRef(o);
    }
    objects_[n_++] = o;
    return static_cast<T*>(data);
  }
  // one of the caller's
  void adopt(PyObject* tensor) {
    Py_IncRef(tensor);
    objects_[n_++] = tensor;
  }
  bool failed() const { return failed_; }
  PyObject* tuple() {
    PyObject* t = PyTuple_New(n_);
    for (int i = 0; t && i < n_; ++i) {
      Py_IncRef(objects_[i]);
      PyTuple_SetItem(t, i, objects_[i]);
    }
    return t;
  }

 private:
  PyObject* objects_[9];
  int n_ = 0;
  bool failed_ = false;
};

// Each reads the arguments that are left and makes what the call returns; false where an argument is unusual.

inline bool prepare(Reader& r, SampleCall& c, Outputs& out) {
  r.call(c, 2);
  c.stream = static_cast<uint32_t>(r.integer(0, 1));
  c.slot = static_cast<uint32_t>(r.integer(0, kMaxSlot));
  const bool logprobs = r.boolean();
  c.top_n = r.integer(0, kMaxVocab);
  const bool diagnostics = r.boolean();
  r.needs_tuned(c, diagnostics);
  c.num_runners_up = static_cast<int>(r.integer(0, kMaxRunnersUp));
  const int64_t B = c.rows;
  PyObject* tokens = r.i < r.n ? r.next() : Py_None;  // where to write them
  if (tokens != Py_None) c.tokens = const_cast<int64_t*>(r.tensor<int64_t>(tokens, kInt64, {B}));
  if (!r.done()) return false;
  if (tokens != Py_None) out.adopt(tokens);
  else c.tokens = out.make<int64_t>(true, r.device, kInt64, {B});
  c.valid = out.make<bool>(true, r.device, kBool8, {B});
  c.logprobs = out.make<float>(logprobs, r.device, kFloat32, {B});
  c.raw_logprobs = out.make<float>(logprobs, r.device, kFloat32, {B});
  c.top_ids = out.make<int64_t>(c.top_n, r.device, kInt64, {B, c.top_n});
  c.top_logprobs = out.make<float>(c.top_n, r.device, kFloat32, {B, c.top_n});
  c.entropy = out.make<float>(diagnostics, r.device, kFloat32, {B});
  c.tv = out.make<float>(diagnostics, r.device, kFloat32, {B});
  c.runners_up = out.make<int64_t>(c.num_runners_up, r.device, kInt64, {B, c.num_runners_up});
  return true;
}

inline bool prepare(Reader& r, VerifyCall& c, Outputs& out) {
  r.call(c, 3);
  const int64_t B = c.rows, S = c.slots;
  c.draft_tokens = r.tensor<int64_t>(r.next(), kInt64, {B, S - 1});
  if (r.i < r.n && r.args[r.i] == Py_None) {
    c.draft_lengths = {nullptr, S - 1};
    ++r.i;
  } else {
    c.draft_lengths = {r.tensor<int64_t>(r.next(), kInt64, {B}), 0};
  }
  PyObject* parents = r.next();
  if (parents != Py_None) c.parents = r.tensor<int64_t>(parents, kInt64, {B, S - 1});
  c.method = static_cast<int>(r.integer(0, 2));
  r.need(!c.parents || c.method == kCoupled);
  c.draft = -1;
  if (r.i < r.n && r.args[r.i] == Py_None) ++r.i;
  else c.draft = static_cast<int>(r.integer(0, c.models - 1));
  c.drawn_by = c;  // what is not given is the target's
  r.need(!r.drawn_by(c.drawn_by) || !r.strict || (c.method != kCoupled && c.draft >= 0));
  const bool logprobs = r.boolean();
  if (!r.unusual && r.values())
    for (int64_t b = 0; b < B; ++b) {
      const int64_t length = c.draft_lengths[b];
      if (!r.need(length >= 0 && length < S)) break;
      for (int64_t k = 0; k < length; ++k)
        r.need(c.draft_tokens[b * (S - 1) + k] >= (c.parents ? -1 : 0) &&
               c.draft_tokens[b * (S - 1) + k] < c.vocab_size);
      for (int64_t k = 0; c.parents && k < length; ++k)
        r.need(c.parents[b * (S - 1) + k] >= 0 && c.parents[b * (S - 1) + k] <= k);
    }
  if (!r.done()) return false;
  c.tokens = out.make<int64_t>(true, r.device, kInt64, {B, S});
  c.emitted = out.make<int64_t>(true, r.device, kInt64, {B});
  c.valid = out.make<bool>(true, r.device, kBool8, {B});
  c.logprobs = out.make<float>(logprobs, r.device, kFloat32, {B, S});
  c.raw_logprobs = out.make<float>(logprobs, r.device, kFloat32, {B, S});
  c.path = out.make<int64_t>(c.parents != nullptr, r.device, kInt64, {B, S});
  return true;
}

// log-probs of the ids [rows, n], or of all tokens where ids is None: log-probs, or scores
inline bool prepare(Reader& r, LogprobsCall& c, Outputs& out) {
  r.call(c, 2);
  PyObject* ids = r.next();
  c.n_ids = c.vocab_size;
  if (ids != Py_None) {
    dlpack::Tensor t;
    if (r.view(ids, t) && r.need(t.ndim == 2)) c.ids = r.tensor<int64_t>(ids, kInt64, {c.rows, c.n_ids = t.shape[1]});
  }
  c.scores = r.boolean();
  r.need(!c.scores || !c.ids);
  if (!r.done()) return false;
  c.out = out.make<float>(true, r.device, kFloat32, {c.rows, c.n_ids});
  return true;
}

// attach(torch.Tensor, torch.nn.Parameter): before any other call
inline PyObject* attach(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 2 || !PyType_Check(args[0]) || !PyType_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "expected two types");
    return nullptr;
  }
  PyObject* capsule = PyObject_GetAttrString(args[0], "__dlpack_c_exchange_api__");
  if (!capsule) return nullptr;
  api = static_cast<const dlpack::ExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DecRef(capsule);
  if (!api) return nullptr;
  if (api->version.major != 1 || !api->tensor_from_object) {
    PyErr_Format(PyExc_AttributeError, "tensors by DLPack %u", api->version.major);
    return nullptr;
  }
  is_neg = PyObject_GetAttrString(args[0], "is_neg");
  if (!is_neg) return nullptr;
  tensor_type = reinterpret_cast<PyTypeObject*>(args[0]);
  parameter_type = reinterpret_cast<PyTypeObject*>(args[1]);
  Py_IncRef(args[0]);
  Py_IncRef(args[1]);
  Py_RETURN_NONE;
}

// set_poison(bool): for tests
inline PyObject* set_poison(PyObject*, PyObject* on) {
  poison = on == Py_True;
  Py_RETURN_NONE;
}

#define EFT_FAST(f) reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)), METH_FASTCALL

}  // namespace eft::bindings
