#pragma once
// The two channels between gateway and engine: their names, and the name of what they carry.

#include <string>
#include <string_view>

#include "message.hpp"

import strait;

/// Two programs that attach to one channel compare these before they trust each other's bytes. Whoever changes the slot
/// counts the version up.
template <>
struct strait::message_traits<kv::slot> {
  static constexpr std::string_view name = "strait.kv.slot";
  static constexpr std::uint32_t version = 1;
};

namespace kv {

inline std::string requests_of(const std::string& pair) {
  return "posix:strait-kv." + pair + ".requests";
}
inline std::string replies_of(const std::string& pair) {
  return "posix:strait-kv." + pair + ".replies";
}

}  // namespace kv
