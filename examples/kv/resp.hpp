#pragma once
// RESP2, the protocol that Redis speaks (https://redis.io/docs/reference/protocol-spec): requests are read, replies are
// written. Knows nothing of sockets, channels or what a command means.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kv::resp {

/// One request: the command's name and its arguments, any bytes in each.
using command = std::vector<std::string>;

/// What one request may cost us at most, however it is sent.
struct limits {
  std::size_t line = 64 * 1024;           ///< bytes of an inline command, or of a line that announces a length
  std::size_t bulk = 512 * 1024;          ///< bytes of one argument
  std::size_t arguments = 64 * 1024;      ///< arguments of one request
  std::size_t request = 2 * 1024 * 1024;  ///< bytes of all arguments of one request
};

/// The client does not speak RESP. What follows in its stream cannot be understood: answer `what()` and hang up.
class protocol_error : public std::runtime_error {
 public:
  explicit protocol_error(const std::string& what) : std::runtime_error("Protocol error: " + what) {}
};

/// Cuts a stream of bytes, which may arrive in pieces of any size, into requests.
class parser {
 public:
  explicit parser(const limits& limits = {}) : limits_(limits) {}

  /// Appends bytes as they came from the client.
  void feed(std::string_view bytes);

  /// The next complete request, or nothing when more bytes are needed. Throws protocol_error.
  std::optional<command> next();

 private:
  std::optional<std::string_view> take_line();
  void begin_array(std::string_view count);
  bool read_arguments();
  bool read_argument();
  bool read_bulk_length();

  limits limits_;
  std::string buffer_;
  std::size_t position_ = 0;  ///< what lies before it in the buffer is done with

  // The request that is being read.
  command arguments_;
  std::size_t arguments_missing_ = 0;
  std::size_t argument_bytes_ = 0;
  std::optional<std::size_t> bulk_length_;  ///< of the argument whose bytes come next
};

/// Splits an inline command into words as Redis does: "double quotes" know escapes, 'single quotes' only \'.
command split_inline(std::string_view line);

/// A request as a client would send it.
std::string encode(const command& request);

/// The one request in `bytes`, which `encode` made. Throws protocol_error when it is anything else.
command decode(std::string_view bytes);

// Each appends one reply, or the head of one.
void append_simple(std::string& out, std::string_view text);
void append_error(std::string& out, std::string_view text);  ///< `text` begins with its code: "ERR no such thing"
void append_integer(std::string& out, std::int64_t value);
void append_bulk(std::string& out, std::string_view bytes);
void append_null(std::string& out);
void append_array(std::string& out, std::size_t length);  ///< `length` replies must follow

}  // namespace kv::resp
