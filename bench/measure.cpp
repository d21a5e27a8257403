#include "measure.hpp"

#include <time.h>

#include <algorithm>
#include <cmath>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bench {

summary summarise(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return {.median = n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2,
          .min = values.front(),
          .max = values.back()};
}

double percentile(const std::vector<double>& sorted, double share) {
  const double rank = std::ceil(share * static_cast<double>(sorted.size()));
  const auto index = rank < 1 ? std::size_t{0} : static_cast<std::size_t>(rank) - 1;
  return sorted[std::min(index, sorted.size() - 1)];
}

std::uint64_t tick_clock::monotonic_ns() noexcept {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

tick_clock tick_clock::calibrate() {
#if defined(__x86_64__)
  // CPUID 8000'0007h, EDX bit 8: the TSC runs at one rate in all power states (Intel SDM volume 3, 18.17.1).
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid(0x80000007, &a, &b, &c, &d) != 0 && (d & (1U << 8)) != 0) {
    const std::uint64_t ns_before = monotonic_ns();
    const std::uint64_t before = __builtin_ia32_rdtsc();
    const timespec pause{.tv_sec = 0, .tv_nsec = 20'000'000};
    ::nanosleep(&pause, nullptr);
    const std::uint64_t ns_after = monotonic_ns();
    const std::uint64_t after = __builtin_ia32_rdtsc();
    return {true, static_cast<double>(ns_after - ns_before) / static_cast<double>(after - before)};
  }
#endif
  return {false, 1.0};
}

}  // namespace bench
