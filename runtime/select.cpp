module;
#include <cstdint>
module strait.select;

namespace strait {
namespace {

struct draws {
  std::uint32_t state = 0x9e37'79b9;
  std::uint32_t count = 0;
};
constinit thread_local draws of_this_thread;

}  // namespace

selection_start start_selection(std::uint32_t count) noexcept {
  draws& mine = of_this_thread;
  // Marsaglia's xorshift with 13, 17 and 5. A counter would not do: two selections that take turns would each meet only
  // its odd or its even values.
  mine.state ^= mine.state << 13;
  mine.state ^= mine.state >> 17;
  mine.state ^= mine.state << 5;
  const auto first = static_cast<std::uint32_t>((std::uint64_t{mine.state} * count) >> 32);
  return {first, ++mine.count % ready_budget == 0};
}

}  // namespace strait
