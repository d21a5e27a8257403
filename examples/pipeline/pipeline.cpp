// pipeline: compresses a file to gzip in worker processes. See README.md.

#include <asio.hpp>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>

#include "file.hpp"
#include "process.hpp"

// These import strait, and imports come after all other includes.
#include <strait/asio.hpp>

#include "blocks.hpp"

import strait;

namespace pipeline {
namespace {

/// A worker that dies on a block would die on it again and again.
constexpr unsigned most_replacements = 3;

/// Takes a channel away after its last end. Messages for a receiver who has yet to come keep their channel, and a worker
/// that is killed before it came never will.
class remains {
 public:
  explicit remains(std::string name) : name_(std::move(name)) {}
  remains(remains&& other) noexcept : name_(std::exchange(other.name_, {})) {}
  remains& operator=(remains&& other) noexcept {
    std::swap(name_, other.name_);
    return *this;
  }
  ~remains() {
    if (name_.empty()) return;
    try {
      strait::remove_channel(name_);
    } catch (const std::system_error& error) {
      if (error.code() != std::errc::no_such_file_or_directory) std::fprintf(stderr, "pipeline: %s\n", error.what());
    }
  }

 private:
  std::string name_;
};

/// One worker's place: our ends of its two channels, and the process at the other ends, which may change.
struct place {
  // Destroyed from below: with the process gone we are the last to leave the channels, and that removes them.
  remains blocks_left;
  strait::sender<block> blocks;
  strait::receiver<member> members;
  process worker;
};

class compression {
 public:
  compression(file& input, file& output, std::string run, unsigned workers)
      : input_(input), output_(output), run_(std::move(run)), signals_(context_, SIGCHLD, SIGINT, SIGTERM) {
    // Nobody else has this run's channels: to find them here is an error.
    const strait::channel_options options{.capacity = capacity, .open = strait::open_mode::create};
    for (unsigned i = 0; i < workers; ++i) {
      places_.push_back({remains{blocks_to(run_, i)},
                         strait::open_sender<block>(blocks_to(run_, i), options),
                         strait::open_receiver<member>(members_from(run_, i), options),
                         {}});
    }
  }

  /// Throws what ended it before the file was whole.
  void operator()() {
    for (const auto part : {&compression::read_blocks, &compression::write_members, &compression::watch_workers}) {
      asio::co_spawn(context_, (this->*part)(), [](std::exception_ptr error) {
        if (error) std::rethrow_exception(error);  // out of io_context::run()
      });
    }
    context_.run();
    // All is written: the workers find no more blocks, and end.
    for (auto& at : places_) at.blocks.close();
    // It has nothing to do any more, so it does not matter how it ended.
    for (auto& at : places_) {
      if (at.worker) (void)at.worker.wait();
    }
  }

 private:
  asio::awaitable<void> read_blocks();
  asio::awaitable<void> write_members();
  asio::awaitable<void> watch_workers();
  void start_worker(unsigned i);
  void replace_worker(unsigned i, int status);

  /// Block n goes to the worker in this place and comes back from it, so the order of the file is known in advance.
  unsigned index_of(std::uint64_t number) const { return static_cast<unsigned>(number % places_.size()); }

