#pragma once
/// Every memory that a channel can lie in. Test programs that know no memory by name are run once for each
/// (strait_test_over_memories in CMakeLists.txt); STRAIT_TEST_MEMORY says which it is now.
///
/// A new memory needs its word here and in CMakeLists.txt, and a way to have both ends in ends.hpp; if it has names,
/// what lies under them in segment_files.hpp.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

namespace test {

inline constexpr std::array<std::string_view, 5> memories{"private", "posix", "sysv", "file", "unix"};

/// The memory of this run; unsaid, that of the process.
inline std::string_view memory() {
  static const std::string_view chosen = [] {
    const char* said = std::getenv("STRAIT_TEST_MEMORY");
    if (said == nullptr) return memories.front();
    const auto* const found = std::ranges::find(memories, std::string_view{said});
    if (found == memories.end()) {
      std::fprintf(stderr, "STRAIT_TEST_MEMORY: expected one of the memories, found \"%s\"\n", said);
      std::exit(2);
    }
    return *found;
  }();
  return chosen;
}

/// How the names of this run begin; private memory has none, and tests that need names take POSIX ones.
inline std::string_view scheme() {
  static const std::string text = std::string{memory() == "private" ? "posix" : memory()} + ':';
  return text;
}

}  // namespace test
