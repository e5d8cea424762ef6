#include "aio/bind_engine.h"

#include <fcntl.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <utility>

#include "aio/bind_gil.h"
#include "aio/bind_wait.h"
#include "aio/error.h"
#include "aio/python_errors.h"

namespace offload::aio {
namespace {

constexpr unsigned kMaxQueueDepth = 4096;
constexpr unsigned kMaxThreads = 256;
constexpr uint64_t kMinSegment = 4096;
constexpr uint64_t kMaxSegment = 1ULL << 30;  // an io_uring length has 32 bits

struct ReleaseOnExit {
  ReleaseList& list;
  ~ReleaseOnExit() noexcept { list.release_all(); }
};

// Shared, so that close() does not pull the engine from under another thread's submit(), which
// may then be the last owner and hold the GIL. In a forked child the threads to join do not
// exist: there the engine is left alone.
std::shared_ptr<Engine> owned(std::unique_ptr<Engine> engine) {
  return {engine.release(), [](Engine* last) {
            std::unique_ptr<Engine> owner(last);
            if (owner->forked()) {
              (void)owner.release();
            } else if (PyGILState_Check() != 0) {
              const GilReleased no_gil;
              owner.reset();
            }
          }};
}

}  // namespace

PyEngine::PyEngine(const std::string& name, unsigned queue_depth, uint64_t segment_nbytes,
                   unsigned threads, bool direct)
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
  const GilReleased no_gil;
  Engine::MakeLane make_lane;
  if (name == "uring") {
    queue_depth_ = queue_depth;
    make_lane = [=] { return make_uring_lane(queue_depth, segment_nbytes); };
  } else if (name == "threads") {
    queue_depth_ = threads;
    make_lane = [=] { return make_threads_lane(threads, segment_nbytes); };
  } else {
    throw std::invalid_argument("no engine is called '" + name + "'; there are uring and threads");
  }
  name_ = name;
  engine_ = owned(std::make_unique<Engine>(std::move(make_lane)));
}

PyEngine::~PyEngine() noexcept {
  {
    const GilReleased no_gil;
    engine_.reset();  // finishes what is in flight
  }
  releases_->release_all();
}

PyFile PyEngine::open(const py::object& path, const std::string& mode, std::optional<int> dir_fd) {
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
    const GilReleased no_gil;
    file = engine->open(std::move(encoded), parsed, dir_fd.value_or(AT_FDCWD), direct_);
  }
  if (file->spares_cache()) {
    py::module_::import("offload.aio.failures")
        .attr("warn_buffered")(decode_path(file->path()), file->device());
  }
  return PyFile(std::move(file));
}

PyRequest PyEngine::submit(const std::string& op_name, const PyFile& file, const py::object& buffer,
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
    throw StateError(file.file()->path() + " is open for reading; open it with mode 'r+' to write");
  }
  const GilReleased no_gil;
  auto request = std::make_shared<Request>(op, File::Pin(file.file()), address,
                                           static_cast<uint64_t>(file_offset),
                                           static_cast<uint64_t>(asked), std::move(loan));
  engine->submit(request);
  return PyRequest(std::move(request), releases_);
}

void PyEngine::sync(const PyFile& file) {
  const std::shared_ptr<Engine> engine = usable_engine();
  releases_->release_all();
  const GilReleased no_gil;
  aio::sync(file.file());
}

void PyEngine::close() {
  if (engine_ && !engine_->forked()) {
    const std::shared_ptr<Engine> engine = engine_;
    wait_interruptibly(std::nullopt, [&](auto slice) { return engine->drain(slice); });
  }
  std::shared_ptr<Engine> last = std::move(engine_);
  {
    const GilReleased no_gil;
    last.reset();
  }
  releases_->release_all();
}

std::shared_ptr<Engine> PyEngine::usable_engine() const {
  if (!engine_) throw StateError("the I/O engine is closed; open another");
  engine_->check_process();
  return engine_;
}

void bind_engine(py::module_& m) {
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
}

}  // namespace offload::aio
