#pragma once
// What the chat server and its moderator have in common: the message and the two channels. Include it last: it imports.

#include <strait/asio.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

import strait;

/// A line on its way to the moderator or back. It crosses as bytes, so the text stands in it and is not pointed to.
struct chat_line {
  static constexpr std::size_t room = 500;  // a name and what it says: two inputs of the server

  std::uint64_t number;  ///< no two lines of a server have the same
  std::uint32_t length;
  char text[room];

  /// The next line of this process.
  explicit chat_line(std::string_view said) : chat_line{++last_number, said} {}
  chat_line(std::uint64_t as, std::string_view said)
      : number{as}, length{static_cast<std::uint32_t>(std::min(said.size(), room))}, text{} {
    std::memcpy(text, said.data(), length);
  }
  /// Another process wrote the length: it is not believed.
  std::string_view view() const { return {text, std::min<std::size_t>(length, room)}; }

 private:
  static inline std::uint64_t last_number = 0;
};

/// Compared when an end enters, so that two programs of different age do not misread each other.
template <>
struct strait::message_traits<chat_line> {
  static constexpr std::string_view name = "strait.examples.chat_line";
  static constexpr std::uint32_t version = 1;
};

/// Either process may be the first and then creates the channels, so both name the capacity. What a killed receiver had
/// taken and not released comes again, up to an eighth of the ring: here that is one line, so one number tells.
inline const strait::channel_options moderation{.capacity = 8};

inline std::string said_in(int port) {
  return "posix:strait-chat." + std::to_string(port) + ".said";
}
inline std::string passed_in(int port) {
  return "posix:strait-chat." + std::to_string(port) + ".passed";
}

/// The server's ends, for the chat on `port`: what was said, and what the moderator lets pass.
inline strait::sender<chat_line> open_said(int port) {
  return strait::open_sender<chat_line>(said_in(port), moderation);
}
inline strait::receiver<chat_line> open_passed(int port) {
  return strait::open_receiver<chat_line>(passed_in(port), moderation);
}
