#include "../subject.hpp"
namespace bench {
subject strait_subject() {
  return {.name = "strait",
          .connect = [](const job&) -> link { return {}; },
          .run = [](end&) { throw std::runtime_error{"not yet"}; }};
}
}  // namespace bench
