// The rounds of asio/ready-await, the same for strait and for Asio's channel: blocks of messages are put into the
// channel without being timed, and what is timed are the awaits that take them out again.
#pragma once

#include <algorithm>

#include "../subject.hpp"

namespace bench {

template <class M>
class ready_rounds {
 public:
  explicit ready_rounds(end& self) noexcept : self_{self} {}

  /// The next round; reports the one before. False: no more.
  [[nodiscard]] bool next() {
    round_ = self_.next_round();
    if (!round_) return false;
    out.spoil(self_.fault());
    left_ = round_.messages;
    spent_ = 0;
    return true;
  }
  /// How many messages the next block has; 0: the round is over.
  [[nodiscard]] std::uint64_t block() {
    const std::uint64_t next = std::min<std::uint64_t>(left_, 512);
    if (next == 0) self_.report_time(spent_);
    left_ -= next;
    return next;
  }
  void start() noexcept { started_ = tick_clock::monotonic_ns(); }
  void stop() noexcept { spent_ += tick_clock::monotonic_ns() - started_; }

  source<M> out;
  checker<M> in;

 private:
  end& self_;
  end::round round_;
  std::uint64_t left_ = 0;
  std::uint64_t spent_ = 0;
  std::uint64_t started_ = 0;
};

}  // namespace bench
