// What the feed and its subscribers share: two messages and what they are called. See README.md.
#pragma once

#include <cstdint>
#include <string_view>

import strait;

namespace fanout {

/// One price of one symbol. Numbered through, whatever its symbol: a subscriber sees what it missed.
struct tick {
  std::uint64_t number;
  std::uint32_t symbol;
  std::uint32_t price;
  /// How many ticks of its symbols the subscriber missed so far, because its lane was full.
  std::uint64_t missed;
};

/// What a subscriber wants, from now on: the symbols from `first` to `last`.
struct subscription {
  std::uint32_t first;
  std::uint32_t last;
};

inline constexpr std::uint32_t symbols = 16;

}  // namespace fanout

template <>
struct strait::message_traits<fanout::tick> {
  static constexpr std::string_view name = "fanout.tick";
  static constexpr std::uint32_t version = 1;
};
template <>
struct strait::message_traits<fanout::subscription> {
  static constexpr std::string_view name = "fanout.subscription";
  static constexpr std::uint32_t version = 1;
};
