// The rounds of asio/ready-await and task/ready-await: a block of messages is put into the channel and then taken out,
// so that everything that is awaited is ready.
#pragma once

#include <algorithm>

#include "../subject.hpp"

namespace bench {

/// How many messages go in and out together when `left` are left, warm-up included, of which `counted` count. Fewer
/// than any channel here has room for; no block holds both kinds.
[[nodiscard]] constexpr std::uint64_t ready_block(std::uint64_t left, std::uint64_t counted) noexcept {
  return std::min<std::uint64_t>(left > counted ? left - counted : left, 512);
}

/// asio/ready-await, the same for strait and for Asio's channel: messages are put into the channel without being timed,
/// and what is timed are the awaits that take them out again.
template <class M>
class ready_rounds {
 public:
  explicit ready_rounds(end& self) noexcept : self_{self} {}

  /// The next round; reports the one before. False: no more.
  [[nodiscard]] bool next() {
    round_ = self_.next_round();
    if (!round_) return false;
    out.spoil(self_.fault());
    left_ = round_.warm_up + round_.messages;
    return true;
  }
  /// How many messages the next block has; 0: the round is over.
  [[nodiscard]] std::uint64_t block() {
    if (left_ == round_.messages) {
      self_.begin();
      spent_ = 0;
    }
    if (left_ == 0) {
      self_.done();
      self_.report_time(spent_);
      return 0;
    }
    const std::uint64_t next = ready_block(left_, round_.messages);
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
