// What the storms share: chance that is the same in every run.
#pragma once

#include <chrono>
#include <cstdint>

namespace test {

class chance {
 public:
  explicit chance(std::uint64_t seed) : state_{seed * 0x9e37'79b9'7f4a'7c15 + 1} {}
  std::uint64_t below(std::uint64_t limit) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ % limit;
  }
  /// A moment at which an operation may just have gone on, or not.
  std::chrono::nanoseconds moment() { return std::chrono::nanoseconds{below(4) == 0 ? 0 : below(20'000)}; }

 private:
  std::uint64_t state_;
};

}  // namespace test
