// The part of DLPack's C exchange interface (version 1) that a caller needs: tensors in and out of Python objects
// without a header of the framework's. Layouts: https://github.com/dmlc/dlpack, include/dlpack/dlpack.h.
#pragma once
#include <cstdint>

namespace eft::dlpack {

enum : int32_t { kCPU = 1, kCUDA = 2 };
enum : uint8_t { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
  bool operator==(const DataType& o) const { return code == o.code && bits == o.bits && lanes == o.lanes; }
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;  // strides in elements
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct Managed {
  Version version;
  void* manager;
  void (*deleter)(Managed*);
  uint64_t flags;
  Tensor tensor;
};
struct ExchangeAPI {
  Version version;
  ExchangeAPI* previous;
  int (*allocate)(Tensor* prototype, Managed** out, void* context, void (*set_error)(void*, const char*, const char*));
  int (*managed_from_object)(void* object, Managed** out);
  int (*object_from_managed)(Managed* tensor, void** object);
  int (*tensor_from_object)(void* object, Tensor* out);  // borrowed, no synchronisation; may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace eft::dlpack
