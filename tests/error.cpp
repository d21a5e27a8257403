#include <doctest/doctest.h>

#include <ostream>
#include <set>
#include <string>
#include <system_error>
#include <type_traits>

import strait.error;

namespace {

static_assert(std::is_error_code_enum_v<strait::errc>);

/// Every value, by a switch that the compiler keeps complete: a new error without a line here does not build.
constexpr int last = [] {
  int count = 0;
  for (int value = 1;; ++value, ++count) {
    bool known = false;
    switch (static_cast<strait::errc>(value)) {
      case strait::errc::closed:
      case strait::errc::peer_died:
      case strait::errc::corrupt:
      case strait::errc::unknown_scheme:
      case strait::errc::bad_name:
      case strait::errc::bad_capacity:
      case strait::errc::foreign_segment:
      case strait::errc::truncated_segment:
      case strait::errc::version_mismatch:
      case strait::errc::layout_mismatch:
      case strait::errc::type_mismatch:
      case strait::errc::end_in_use:
      case strait::errc::no_space:
      case strait::errc::no_barrier:
      case strait::errc::no_hub:
      case strait::errc::no_permission:
      case strait::errc::inherited:
        known = true;
    }
    if (!known) return count;
  }
}();

}  // namespace

TEST_CASE("error: every value has a message of its own, in the category strait") {
  CHECK(std::string{strait::error_category().name()} == "strait");
  std::set<std::string> messages;
  for (int value = 1; value <= last; ++value) {
    const std::error_code code = static_cast<strait::errc>(value);
    CAPTURE(value);
    CHECK(code);
    CHECK(&code.category() == &strait::error_category());
    CHECK(code == static_cast<strait::errc>(value));
    CHECK(code.message().size() > 10);
    CHECK(code.message().find("unknown strait error") == std::string::npos);
    CHECK(messages.insert(code.message()).second);
  }
}

TEST_CASE("error: a value that is none of ours says so") {
  CHECK(strait::error_category().message(0) == "unknown strait error 0");
  CHECK(strait::error_category().message(-1) == "unknown strait error -1");
  CHECK(strait::error_category().message(last + 1) == "unknown strait error " + std::to_string(last + 1));
}

TEST_CASE("error: one category, however often it is asked for") {
  CHECK(&strait::error_category() == &strait::error_category());
  CHECK(strait::make_error_code(strait::errc::closed) == std::error_code{strait::errc::closed});
  CHECK(strait::make_error_code(strait::errc::closed) != std::error_code{strait::errc::corrupt});
  // Equal numbers of two categories are two errors.
  CHECK(std::error_code{strait::errc::closed} !=
        std::error_code{static_cast<int>(strait::errc::closed), std::system_category()});
  // Where the standard has a name for it, that name fits; where it has none, none does.
  CHECK(std::error_code{strait::errc::no_permission} == std::errc::permission_denied);
  CHECK(std::error_code{strait::errc::closed} != std::errc::operation_not_permitted);
}

TEST_CASE("error: fail keeps the sentence and the code") {
  try {
    strait::fail(strait::errc::bad_capacity, "posix:orders: expected 1, found 0");
    FAIL("returned");
  } catch (const std::system_error& error) {
    CHECK(error.code() == strait::errc::bad_capacity);
    CHECK(std::string{error.what()}.find("posix:orders: expected 1, found 0") == 0);
    CHECK(std::string{error.what()}.find(error.code().message()) != std::string::npos);
  }
  try {
    strait::fail_errno(2, "posix:orders: opening it");
    FAIL("returned");
  } catch (const std::system_error& error) {
    CHECK(error.code() == std::errc::no_such_file_or_directory);
    CHECK(&error.code().category() == &std::system_category());
    CHECK(std::string{error.what()}.find("posix:orders: opening it") == 0);
  }
}
