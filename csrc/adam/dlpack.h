// The part of DLPack that reads tensors of any library: its C structures, as version 1 fixes them.
//
// A library's tensor type has the attribute `__dlpack_c_exchange_api__`, a capsule of the table of
// functions below. They fill a DLTensor in some 20 ns and take no reference; the buffer protocol
// through numpy takes a microsecond and more, and has no bf16.
//
// Source: github.com/dmlc/dlpack, include/dlpack/dlpack.h, version 1.3.
#ifndef OFFLOAD_ADAM_DLPACK_H_
#define OFFLOAD_ADAM_DLPACK_H_

#include <cstdint>

namespace offload::adam::dlpack {

inline constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
inline constexpr const char* kCapsule = "dlpack_exchange_api";
inline constexpr std::uint32_t kMajorVersion = 1;

// Memory that the processor addresses: plain, and pinned for a GPU.
inline constexpr std::int32_t kCpu = 1;
inline constexpr std::int32_t kCudaHost = 3;
inline constexpr std::int32_t kRocmHost = 11;

inline constexpr std::uint8_t kInt = 0;
inline constexpr std::uint8_t kUInt = 1;
inline constexpr std::uint8_t kFloat = 2;
inline constexpr std::uint8_t kBFloat = 4;

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

// What `shape` and `strides` (in elements; null: contiguous) point to belongs to the tensor.
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApiHeader {
  std::uint32_t major;
  std::uint32_t minor;
  ExchangeApiHeader* previous;  // One of an older version, or null.
};

struct ExchangeApi {
  ExchangeApiHeader header;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  // Returns 0; or -1 with a Python exception set. Null where a library has none.
  int (*tensor_from_py_object_no_sync)(void* object, Tensor* out);
  void (*current_work_stream)();
};

}  // namespace offload::adam::dlpack

#endif  // OFFLOAD_ADAM_DLPACK_H_
