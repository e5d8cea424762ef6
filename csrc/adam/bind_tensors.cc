#include "adam/bind_tensors.h"

#include <cmath>
#include <cstdint>
#include <string>

#include "adam/dlpack.h"

namespace offload::adam {
namespace {

using dlpack::DataType;

constexpr DataType kFloat32{dlpack::kFloat, 32, 1};
constexpr DataType kFloat16{dlpack::kFloat, 16, 1};
constexpr DataType kBFloat16{dlpack::kBFloat, 16, 1};
constexpr DataType kInt16{dlpack::kInt, 16, 1};
constexpr DataType kUInt8{dlpack::kUInt, 8, 1};

// fp32 counts to 2^24 and no further.
constexpr float kMostSteps = 16777216.0f;

bool Equal(const DataType& a, const DataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

std::string NameOf(const DataType& type) {
  if (type.code == dlpack::kBFloat) return "bfloat" + std::to_string(type.bits);
  const char* const kinds[] = {"int", "uint", "float"};
  if (type.code > dlpack::kFloat) return "type " + std::to_string(type.code) + " of DLPack";
  return kinds[type.code] + std::to_string(type.bits);
}

std::string ShapeOf(const dlpack::Tensor& tensor) {
  std::string text = "(";
  for (std::int32_t i = 0; i < tensor.ndim; ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.shape[i]);
  }
  return text + ")";
}

bool SameShape(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (std::int32_t i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
  }
  return true;
}

std::size_t NumelOf(const dlpack::Tensor& tensor) {
  std::size_t numel = 1;
  for (std::int32_t i = 0; i < tensor.ndim; ++i) {
    numel *= static_cast<std::size_t>(tensor.shape[i]);
  }
  return numel;
}

bool Contiguous(const dlpack::Tensor& tensor) {
  if (tensor.strides == nullptr || NumelOf(tensor) == 0) return true;
  std::int64_t stride = 1;
  for (std::int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != stride) return false;
    stride *= tensor.shape[i];
  }
  return true;
}

// Reads the tensors of one library, those of the type of the first that is seen.
class Reader {
 public:
  // Where a tensor stands, for messages.
  std::size_t group = 0;
  std::size_t row = 0;

  [[noreturn]] void Refuse(const std::string& what) const {
    throw py::value_error("adamw_tensors: row " + std::to_string(row) + " of group " +
                          std::to_string(group) + ": " + what);
  }

  // Returns a contiguous tensor in memory that the processor addresses.
  dlpack::Tensor Read(const char* name, PyObject* object) {
    if (api_ == nullptr) FindApi(object);
    dlpack::Tensor tensor;
    if (api_->tensor_from_py_object_no_sync(object, &tensor) != 0) {
      const py::error_already_set cause;
      Refuse(std::string(name) + " must be a dense tensor: " + cause.what());
    }
    const std::int32_t device = tensor.device.type;
    if (device != dlpack::kCpu && device != dlpack::kCudaHost && device != dlpack::kRocmHost) {
      Refuse(std::string(name) + " must be on the CPU, got device " + std::to_string(device) +
             " of DLPack");
    }
    if (!Contiguous(tensor)) Refuse(std::string(name) + " must be contiguous");
    const std::size_t itemsize = (tensor.dtype.bits + 7u) / 8u;
    tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % itemsize != 0 && NumelOf(tensor) > 0) {
      Refuse(std::string(name) + " does not begin at a multiple of " + std::to_string(itemsize) +
             " bytes");
    }
    return tensor;
  }

  dlpack::Tensor Read(const char* name, PyObject* object, const DataType& type) {
    const dlpack::Tensor tensor = Read(name, object);
    if (!Equal(tensor.dtype, type)) {
      Refuse(std::string(name) + " must be " + NameOf(type) + ", got " + NameOf(tensor.dtype));
    }
    return tensor;
  }

  // As above, of the shape of `like`.
  void* ReadLike(const char* name, PyObject* object, const DataType& type,
                 const dlpack::Tensor& like) {
    const dlpack::Tensor tensor = Read(name, object, type);
    CheckShape(name, tensor, like);
    return tensor.data;
  }

