#pragma once
// How a request or a reply of any length crosses a channel of fixed-size messages: cut into slots on one side, put
// together on the other. Knows nothing of what the bytes mean.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kv {

/// Whose request or reply it is. Sessions are numbered from 1 and no number is used twice, so the reply to a client
/// that has hung up cannot reach another one.
struct address {
  std::uint64_t session = 0;
  std::uint64_t request = 0;  ///< position among the requests of the session

  bool operator==(const address&) const = default;
};

/// A piece of a message: what a channel carries. Four cache lines, of which short requests use one or two.
struct slot {
  static constexpr std::size_t size = 256;
  static constexpr std::size_t room = size - 24;

  address to;
  std::uint32_t total;   ///< bytes of the whole message
  std::uint16_t length;  ///< bytes of it in this slot
  std::uint8_t first;    ///< 1: a message begins here
  std::uint8_t last;     ///< 1: a message ends here
  std::array<char, room> bytes;
};
static_assert(sizeof(slot) == slot::size, "a slot has no padding and fills whole cache lines");

struct message {
  address to;
  std::string bytes;
};

/// Appends the slots of one message. They must reach the channel in this order with nothing between them.
inline void cut(address to, std::string_view bytes, std::vector<slot>& out) {
  const auto total = static_cast<std::uint32_t>(bytes.size());
  bool first = true;
  do {
    const auto piece = bytes.substr(0, slot::room);
    bytes.remove_prefix(piece.size());
    auto& next = out.emplace_back();
    next.to = to;
    next.total = total;
    next.length = static_cast<std::uint16_t>(piece.size());
    next.first = first;
    next.last = bytes.empty();
    std::memcpy(next.bytes.data(), piece.data(), piece.size());
    first = false;
  } while (!bytes.empty());
}

/// Puts messages together again. It believes nothing: another process wrote the slots.
class assembler {
 public:
  /// No request and no reply is longer (resp::limits, store::max_reply).
  static constexpr std::size_t max_message = 8 * 1024 * 1024;

  /// The message that `piece` completes, if it does. Throws std::runtime_error when the slots make no message.
  std::optional<message> add(const slot& piece) {
    if (piece.first) begin(piece);
    check(piece);
    message_.bytes.append(piece.bytes.data(), piece.length);
    if (!piece.last) return std::nullopt;
    if (message_.bytes.size() != total_) broken("ends early");
    open_ = false;
    return std::exchange(message_, {});
  }

 private:
  void begin(const slot& piece) {
    if (open_) broken("begins inside another one");
    if (piece.total > max_message) broken("is too long");
    message_.to = piece.to;
    message_.bytes.reserve(piece.total);
    total_ = piece.total;
    open_ = true;
  }

  void check(const slot& piece) const {
    if (!open_) broken("has no beginning");
    if (piece.to != message_.to || piece.total != total_) broken("is mixed with another one");
    if (piece.length > slot::room || piece.length > total_ - message_.bytes.size()) broken("is longer than it says");
  }

  [[noreturn]] static void broken(const char* how) {
    throw std::runtime_error(std::string("the channel holds a message that ") + how);
  }

  message message_;
  std::size_t total_ = 0;
  bool open_ = false;
};

}  // namespace kv
