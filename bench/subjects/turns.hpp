// What the subjects of task/switch and task/spawn have in common: work of one thread that proves that it was done.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <exception>

#include "../subject.hpp"

namespace bench {

/// Takes a message where nobody waits for what is thrown: a broken one ends the process, with what is wrong with it
/// where the conductor finds it.
template <class M>
void take_or_end(end& self, checker<M>& in, const M& found) noexcept {
  try {
    in.take(found);
  } catch (const std::exception& problem) {
    self.complain(problem.what());
    ::_exit(1);
  }
}

/// Two sides that take turns: each takes the message that the other left in its last turn, and leaves the next. Of
/// `Side`s that do not take turns one finds its own.
template <class M>
class relay {
 public:
  enum side : unsigned { first, second };

  explicit relay(end& self) noexcept : self_{self} {}

  void begin_round() noexcept {
    out_.spoil(self_.fault());
    ended_ = 0;
  }
  /// One turn.
  void pass(side mine) noexcept {
    if (left_by_ == mine) [[unlikely]] {
      self_.complain("expected the sides to take turns, found one of them twice in a row");
      ::_exit(1);
    }
    take_or_end(self_, in_, message_);
    message_ = out_.next();
    left_by_ = mine;
  }
  /// A side has had all of its turns in this round.
  void end() noexcept { ++ended_; }
  [[nodiscard]] bool both_ended() const noexcept { return ended_ == 2; }

 private:
  bench::end& self_;
  source<M> out_;
  checker<M> in_;
  M message_ = out_.next();
  side left_by_ = second;
  unsigned ended_ = 0;
};

/// Started coroutines or handlers, each with a message that it checks, in blocks: so many are started, and then left to
/// run.
template <class M>
class brood {
 public:
  explicit brood(end& self) noexcept : self_{self} {}

  static constexpr std::uint64_t block = 64;

  void begin_round(std::uint64_t messages) noexcept {
    out_.spoil(self_.fault());
    left_ = messages;
  }
  /// How many to start before they are left to run; 0: the round is over.
  [[nodiscard]] std::uint64_t next_block() noexcept {
    const std::uint64_t next = left_ < block ? left_ : block;
    left_ -= next;
    running_ = next;
    return next;
  }
  [[nodiscard]] M next_message() noexcept { return out_.next(); }
  /// What each of them does.
  void run(const M& message) noexcept {
    take_or_end(self_, in_, message);
    --running_;
  }
  /// Whether all of the block have run.
  [[nodiscard]] bool idle() const noexcept { return running_ == 0; }

 private:
  end& self_;
  source<M> out_;
  checker<M> in_;
  std::uint64_t left_ = 0;
  std::uint64_t running_ = 0;
};

}  // namespace bench