  void CheckShape(const char* name, const dlpack::Tensor& tensor,
                  const dlpack::Tensor& like) const {
    if (SameShape(tensor, like)) return;
    Refuse(std::string(name) + " must have the shape of the weights, " + ShapeOf(like) + ", got " +
           ShapeOf(tensor));
  }

 private:
  void FindApi(PyObject* object) {
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    const auto capsule =
        py::reinterpret_steal<py::object>(PyObject_GetAttrString(type, dlpack::kAttribute));
    if (!capsule || PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule) == 0) {
      PyErr_Clear();
      Refuse(std::string("the type ") + Py_TYPE(object)->tp_name + " has no " + dlpack::kAttribute +
             "; tensors of torch 2.10 and later have it");
    }
    // The table lives as long as the process.
    const auto* header = static_cast<const dlpack::ExchangeApiHeader*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    while (header != nullptr && header->major != dlpack::kMajorVersion) header = header->previous;
    const auto* const api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
    if (api == nullptr || api->tensor_from_py_object_no_sync == nullptr) {
      Refuse(std::string("the type ") + Py_TYPE(object)->tp_name +
             " offers no tensors of version 1 of DLPack");
    }
    api_ = api;
  }

  const dlpack::ExchangeApi* api_ = nullptr;
};

ElementType GradientType(const Reader& reader, const DataType& type) {
  if (Equal(type, kFloat32)) return ElementType::kFloat32;
  if (Equal(type, kBFloat16)) return ElementType::kBFloat16;
  if (Equal(type, kFloat16)) return ElementType::kFloat16;
  reader.Refuse("gradient must be float32, bfloat16 or float16, got " + NameOf(type));
}

// The scales of n codes, in one dimension.
std::uint16_t* ReadScales(Reader& reader, const char* name, PyObject* object, std::size_t numel) {
  const dlpack::Tensor scales = reader.Read(name, object, kBFloat16);
  if (scales.ndim != 1 || static_cast<std::size_t>(scales.shape[0]) != NumScales(numel)) {
    reader.Refuse(std::string(name) + " must have shape (" + std::to_string(NumScales(numel)) +
                  ",), one for each 128 of the codes, got " + ShapeOf(scales));
  }
  return static_cast<std::uint16_t*>(scales.data);
}

Moment8 ReadMoment8(Reader& reader, const char* codes, const char* scales, PyObject* pair,
                    const dlpack::Tensor& weights) {
  if (PyTuple_Check(pair) == 0 || PyTuple_GET_SIZE(pair) != 2) {
    reader.Refuse("a moment in 8 bits must be a tuple (codes, scales), and so must the other");
  }
  return {static_cast<std::uint8_t*>(
              reader.ReadLike(codes, PyTuple_GET_ITEM(pair, 0), kUInt8, weights)),
          ReadScales(reader, scales, PyTuple_GET_ITEM(pair, 1), NumelOf(weights))};
}

// Returns false where the object is no such number.
template <typename Number>
bool ToNumber(PyObject* object, Number* number) {
  py::detail::make_caster<Number> caster;
  if (!caster.load(object, true)) return false;
  *number = py::detail::cast_op<Number>(caster);
  return true;
}

// A group's settings, and the coefficients of the step that its last tensor was at: as a rule all
// are at the same.
class Coefficients {
 public:
  // (lr, beta1, beta2, eps, weight_decay, grad_scale). Throws as MakeCoefficients does.
  explicit Coefficients(PyObject* settings) {
    double* const fields[] = {&settings_.lr,  &settings_.beta1,        &settings_.beta2,
                              &settings_.eps, &settings_.weight_decay, &settings_.grad_scale};
    bool numbers = PyTuple_Check(settings) != 0 && PyTuple_GET_SIZE(settings) == 6;
    for (Py_ssize_t i = 0; numbers && i < 6; ++i) {
      numbers = ToNumber(PyTuple_GET_ITEM(settings, i), fields[i]);
    }
    if (!numbers) {
      throw py::value_error("adamw_tensors: settings must be a tuple of 6 numbers, got " +
                            std::string(py::repr(settings)));
    }
    At(1);
  }

  const AdamWCoefficients& At(std::int64_t step) {
    if (settings_.step != step) {
      settings_.step = step;
      current_ = MakeCoefficients(settings_);
    }
    return current_;
  }