  file& input_;
  file& output_;
  std::string run_;
  /// Outlives the context, because that destroys the coroutines that use the channels.
  std::vector<place> places_;
  asio::io_context context_{1};
  asio::signal_set signals_;
  unsigned replacements_ = 0;
  bool all_written_ = false;
};

/// The file, block by block, straight into the memory of the channels. Waits where a worker has enough to do; reading
/// blocks the thread, because a file is always ready as far as a reactor can tell.
asio::awaitable<void> compression::read_blocks() {
  for (std::uint64_t number = 0;; ++number) {
    const unsigned i = index_of(number);
    std::error_code died;
    auto room = co_await places_[i].blocks.reserve(1, died);
    // The worker died, which watch_workers sees to; its replacement gets what it left, and then this.
    while (died == strait::errc::peer_died) room = co_await places_[i].blocks.reserve(1, died);
    if (died) throw std::system_error(died, "cannot reach a worker");
    auto& next = room.messages()[0];
    next.number = number;
    next.length = static_cast<std::uint32_t>(input_.read(next.bytes.data(), block::room));
    next.last = next.length < block::room;  // if need be, an empty one
    const bool last = next.last != 0;
    room.commit();
    if (!places_[i].worker) start_worker(i);  // a small file does not need all of them
    if (last) co_return;
  }
}

/// The members, in the order of the file.
asio::awaitable<void> compression::write_members() {
  for (std::uint64_t number = 0;;) {
    auto& from = places_[index_of(number)].members;
    std::error_code died;
    const auto next = co_await from.peek(died);
    if (died == strait::errc::peer_died) continue;
    if (died) throw std::system_error(died, "cannot hear a worker");
    if (next.empty()) throw std::runtime_error("a worker ended before its work did");
    const auto& compressed = next[0];
    bool last = false;
    // A worker that was killed between sending a member and releasing its block leaves the block to its replacement,
    // and the member comes twice.
    if (compressed.number == number) {
      const std::size_t length = compressed.length;
      if (length > member::room) throw std::runtime_error("a worker sent rubbish");
      output_.write(compressed.bytes.data(), length);
      last = compressed.last != 0;
      ++number;
    }
    from.release(1);
    if (last) break;
  }
  all_written_ = true;
  signals_.cancel();  // which is nothing to watch_workers when it has not begun to wait yet: hence the flag
}

/// A death is told by the channels, too. But a worker may die before it enters them, and somebody has to call waitpid.
asio::awaitable<void> compression::watch_workers() {
  while (!all_written_) {
    std::error_code done;
    const int signal = co_await signals_.async_wait(asio::redirect_error(asio::use_awaitable, done));
    if (done) co_return;
    if (signal != SIGCHLD) throw std::runtime_error("interrupted");
    // One signal may stand for several.
    for (unsigned i = 0; i < places_.size(); ++i) {
      if (!places_[i].worker) continue;
      if (const auto status = places_[i].worker.ended()) replace_worker(i, *status);
    }
  }
}

void compression::start_worker(unsigned i) {
  places_[i].worker = process({"--worker", run_, std::to_string(i)});
  std::fprintf(stderr, "pipeline: worker %u is process %d\n", i, static_cast<int>(places_[i].worker.id()));
}

/// The new one takes the same two channels and goes on where the old one was.
void compression::replace_worker(unsigned i, int status) {
  std::fprintf(stderr, "pipeline: worker %u ended with status %d\n", i, status);
  if (++replacements_ > most_replacements) throw std::runtime_error("too many workers died");
  start_worker(i);
}

/// The output while it is not whole. Removed, unless `keep` gave it its name.
class draft {
 public:
  draft(std::string path, const std::string& input) : path_(std::move(path)), part_(path_ + ".part") {
    // A device or a pipe cannot be replaced by a file.
    const auto there = std::filesystem::status(path_);
    if (std::filesystem::exists(there) && !std::filesystem::is_regular_file(there)) {
      throw std::runtime_error(path_ + " is there and is not a regular file");
    }
    if (std::filesystem::exists(there) && std::filesystem::equivalent(path_, input)) {
      throw std::runtime_error(path_ + " is the input");
    }
    out.emplace(part_, O_WRONLY | O_CREAT | O_TRUNC);
  }
  draft(const draft&) = delete;
  draft& operator=(const draft&) = delete;
  ~draft() {
    if (out) ::unlink(part_.c_str());
  }

  void keep() {
    out->close();
    std::filesystem::rename(part_, path_);
    out.reset();
  }

  std::optional<file> out;

 private:
  std::string path_;
  std::string part_;
};

int compress(const std::string& from, const std::string& to, unsigned workers) {
  file input(from, O_RDONLY);
  draft output(to, from);
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  compression(input, *output.out, std::to_string(::getpid()) + "." + std::to_string(now), workers)();
  output.keep();
  return 0;
}

bool to_number(std::string_view text, unsigned& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc{} && end == text.data() + text.size();
}

int run(const std::vector<std::string>& arguments) {
  unsigned number = std::clamp(std::thread::hardware_concurrency(), 1U, 64U);
  const auto count = arguments.size();
  // The program starts itself again like so; people have no use for it.
  if (count == 3 && arguments[0] == "--worker" && to_number(arguments[2], number))
    return run_worker(arguments[1], number);
  if (count == 2 ||
      (count == 4 && arguments[2] == "--workers" && to_number(arguments[3], number) && number >= 1 && number <= 64)) {
    return compress(arguments[0], arguments[1], number);
  }
  std::fprintf(stderr,
               "usage: pipeline INPUT OUTPUT [--workers N]\n"
               "\n"
               "Compresses INPUT to the gzip file OUTPUT in N worker processes (1 to 64; default: one a CPU).\n");
  return 2;
}

}  // namespace
}  // namespace pipeline

int main(int argc, char** argv) {
  try {
    return pipeline::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pipeline: %s\n", error.what());
    return 1;
  }
}
