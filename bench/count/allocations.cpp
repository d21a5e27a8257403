// What an end asks about its own allocations. The counter itself is a library of its own (interpose.cpp).
#include <dlfcn.h>

#include <cstdlib>
#include <new>
#include <stdexcept>

#include <fmt/format.h>

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

void check_allocation_counter() {
  if (find_counter() == nullptr) {
    throw std::runtime_error{"expected the counting malloc to be preloaded, found the ordinary one"};
  }
  const auto check = [](const char* name, void (*allocate_once)()) {
    const std::uint64_t before = allocations_so_far();
    allocate_once();
    const std::uint64_t counted = allocations_so_far() - before;
    if (counted != 1) {
      throw std::runtime_error{
          fmt::format("the allocation counter: expected it to see one call of {}, found {}", name, counted)};
    }
  };
  // volatile: a compiler may otherwise leave out an allocation whose memory nobody uses.
  check("malloc", [] {
    void* volatile block = std::malloc(64);
    std::free(block);
  });
  check("operator new", [] {
    void* volatile block = ::operator new(64);
    ::operator delete(block);
  });
  using allocate = void* (*)(std::size_t);
  using allocate_in_heap = void* (*)(void*, std::size_t);
  using default_heap = void* (*)();
  using give_back = void (*)(void*);
  static const auto mi_malloc = reinterpret_cast<allocate>(::dlsym(RTLD_DEFAULT, "mi_malloc"));
  static const auto mi_heap_malloc = reinterpret_cast<allocate_in_heap>(::dlsym(RTLD_DEFAULT, "mi_heap_malloc"));
  static const auto mi_heap = reinterpret_cast<default_heap>(::dlsym(RTLD_DEFAULT, "mi_heap_get_default"));
  static const auto mi_free = reinterpret_cast<give_back>(::dlsym(RTLD_DEFAULT, "mi_free"));
  // The counting library has mi_malloc itself; what only mimalloc has tells whether mimalloc is here.
  if (mi_heap == nullptr || mi_free == nullptr) return;
  check("mi_malloc", [] { mi_free(mi_malloc(64)); });
  check("mi_heap_malloc", [] { mi_free(mi_heap_malloc(mi_heap(), 64)); });
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
