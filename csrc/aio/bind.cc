// The Python face of the engines: arguments, buffers and the GIL.

#include <fcntl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "aio/crc32c.h"
#include "aio/engine.h"
#include "aio/error.h"
#include "aio/held_buffer.h"
#include "aio/python_errors.h"

namespace py = pybind11;

namespace offload::aio {
namespace {

// How long a wait goes without a look for Ctrl-C.
constexpr std::chrono::milliseconds kSlice{100};

constexpr unsigned kMaxQueueDepth = 4096;
constexpr unsigned kMaxThreads = 256;
constexpr uint64_t kMinSegment = 4096;
constexpr uint64_t kMaxSegment = 1ULL << 30;  // an io_uring length has 32 bits

// Call `step` (without the GIL, at most kSlice long) until it returns true; false when `timeout_s`
// has passed first. Ctrl-C ends it with KeyboardInterrupt.
template <typename Step>
bool wait_interruptibly(std::optional<double> timeout_s, Step step) {
  using Clock = std::chrono::steady_clock;
  // A century is as good as for ever and does not overflow the clock.
  constexpr double kForever_s = 100.0 * 365 * 86400;
  if (timeout_s && std::isnan(*timeout_s)) throw py::value_error("timeout_s is not a number");
  const std::chrono::duration<double> allowed(
      std::clamp(timeout_s.value_or(kForever_s), 0.0, kForever_s));
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(allowed);
  for (;;) {
    {
      const py::gil_scoped_release no_gil;
      const Clock::duration left = std::max(deadline - Clock::now(), Clock::duration::zero());
      if (step(std::min<std::chrono::nanoseconds>(left, kSlice))) return true;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (Clock::now() >= deadline) return false;
  }
}

class PyFile {
 public:
  explicit PyFile(std::shared_ptr<File> file) noexcept : file_(std::move(file)) {}
  PyFile(PyFile&&) noexcept = default;
  PyFile& operator=(PyFile&&) = delete;
  ~PyFile() noexcept {
    if (!file_) return;
    const py::gil_scoped_release no_gil;  // the last owner closes the descriptors
    file_.reset();
  }

  const std::shared_ptr<File>& file() const noexcept { return file_; }

  void close() {
    wait_interruptibly(std::nullopt, [this](auto slice) { return file_->close(slice); });
  }

 private:
  std::shared_ptr<File> file_;
};

class PyRequest {
 public:
  PyRequest(std::shared_ptr<Request> request, std::shared_ptr<ReleaseList> releases) noexcept
      : request_(std::move(request)), releases_(std::move(releases)) {}

  uint64_t wait(std::optional<double> timeout_s) {
    if (!wait_interruptibly(timeout_s, [this](auto slice) { return request_->wait_for(slice); })) {
      set_error(py::module_::import("offload.aio.failures")
                    .attr("timeout_error")(request_->op() == Op::kRead ? "read" : "write",
                                           decode_path(request_->path()), *timeout_s,
                                           py::arg("offset_bytes") = request_->offset(),
                                           py::arg("asked_nbytes") = request_->nbytes()));
      throw py::error_already_set();
    }
    releases_->release_all();
    return request_->result();
  }

  bool done() const {
    releases_->release_all();
    return request_->done();
  }

  bool cancel() {
    bool cancelled = false;
    {
      const py::gil_scoped_release no_gil;
      cancelled = request_->cancel();
    }
    releases_->release_all();
    return cancelled;
  }

  // Seconds on the clock of time.perf_counter(), which is the steady clock on Linux.
  std::optional<double> finished_s() const {
    if (!request_->done()) return std::nullopt;
    return std::chrono::duration<double>(request_->finished_at().time_since_epoch()).count();
  }

 private:
  std::shared_ptr<Request> request_;
  std::shared_ptr<ReleaseList> releases_;
};

struct ReleaseOnExit {
  ReleaseList& list;
  ~ReleaseOnExit() noexcept { list.release_all(); }
};

class PyEngine {
 public:
  PyEngine(const std::string& name, unsigned queue_depth, uint64_t segment_nbytes, unsigned threads,
           bool direct)
      : direct_(direct), releases_(std::make_shared<ReleaseList>()) {
    if (queue_depth < 1 || queue_depth > kMaxQueueDepth) {
      throw py::value_error("queue_depth must be 1 to 4096, not " + std::to_string(queue_depth));
    }
    if (threads < 1 || threads > kMaxThreads) {
      throw py::value_error("threads must be 1 to 256, not " + std::to_string(threads));
    }
    if (segment_nbytes < kMinSegment || segment_nbytes > kMaxSegment ||
        segment_nbytes % kMinSegment != 0) {
      throw py::value_error("segment_nbytes must be a multiple of 4096 up to 1 GiB, not " +
                            std::to_string(segment_nbytes));
    }
    const py::gil_scoped_release no_gil;
    Engine::MakeLane make_lane;
    if (name == "uring") {
      queue_depth_ = queue_depth;
      make_lane = [=] { return make_uring_lane(queue_depth, segment_nbytes); };
    } else if (name == "threads") {
      queue_depth_ = threads;
      make_lane = [=] { return make_threads_lane(threads, segment_nbytes); };
    } else {
      throw std::invalid_argument("no engine is called '" + name +
                                  "'; there are uring and threads");
    }
    name_ = name;
    engine_ = owned(std::make_unique<Engine>(std::move(make_lane)));
  }

  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;

  ~PyEngine() noexcept {
    {
      const py::gil_scoped_release no_gil;
      engine_.reset();  // finishes what is in flight
    }
    releases_->release_all();
  }

  const std::string& name() const noexcept { return name_; }
  unsigned queue_depth() const noexcept { return queue_depth_; }

  PyFile open(const py::object& path, const std::string& mode, std::optional<int> dir_fd) {
    const std::shared_ptr<Engine> engine = usable_engine();
    Mode parsed = Mode::kRead;
    if (mode == "r+") {
      parsed = Mode::kReadWrite;
    } else if (mode == "x+") {
      parsed = Mode::kCreate;
    } else if (mode != "r") {
      throw py::value_error("mode must be 'r', 'r+' or 'x+', not '" + mode + "'");
    }
    std::string encoded = encode_path(path);
    std::shared_ptr<File> file;
    {
      const py::gil_scoped_release no_gil;
      file = engine->open(std::move(encoded), parsed, dir_fd.value_or(AT_FDCWD), direct_);
    }
    if (file->spares_cache()) {
      py::module_::import("offload.aio.failures")
          .attr("warn_buffered")(decode_path(file->path()), file->device());
    }
    return PyFile(std::move(file));
  }

  PyRequest submit(const std::string& op_name, const PyFile& file, const py::object& buffer,
                   int64_t file_offset, std::optional<int64_t> nbytes) {
    std::shared_ptr<Engine> engine = usable_engine();
    // Runs last, with the GIL: also when the request is refused after its buffer was taken.
    const ReleaseOnExit release_on_exit{*releases_};
    if (op_name != "read" && op_name != "write") {
      throw py::value_error("op must be 'read' or 'write', not '" + op_name + "'");
    }
    const Op op = op_name == "read" ? Op::kRead : Op::kWrite;
    if (file_offset < 0) {
      throw py::value_error("file_offset must be >= 0, not " + std::to_string(file_offset));
    }
    auto held = std::make_unique<HeldBuffer>();
    const int flags = op == Op::kRead ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_GetBuffer(buffer.ptr(), &held->view, flags) != 0) throw py::error_already_set();
    auto* const address = static_cast<std::byte*>(held->view.buf);
    const int64_t held_nbytes = held->view.len;
    // From here on the export goes to releases_ on every way out.
    auto loan = std::make_shared<BufferLoan>(std::move(held), releases_);
    const int64_t asked = nbytes.value_or(held_nbytes);
    if (asked < 0 || asked > held_nbytes) {
      throw py::value_error("nbytes must be 0 to " + std::to_string(held_nbytes) +
                            ", the buffer's size, not " + std::to_string(asked));
    }
    if (file_offset > std::numeric_limits<int64_t>::max() - asked) {
      throw py::value_error("file_offset + nbytes must be below 2^63");
    }
    if (op == Op::kWrite && !file.file()->writable()) {
      throw StateError(file.file()->path() +
                       " is open for reading; open it with mode 'r+' to write");
    }
    const py::gil_scoped_release no_gil;
    auto request = std::make_shared<Request>(op, File::Pin(file.file()), address,
                                             static_cast<uint64_t>(file_offset),
                                             static_cast<uint64_t>(asked), std::move(loan));
    engine->submit(request);
    return PyRequest(std::move(request), releases_);
  }

  void sync(const PyFile& file) {
    const std::shared_ptr<Engine> engine = usable_engine();
    releases_->release_all();
    const py::gil_scoped_release no_gil;
    aio::sync(file.file());
  }

  void close() {
    if (engine_ && !engine_->forked()) {
      const std::shared_ptr<Engine> engine = engine_;
      wait_interruptibly(std::nullopt, [&](auto slice) { return engine->drain(slice); });
    }
    std::shared_ptr<Engine> last = std::move(engine_);
    {
      const py::gil_scoped_release no_gil;
      last.reset();
    }
    releases_->release_all();
  }

 private:
  // Shared, so that close() does not pull the engine from under another thread's submit(), which
  // may then be the last owner and hold the GIL. In a forked child the threads to join do not
  // exist: there the engine is left alone.
  static std::shared_ptr<Engine> owned(std::unique_ptr<Engine> engine) {
    return {engine.release(), [](Engine* last) {
              std::unique_ptr<Engine> owner(last);
              if (owner->forked()) {
                (void)owner.release();
              } else if (PyGILState_Check() != 0) {
                const py::gil_scoped_release no_gil;
                owner.reset();
              }
            }};
  }

  std::shared_ptr<Engine> usable_engine() const {
    if (!engine_) throw StateError("the I/O engine is closed; open another");
    engine_->check_process();
    return engine_;
  }

  std::string name_;
  unsigned queue_depth_ = 0;
  const bool direct_;
  std::shared_ptr<ReleaseList> releases_;
  std::shared_ptr<Engine> engine_;
};

uint32_t py_crc32c(const py::object& buffer, uint32_t seed) {
  HeldBuffer held;
  if (PyObject_GetBuffer(buffer.ptr(), &held.view, PyBUF_SIMPLE) != 0)
    throw py::error_already_set();
  uint32_t crc = 0;
  {
    const py::gil_scoped_release no_gil;
    crc = crc32c(static_cast<const std::byte*>(held.view.buf), static_cast<size_t>(held.view.len),
                 seed);
  }
  PyBuffer_Release(&held.view);
  return crc;
}

}  // namespace
}  // namespace offload::aio

