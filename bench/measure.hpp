// From what the rounds gave to the rows of the table.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace bench {

struct summary {
  double median = 0;
  double min = 0;
  double max = 0;
};

/// Of at least one value. The median of an even number of values is the mean of the middle two.
[[nodiscard]] summary summarise(std::vector<double> values);

/// The smallest sample that at least `share` (0 to 1) of all samples do not exceed (nearest rank). `sorted` holds at
/// least one sample, in ascending order.
[[nodiscard]] double percentile(const std::vector<double>& sorted, double share);

/// One row of the table and of the JSON array.
struct row {
  std::string kase;
  std::string subject;
  std::string placement;
  std::string state;
  std::string unit;
  std::optional<double> median = {};
  std::optional<double> min = {};
  std::optional<double> max = {};
  std::optional<double> p50 = {};
  std::optional<double> p99 = {};
  std::optional<double> p999 = {};
  /// The slowest single round trip; in the table only.
  std::optional<double> slowest = {};
  /// Where the channel lies; empty where it is nothing that can be chosen.
  std::string memory = {};
  /// What a bare cache line took to the other CPU and back during the rounds of the case, in ns: the least and the most.
  std::optional<double> line_min = {};
  std::optional<double> line_max = {};
};

/// Ticks of the cheapest clock that never stops: the TSC where it is invariant, CLOCK_MONOTONIC elsewhere.
class tick_clock {
 public:
  /// Finds out how long a tick is; takes some 20 ms where it must be measured.
  [[nodiscard]] static tick_clock calibrate();
  /// For another process of this machine, from what `calibrate` found there.
  tick_clock(bool tsc, double ns_per_tick) noexcept : tsc_{tsc}, ns_per_tick_{ns_per_tick} {}

  [[nodiscard]] std::uint64_t now() const noexcept {
#if defined(__x86_64__)
    if (tsc_) return __builtin_ia32_rdtsc();
#endif
    return monotonic_ns();
  }
  [[nodiscard]] bool tsc() const noexcept { return tsc_; }
  [[nodiscard]] double ns_per_tick() const noexcept { return ns_per_tick_; }

  [[nodiscard]] static std::uint64_t monotonic_ns() noexcept;

 private:
  bool tsc_;
  double ns_per_tick_;
};

}  // namespace bench
