// What an end asks about its own allocations. The counter itself is a library of its own (interpose.cpp).
#include <dlfcn.h>

#include "count.hpp"

namespace bench {
namespace {

using counter = std::uint64_t (*)();

counter find_counter() noexcept {
  // Found only in a process that was started with the library preloaded.
  static const auto found = reinterpret_cast<counter>(::dlsym(RTLD_DEFAULT, "strait_bench_allocations"));
  return found;
}

}  // namespace

std::uint64_t allocations_so_far() noexcept {
  const counter count = find_counter();
  return count == nullptr ? 0 : count();
}

bool allocations_counted() noexcept {
  return find_counter() != nullptr;
}

std::uint64_t mimalloc_committed() noexcept {
  // Looked up rather than linked: whether mimalloc is here is the build's choice (STRAIT_MIMALLOC).
  using information = void (*)(std::size_t*, std::size_t*, std::size_t*, std::size_t*, std::size_t*, std::size_t*,
                               std::size_t*, std::size_t*);
  using merge = void (*)();
  static const auto ask = reinterpret_cast<information>(::dlsym(RTLD_DEFAULT, "mi_process_info"));
  static const auto merge_thread = reinterpret_cast<merge>(::dlsym(RTLD_DEFAULT, "mi_stats_merge"));
  if (ask == nullptr) return 0;
  if (merge_thread != nullptr) merge_thread();
  std::size_t elapsed = 0;
  std::size_t user = 0;
  std::size_t system = 0;
  std::size_t rss = 0;
  std::size_t peak_rss = 0;
  std::size_t commit = 0;
  std::size_t peak_commit = 0;
  std::size_t faults = 0;
  ask(&elapsed, &user, &system, &rss, &peak_rss, &commit, &peak_commit, &faults);
  return commit;
}

}  // namespace bench
