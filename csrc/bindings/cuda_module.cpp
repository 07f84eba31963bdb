// eft_kernels._cuda: the CUDA kernels as a Python module. No header of CUDA's: kernels.h is the boundary.
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED  // free-threaded Python has no limited API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <cstring>

#include "../cuda/kernels.h"
#include "arguments.h"

namespace {

using namespace eft;
using namespace eft::bindings;

#ifdef EFT_SIMT  // for tests: the kernels run on the host, and tensors are there
constexpr bool kSimt = true;
constexpr int32_t kDeviceType = dlpack::kCPU;
#else
constexpr bool kSimt = false;
constexpr int32_t kDeviceType = dlpack::kCUDA;
#endif
constexpr int64_t kAlignment = 256;

// Memory of a call's own. It may be released as soon as the launches are enqueued: torch gives it to nothing but what
// comes after them on the same stream.
class Scratch {
 public:
  ~Scratch() {
    if (managed_) managed_->deleter(managed_);
  }
  bool allocate(dlpack::Device device, int64_t bytes) {
    if (bytes <= 0) return true;
    managed_ = bindings::allocate(device, kUint8, {bytes + kAlignment - 1});
    if (!managed_) return false;
    const auto at = reinterpret_cast<uintptr_t>(address(managed_->tensor));
    data_ = reinterpret_cast<void*>((at + kAlignment - 1) & ~static_cast<uintptr_t>(kAlignment - 1));
    if (kSimt && poison) memset(data_, 0xFF, bytes);
    return true;
  }
  void* data() const { return data_; }

 private:
  dlpack::Managed* managed_ = nullptr;
  void* data_ = nullptr;
};

// Each takes counters (an int32 tensor of zeros [at least 2 * rows * slots] that nothing else uses while the launches
// run), then what prepare() reads. It returns a tuple of tensors (None: not asked for) that the device may not have
// written yet, or None where an argument is unusual. The device is the current one, the stream torch's current one.
template <class C>
PyObject* run(const char* name, PyObject* const* args, Py_ssize_t n, int64_t (*scratch_bytes)(const C&, int),
              const char* (*launch)(const C&, const Place&)) {
  Reader r(args, n, kDeviceType);
  C call{};
  PyObject* zeros = r.next();
  Outputs outputs;
  if (!prepare(r, call, outputs)) Py_RETURN_NONE;
  dlpack::Tensor counters;
  if (!r.view(zeros, counters) || !(counters.dtype == kInt32) || counters.ndim != 1 ||
      counters.shape[0] < 2 * call.rows * call.slots || (counters.strides[0] != 1 && counters.shape[0] > 1))
    Py_RETURN_NONE;
  if (outputs.failed()) return nullptr;
  if (call.rows) {
    Place place{r.device.id, nullptr, nullptr, static_cast<unsigned*>(counters.data)};
    if (!kSimt && api->current_stream(kDeviceType, place.device, &place.stream)) return nullptr;
    Scratch scratch;
    if (!scratch.allocate(r.device, scratch_bytes(call, place.device))) return nullptr;
    place.scratch = scratch.data();
    if (const char* error = launch(call, place)) {
      PyErr_Format(PyExc_RuntimeError, "eft_kernels: CUDA, %s: %s", name, error);
      return nullptr;
    }
  }
  return outputs.tuple();
}

PyObject* sample(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return run("sample", args, n, cuda_kernels().sample_scratch, cuda_kernels().sample);
}
PyObject* verify(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return run("verify", args, n, cuda_kernels().verify_scratch, cuda_kernels().verify);
}
PyObject* logprobs(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return run("logprobs", args, n, cuda_kernels().logprobs_scratch, cuda_kernels().logprobs);
}

// unusable(device index): why that device cannot run the kernels, or None
PyObject* unusable(PyObject*, PyObject* index) {
  const long device = PyLong_AsLong(index);
  if (device == -1 && PyErr_Occurred()) return nullptr;
  if (const char* why = cuda_kernels().unusable(static_cast<int>(device))) return PyUnicode_FromString(why);
  Py_RETURN_NONE;
}

// set_launch_config(its fields): LaunchConfig of cuda/launch_config.h, for measurements and tests
PyObject* set_launch_config(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Reader r(args, n, kDeviceType);
  int values[6];
  for (int& x : values) x = static_cast<int>(r.integer(0, INT32_MAX));
  if (r.unusual || n != 6 || values[1] == 0) {
    PyErr_SetString(PyExc_ValueError, "expected six integers >= 0, the second above 0");
    return nullptr;
  }
  cuda_kernels().set_launch_config(values[0], values[1], values[2], values[3], values[4], values[5]);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"sample", EFT_FAST(sample), nullptr},
                         {"verify", EFT_FAST(verify), nullptr},
                         {"logprobs", EFT_FAST(logprobs), nullptr},
                         {"attach", EFT_FAST(attach), nullptr},
                         {"unusable", unusable, METH_O, nullptr},
                         {"set_launch_config", EFT_FAST(set_launch_config), nullptr},
#ifdef EFT_SIMT
                         {"set_poison", set_poison, METH_O, nullptr},
#endif
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// The attribute `simt`: whether this is the build for tests.
PyMODINIT_FUNC PyInit__cuda() {
  PyObject* m = PyModule_Create(&module);
  if (m && PyModule_AddObjectRef(m, "simt", kSimt ? Py_True : Py_False)) {
    Py_DecRef(m);
    return nullptr;
  }
  return m;
}