PYBIND11_MODULE(_aio, m) {
  using namespace offload::aio;
  m.doc() = "The io_uring and thread engines, and CRC-32C; see offload.aio.";
  py::register_local_exception_translator(translate);

  py::class_<PyFile>(m, "File", "An open file of a native engine; see offload.aio.File.")
      .def_property_readonly("path",
                             [](const PyFile& self) { return decode_path(self.file()->path()); })
      .def_property_readonly("direct",
                             [](const PyFile& self) { return self.file()->limits().usable; })
      .def_property_readonly("size_nbytes",
                             [](const PyFile& self) {
                               const py::gil_scoped_release no_gil;
                               return size_nbytes(self.file());
                             })
      .def(
          "allocate", [](const PyFile& self, uint64_t nbytes) { allocate(self.file(), nbytes); },
          py::arg("nbytes"), py::call_guard<py::gil_scoped_release>())
      .def("close", &PyFile::close)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](PyFile& self, const py::args&) { self.close(); });

  py::class_<PyRequest>(m, "Request", "A transfer in flight; see offload.aio.Request.")
      .def("wait", &PyRequest::wait, py::arg("timeout_s") = py::none())
      .def("done", &PyRequest::done)
      .def("cancel", &PyRequest::cancel)
      .def_property_readonly("finished_s", &PyRequest::finished_s);

  py::class_<PyEngine>(m, "Engine", "The uring or threads engine; see offload.aio.Engine.")
      .def(py::init<const std::string&, unsigned, uint64_t, unsigned, bool>(), py::arg("name"),
           py::kw_only(), py::arg("queue_depth") = 32, py::arg("segment_nbytes") = 1 << 20,
           py::arg("threads") = 8, py::arg("direct") = true)
      .def_property_readonly("name", &PyEngine::name)
      .def_property_readonly("queue_depth", &PyEngine::queue_depth)
      .def("open", &PyEngine::open, py::arg("path"), py::arg("mode") = "r", py::kw_only(),
           py::arg("dir_fd") = py::none())
      .def("submit", &PyEngine::submit, py::arg("op"), py::arg("file"), py::arg("buffer"),
           py::arg("file_offset"), py::arg("nbytes") = py::none())
      .def("sync", &PyEngine::sync, py::arg("file"))
      .def("close", &PyEngine::close)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](PyEngine& self, const py::args&) { self.close(); });

  m.def("crc32c", &py_crc32c, py::arg("buffer"), py::arg("seed") = 0,
        "CRC-32C of a contiguous buffer, going on from `seed`.");
  m.def("active_isa", &active_isa, "The instruction set crc32c uses: 'sse4.2' or 'scalar'.");
  // For the tests: the reference that the fast ones are held against.
  m.def(
      "_crc32c_scalar",
      [](const py::bytes& data, uint32_t seed) {
        const std::string_view view(data);
        return ~crc32c_scalar(reinterpret_cast<const std::byte*>(view.data()), view.size(), ~seed);
      },
      py::arg("data"), py::arg("seed") = 0);
}
