// Which two CPUs the ends run on, and what lies between them.
#pragma once

#include <string>

namespace bench {

struct placement {
  unsigned producer = 0;
  unsigned consumer = 0;
  /// For people: "different cores, same L3".
  std::string words;
  [[nodiscard]] bool one_cpu() const noexcept { return producer == consumer; }
};

/// Of the CPUs that this process may use: two cores that share their last cache where there are two such, else two
/// cores, else two siblings of one core, else the only CPU twice.
[[nodiscard]] placement choose_placement();

/// Pins the calling thread, and what it starts from then on.
void pin_to(unsigned cpu);

}  // namespace bench
