#include "aio/engine.h"

#include <unistd.h>

#include <utility>
#include <vector>

#include "aio/error.h"

namespace offload::aio {

Engine::Engine(MakeLane make_lane)
    : make_lane_(std::move(make_lane)), owner_(::getpid()), spare_(make_lane_()) {}

bool Engine::forked() const noexcept { return ::getpid() != owner_; }

void Engine::check_process() const {
  if (forked()) {
    throw StateError(
        "the I/O engine belongs to the parent of this process; open one after the fork");
  }
}

std::shared_ptr<File> Engine::open(std::string path, Mode mode, int dir_fd, bool try_direct) {
  check_process();
  std::shared_ptr<File> file =
      File::open(std::move(path), mode, dir_fd, try_direct ? &trials_ : nullptr);
  CreatedName name(dir_fd, file->path());
  if (mode != Mode::kCreate) name.keep();
  (void)lane_of(file->device());  // a ring that cannot be had is an error here, not at submit
  name.keep();
  return file;
}

void Engine::submit(std::shared_ptr<Request> request) {
  check_process();
  Lane& lane = lane_of(request->device());
  lane.queue().push(std::move(request));
  lane.wake();
}

Lane& Engine::lane_of(dev_t device) {
  const std::lock_guard lock(mutex_);
  if (closing_) throw StateError("the I/O engine is closed; open another");
  std::unique_ptr<Lane>& lane = lanes_[device];
  if (!lane) lane = spare_ ? std::move(spare_) : make_lane_();
  return *lane;
}

bool Engine::drain(std::chrono::nanoseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  std::vector<Lane*> lanes;  // none goes before the engine does
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    for (const auto& [device, lane] : lanes_) {
      if (lane) lanes.push_back(lane.get());
    }
  }
  for (Lane* const lane : lanes) {
    lane->queue().refuse_new();
    lane->wake();
  }
  for (Lane* const lane : lanes) {
    if (!lane->queue().wait_idle(deadline - std::chrono::steady_clock::now())) return false;
  }
  return true;
}

}  // namespace offload::aio