 private:
  AdamWSettings settings_{};
  AdamWCoefficients current_{};
};

// Returns where a tensor's step is counted: one fp32 number.
float* ReadStep(Reader& reader, PyObject* object) {
  const dlpack::Tensor step = reader.Read("step", object, kFloat32);
  if (NumelOf(step) != 1) reader.Refuse("step must have one element, got " + ShapeOf(step));
  auto* const done = static_cast<float*>(step.data);
  if (*done >= 0 && *done < kMostSteps && std::floor(*done) == *done) return done;
  reader.Refuse("step must be a number of updates below 2^24, got " + std::to_string(*done));
}

// Reads a row (gradient, weights, residual, exp_avg, exp_avg_sq, step, seed).
TensorUpdate ReadUpdate(Reader& reader, PyObject* row, Coefficients& coefficients,
                        std::int64_t step) {
  const auto item = [row](Py_ssize_t index) { return PyTuple_GET_ITEM(row, index); };
  const bool split = item(2) != Py_None;
  const dlpack::Tensor weights = reader.Read("weights", item(1), split ? kBFloat16 : kFloat32);
  const dlpack::Tensor gradient = reader.Read("gradient", item(0));
  const ElementType gradient_type = GradientType(reader, gradient.dtype);
  reader.CheckShape("gradient", gradient, weights);
  auto* const residual = static_cast<std::int16_t*>(
      split ? reader.ReadLike("residual", item(2), kInt16, weights) : nullptr);

  TensorUpdate update{NumelOf(weights), coefficients.At(step), {}};
  if (PyTuple_Check(item(3)) == 0) {
    void* const m = reader.ReadLike("exp_avg", item(3), kFloat32, weights);
    void* const v = reader.ReadLike("exp_avg_sq", item(4), kFloat32, weights);
    update.arrays = AdamWArrays{gradient.data, gradient_type,          weights.data,
                                residual,      static_cast<float*>(m), static_cast<float*>(v)};
    return update;
  }
  const Moment8 m = ReadMoment8(reader, "exp_avg codes", "exp_avg scales", item(3), weights);
  const Moment8 v = ReadMoment8(reader, "exp_avg_sq codes", "exp_avg_sq scales", item(4), weights);
  std::uint64_t seed = 0;
  if (!ToNumber(item(6), &seed)) {
    reader.Refuse("seed is out of range: " + std::string(py::repr(item(6))));
  }
  update.arrays = Noisy8Arrays{{gradient.data, gradient_type, weights.data, residual, m, v},
                               MakeNoise(seed, step, 0)};
  return update;
}

}  // namespace

TensorRows::TensorRows(const py::list& groups) {
  Reader reader;
  for (const py::handle group : groups) {
    if (PyTuple_Check(group.ptr()) == 0 || PyTuple_GET_SIZE(group.ptr()) != 2 ||
        PyList_Check(PyTuple_GET_ITEM(group.ptr(), 0)) == 0) {
      throw py::value_error("adamw_tensors: group " + std::to_string(reader.group) +
                            " must be a tuple of a list of rows and a tuple of settings");
    }
    Coefficients coefficients(PyTuple_GET_ITEM(group.ptr(), 1));
    reader.row = 0;
    for (const py::handle row :
         py::reinterpret_borrow<py::list>(PyTuple_GET_ITEM(group.ptr(), 0))) {
      if (PyTuple_Check(row.ptr()) == 0 || PyTuple_GET_SIZE(row.ptr()) != 7) {
        reader.Refuse("must be a tuple of 7, from gradient to seed, got " +
                      std::string(py::repr(row)));
      }
      // Rows and pairs are tuples: whoever holds one holds its tensors.
      held_.push_back(py::reinterpret_borrow<py::object>(row));
      float* const done = ReadStep(reader, PyTuple_GET_ITEM(row.ptr(), 5));
      updates_.push_back(
          ReadUpdate(reader, row.ptr(), coefficients, static_cast<std::int64_t>(*done) + 1));
      steps_.push_back(done);
      ++reader.row;
    }
    ++reader.group;
  }
}

void TensorRows::CountStep() const noexcept {
  for (float* const step : steps_) *step += 1;
}

}  // namespace offload::adam
