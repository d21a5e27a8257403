// Awaiting where there is no coroutine and no hub.
#pragma once

#include <optional>
#include <type_traits>
#include <utility>
#include <variant>

namespace test {

/// What an awaited operation yields if it can go on now; for one that yields nothing, `std::monostate`.
template <class Operation>
auto attempt(Operation operation) {
  auto awaiter = std::move(operation).operator co_await();
  using result = decltype(awaiter.await_resume());
  using yielded = std::conditional_t<std::is_void_v<result>, std::monostate, result>;
  if (!awaiter.await_ready()) return std::optional<yielded>{};
  if constexpr (std::is_void_v<result>) {
    awaiter.await_resume();
    return std::optional<yielded>{std::in_place};
  } else {
    return std::optional<yielded>{awaiter.await_resume()};
  }
}

}  // namespace test
