#include "resp.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <iterator>
#include <utility>

namespace kv::resp {
namespace {

constexpr std::string_view line_end = "\r\n";

std::optional<std::int64_t> to_integer(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

std::optional<int> hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return std::nullopt;
}

/// Reads the words of one inline command.
class word_reader {
 public:
  explicit word_reader(std::string_view line) : rest_(line) {}

  std::optional<std::string> next() {
    while (!rest_.empty() && is_space(rest_.front())) rest_.remove_prefix(1);
    if (rest_.empty()) return std::nullopt;
    std::string word;
    while (!rest_.empty() && !is_space(rest_.front())) {
      const char c = take();
      if (c == '"') {
        read_double_quoted(word);
      } else if (c == '\'') {
        read_single_quoted(word);
      } else {
        word += c;
      }
    }
    return word;
  }

 private:
  char take() {
    if (rest_.empty()) throw protocol_error("unbalanced quotes in request");
    const char c = rest_.front();
    rest_.remove_prefix(1);
    return c;
  }

  void read_double_quoted(std::string& word) {
    for (char c = take(); c != '"'; c = take()) word += c == '\\' ? read_escape() : c;
    expect_end_of_word();
  }

  void read_single_quoted(std::string& word) {
    for (char c = take(); c != '\''; c = take()) word += c == '\\' && rest_.starts_with('\'') ? take() : c;
    expect_end_of_word();
  }

  char read_escape() {
    if (rest_.size() >= 3 && rest_[0] == 'x') {
      const auto high = hex_digit(rest_[1]);
      const auto low = hex_digit(rest_[2]);
      if (high && low) {
        rest_.remove_prefix(3);
        return static_cast<char>(*high * 16 + *low);
      }
    }
    switch (const char c = take()) {
      case 'n':
        return '\n';
      case 'r':
        return '\r';
      case 't':
        return '\t';
      case 'b':
        return '\b';
      case 'a':
        return '\a';
      default:
        return c;
    }
  }

  void expect_end_of_word() const {
    if (!rest_.empty() && !is_space(rest_.front())) throw protocol_error("unbalanced quotes in request");
  }

  std::string_view rest_;
};

}  // namespace

void parser::feed(std::string_view bytes) {
  buffer_.erase(0, position_);
  position_ = 0;
  buffer_.append(bytes);
}

std::optional<command> parser::next() {
  for (;;) {
    if (arguments_missing_ == 0) {
      const auto line = take_line();
      if (!line) return std::nullopt;
      if (line->starts_with('*')) {
        begin_array(line->substr(1));
      } else {
        arguments_ = split_inline(*line);
      }
    }
    if (!read_arguments()) return std::nullopt;
    // An empty line and an empty array ask for nothing and get no answer.
    if (!arguments_.empty()) return std::exchange(arguments_, {});
  }
}

/// The next line without its end, valid until the next `feed`. Like Redis, content with a bare line feed.
std::optional<std::string_view> parser::take_line() {
  const std::string_view rest = std::string_view(buffer_).substr(position_);
  const auto end = rest.find('\n');
  if (std::min(end, rest.size()) > limits_.line) {
    if (arguments_missing_ > 0) throw protocol_error("too big bulk count string");
    throw protocol_error(rest.starts_with('*') ? "too big mbulk count string" : "too big inline request");
  }
  if (end == std::string_view::npos) return std::nullopt;
  position_ += end + 1;
  std::string_view line = rest.substr(0, end);
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line;
}

void parser::begin_array(std::string_view count) {
  const auto length = to_integer(count);
  if (!length || *length > static_cast<std::int64_t>(limits_.arguments)) {
    throw protocol_error("invalid multibulk length");
  }
  arguments_missing_ = static_cast<std::size_t>(std::max<std::int64_t>(*length, 0));
  argument_bytes_ = 0;
}

bool parser::read_arguments() {
  while (arguments_missing_ > 0) {
    if (!read_argument()) return false;
  }
  return true;
}

bool parser::read_argument() {
  if (!bulk_length_ && !read_bulk_length()) return false;
  const std::string_view rest = std::string_view(buffer_).substr(position_);
  if (rest.size() < *bulk_length_ + line_end.size()) return false;
  if (rest.substr(*bulk_length_, line_end.size()) != line_end) throw protocol_error("expected CRLF after bulk");
  arguments_.emplace_back(rest.substr(0, *bulk_length_));
  position_ += *bulk_length_ + line_end.size();
  bulk_length_.reset();
  --arguments_missing_;
  return true;
}

bool parser::read_bulk_length() {
  const auto line = take_line();
  if (!line) return false;
  if (!line->starts_with('$')) {
    throw protocol_error(fmt::format("expected '$', got '{}'", line->empty() ? ' ' : line->front()));
  }
  const auto length = to_integer(line->substr(1));
  if (!length || *length < 0 || *length > static_cast<std::int64_t>(limits_.bulk)) {
    throw protocol_error("invalid bulk length");
  }
  bulk_length_ = static_cast<std::size_t>(*length);
  argument_bytes_ += *bulk_length_;
  if (argument_bytes_ > limits_.request) throw protocol_error("too big request");
  return true;
}

command split_inline(std::string_view line) {
  command words;
  word_reader reader(line);
  while (auto word = reader.next()) words.push_back(std::move(*word));
  return words;
}

std::string encode(const command& request) {
  std::string bytes;
  append_array(bytes, request.size());
  for (const auto& argument : request) append_bulk(bytes, argument);
  return bytes;
}

command decode(std::string_view bytes) {
  parser reader;
  reader.feed(bytes);
  auto request = reader.next();
  if (!request || reader.next()) throw protocol_error("expected exactly one request");
  return std::move(*request);
}

void append_simple(std::string& out, std::string_view text) {
  fmt::format_to(std::back_inserter(out), "+{}\r\n", text);
}

void append_error(std::string& out, std::string_view text) {
  // An error is one line; what it quotes from the client may hold line ends.
  out += '-';
  std::ranges::transform(text, std::back_inserter(out), [](char c) { return c == '\r' || c == '\n' ? ' ' : c; });
  out += line_end;
}

void append_integer(std::string& out, std::int64_t value) {
  fmt::format_to(std::back_inserter(out), ":{}\r\n", value);
}

void append_bulk(std::string& out, std::string_view bytes) {
  fmt::format_to(std::back_inserter(out), "${}\r\n", bytes.size());
  out += bytes;
  out += line_end;
}

void append_null(std::string& out) {
  out += "$-1\r\n";
}

void append_array(std::string& out, std::size_t length) {
  fmt::format_to(std::back_inserter(out), "*{}\r\n", length);
}

}  // namespace kv::resp
