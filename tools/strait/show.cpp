#include "show.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <optional>

import strait.endpoint;
import strait.memory;

namespace tool {
namespace {

using strait::channel_condition;
using strait::channel_state;
using strait::end_state;
using strait::role;

struct decoded {
  char32_t character;
  std::size_t bytes;
};

/// The first character of a text that is not empty; nothing when its first byte does not begin one.
std::optional<decoded> first_character(std::string_view text) {
  const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(text[at]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return decoded{lead, 1};
  const std::size_t length = lead >= 0xf0 && lead < 0xf5   ? 4U
                             : lead >= 0xe0 && lead < 0xf0 ? 3U
                             : lead >= 0xc2 && lead < 0xe0 ? 2U
                                                           : 0U;
  if (length == 0 || text.size() < length) return std::nullopt;
  char32_t character = lead & (0xffU >> (length + 1));
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0U) != 0x80) return std::nullopt;
    character = (character << 6U) | (byte(i) & 0x3fU);
  }
  constexpr std::array<char32_t, 5> least{0, 0, 0x80, 0x800, 0x10000};
  if (character < least[length] || character > 0x10ffff || (character >= 0xd800 && character <= 0xdfff)) {
    return std::nullopt;
  }
  return decoded{character, length};
}

/// Whether the character stands still and can be seen.
bool is_visible(char32_t c) {
  if (c < 0x20 || (c >= 0x7f && c <= 0xa0) || c == 0xad) return false;
  const auto within = [&](char32_t first, char32_t last) { return c >= first && c <= last; };
  // Marks of direction, separators and spaces of no width; private use, tags and what is no character at all.
  return !(within(0x2000, 0x200f) || within(0x2028, 0x202f) || within(0x205f, 0x206f) || within(0xd800, 0xf8ff) ||
           c == 0x061c || c == 0x180e || c == 0xfeff || within(0xfff0, 0xffff) || c >= 0xe0000);
}

std::string_view scheme_of(const channel_state& channel) {
  switch (channel.name.scheme) {
    case strait::memory_scheme::private_memory:
      return "private";
    case strait::memory_scheme::posix:
      return "posix";
    case strait::memory_scheme::system_v:
      return "sysv";
    case strait::memory_scheme::file:
      return "file";
    case strait::memory_scheme::handed_over:
      return "unix";
  }
  return "unknown";
}

std::string_view state_of(const end_state& end) {
  return end.state ? to_string(*end.state) : "corrupt";
}

std::string type_of(const channel_state& channel) {
  if (channel.type.empty()) return fmt::format("unnamed, {} B", channel.message_bytes);
  return fmt::format("{} v{}, {} B", safe(channel.type), channel.type_version, channel.message_bytes);
}

/// `live`, and what else must be known of it.
std::string condition_of(const channel_state& channel) {
  std::string text{to_string(channel.condition)};
  if (channel.corrupt) text += ", corrupt";
  if (channel.deposited) text += ", awaits a receiver";
  return text;
}

/// The process at this end of a channel, and in which state the end is.
std::string end_of(const channel_state& channel, role which) {
  const end_state& end = channel.ends[static_cast<std::size_t>(which)];
  if (end.pid == 0) return std::string{state_of(end)};
  return fmt::format("{} {}", end.pid, state_of(end));
}

/// A number of at most six characters.
std::string brief(double value) {
  constexpr std::array<char, 5> units{' ', 'k', 'M', 'G', 'T'};
  std::size_t unit = 0;
  for (; value >= 999.5 && unit + 1 < units.size(); ++unit) value /= 1000;
  if (unit == 0) return fmt::format("{:.0f}", value);
  return fmt::format("{:.{}f}{}", value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0, units[unit]);
}

std::string bar(std::uint64_t depth, std::uint64_t capacity) {
  constexpr std::size_t width = 20;
  const double full = capacity == 0 ? 0 : static_cast<double>(depth) / static_cast<double>(capacity);
  // One mark for the least that is there: an almost empty lane is not an empty one.
  const auto marks = std::clamp<std::size_t>(static_cast<std::size_t>(full * width), depth == 0 ? 0 : 1, width);
  return fmt::format("[{}{}] {:>3.0f}%", std::string(marks, '#'), std::string(width - marks, ' '), full * 100);
}

using row = std::vector<std::string>;

/// Characters, for the width of a column; what is shown went through `safe`.
std::size_t width_of(const std::string& text) {
  return static_cast<std::size_t>(
      std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80; }));
}

/// Columns as wide as their widest cell; those in `right` are aligned to the right.
std::string columns(const std::vector<row>& rows, const std::vector<bool>& right) {
  std::vector<std::size_t> widths(right.size(), 0);
  for (const row& cells : rows) {
    for (std::size_t i = 0; i < cells.size(); ++i) widths[i] = std::max(widths[i], width_of(cells[i]));
  }
  std::string text;
  for (const row& cells : rows) {
    std::string line;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      const std::string padding(widths[i] - width_of(cells[i]), ' ');
      if (i != 0) line += "  ";
      line += right[i] ? padding + cells[i] : cells[i] + padding;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + '\n';
  }
  return text;
}

}  // namespace

bool is_known(const channel_state& channel) {
  return channel.condition == channel_condition::live || channel.condition == channel_condition::stale;
}

rates between(const channel_state& before, const channel_state& after, double seconds) {
  if (!is_known(before) || !is_known(after) || seconds <= 0) return {};
  // Counts that went down are those of another segment under the name, or were overwritten.
  const auto rate = [&](std::uint64_t from, std::uint64_t to) {
    return to >= from ? static_cast<double>(to - from) / seconds : 0.0;
  };
  rates result{rate(before.sent, after.sent), rate(before.taken, after.taken), 0, 0};
  for (std::size_t i = 0; i < after.ends.size(); ++i) {
    result.parks += rate(before.ends[i].parks, after.ends[i].parks);
    result.wakes += rate(before.ends[i].wakes, after.ends[i].wakes);
  }
  return result;
}

std::string safe(std::string_view text) {
  std::string shown;
  while (!text.empty()) {
    const auto first = first_character(text);
    const std::size_t bytes = first ? first->bytes : 1;
    if (first && first->character == U'\\') {
      shown += "\\\\";
    } else if (first && is_visible(first->character)) {
      shown += text.substr(0, bytes);
    } else {
      for (const char byte : text.substr(0, bytes)) shown += fmt::format("\\x{:02x}", static_cast<unsigned char>(byte));
    }
    text.remove_prefix(bytes);
  }
  return shown;
}

std::string json_string(std::string_view text) {
  std::string shown = "\"";
  while (!text.empty()) {
    const auto first = first_character(text);
    const std::size_t bytes = first ? first->bytes : 1;
    if (!first) {
      shown += "\\ufffd";
    } else if (first->character == U'"' || first->character == U'\\') {
      shown += '\\';
      shown += static_cast<char>(first->character);
    } else if (is_visible(first->character)) {
      shown += text.substr(0, bytes);
    } else if (first->character < 0x10000) {
      shown += fmt::format("\\u{:04x}", static_cast<std::uint32_t>(first->character));
    } else {
      const auto above = static_cast<std::uint32_t>(first->character) - 0x10000;
      shown += fmt::format("\\u{:04x}\\u{:04x}", 0xd800 + (above >> 10U), 0xdc00 + (above & 0x3ffU));
    }
    text.remove_prefix(bytes);
  }
  return shown + '"';
}

std::string json(const std::vector<channel_state>& channels, const std::vector<rates>* each) {
  std::string text = "[";
  for (std::size_t i = 0; i < channels.size(); ++i) {
    const channel_state& channel = channels[i];
    auto out = std::back_inserter(text);
    fmt::format_to(out, "{}{{\"name\":{},\"scheme\":\"{}\"", i == 0 ? "" : ",\n ", json_string(channel.name.name),
                   scheme_of(channel));
    if (is_known(channel)) {
      fmt::format_to(out,
                     ",\"type\":{},\"type_version\":{},\"message_bytes\":{},\"capacity\":{},\"depth\":{},\"sent\":{},"
                     "\"taken\":{},\"bytes\":{},\"node_asked\":{},\"corrupt\":{},"
                     "\"awaits_receiver\":{}",
                     json_string(channel.type), channel.type_version, channel.message_bytes, channel.capacity,
                     channel.depth, channel.sent, channel.taken, channel.segment_bytes,
                     channel.node_asked ? fmt::to_string(*channel.node_asked) : "null", channel.corrupt,
                     channel.deposited);
    } else {
      text += ",\"type\":null,\"capacity\":null,\"depth\":null";
    }
    fmt::format_to(out, ",\"state\":\"{}\"", to_string(channel.condition));
    if (!channel.trouble.empty()) fmt::format_to(out, ",\"trouble\":{}", json_string(channel.trouble));
    text += ",\"ends\":[";
    if (is_known(channel)) {
      for (const end_state& end : channel.ends) {
        fmt::format_to(
            out, "{}{{\"role\":\"{}\",\"pid\":{},\"state\":\"{}\",\"alive\":{},\"parks\":{},\"wakes\":{},\"cpu\":{}}}",
            &end == channel.ends.data() ? "" : ",", to_string(end.which), end.pid, state_of(end), end.alive, end.parks,
            end.wakes, end.cpu ? fmt::to_string(*end.cpu) : "null");
      }
    }
    text += ']';
    if (each != nullptr) {
      const rates& rate = (*each)[i];
      fmt::format_to(out,
                     ",\"sent_per_second\":{:.1f},\"taken_per_second\":{:.1f},\"parks_per_second\":{:.1f},"
                     "\"wakes_per_second\":{:.1f}",
                     rate.sent, rate.taken, rate.parks, rate.wakes);
    }
    text += '}';
  }
  return text + "]\n";
}

std::string list(const std::vector<channel_state>& channels) {
  std::vector<row> rows{{"NAME", "STATE", "TYPE", "CAPACITY", "DEPTH", "SENDER", "RECEIVER"}};
  for (const channel_state& channel : channels) {
    row cells{safe(channel.name.text()), condition_of(channel)};
    if (is_known(channel)) {
      cells.insert(cells.end(), {type_of(channel), fmt::to_string(channel.capacity), fmt::to_string(channel.depth),
                                 end_of(channel, role::sender), end_of(channel, role::receiver)});
    }
    rows.push_back(std::move(cells));
  }
  return columns(rows, {false, false, false, true, true, false, false});
}

std::string statistics(const channel_state& channel) {
  std::vector<row> rows;
  const auto add = [&](std::string what, std::string found) { rows.push_back({std::move(what), std::move(found)}); };
  add("name", safe(channel.name.text()));
  add("state", condition_of(channel));
  if (!channel.trouble.empty()) add("trouble", safe(channel.trouble));
  if (is_known(channel)) {
    add("type",
        channel.type.empty() ? "unnamed" : fmt::format("{} version {}", safe(channel.type), channel.type_version));
    add("message", fmt::format("{} bytes, aligned to {}", channel.message_bytes, channel.message_alignment));
    add("capacity", fmt::format("{} messages", channel.capacity));
    add("segment", fmt::format("{} bytes, made by process {}", channel.segment_bytes, channel.creator_pid));
    add("node", channel.node_asked ? fmt::format("{} was asked for", *channel.node_asked) : "that of the receiver");
    add("order", channel.barrier == strait::store_load::by_fence ? "a fence in each send" : "membarrier by who waits");
    add("depth", fmt::format("{} {}", channel.depth, bar(channel.depth, channel.capacity)));
    add("sent", fmt::to_string(channel.sent));
    add("taken", fmt::to_string(channel.taken));
    for (const end_state& end : channel.ends) {
      add(std::string{to_string(end.which)},
          fmt::format("{}{}{}, {} parks, {} wakes", state_of(end),
                      end.pid == 0 ? "" : fmt::format(", process {}", end.pid),
                      end.cpu ? fmt::format(", last slept on CPU {}", *end.cpu) : "", end.parks, end.wakes));
    }
  }
  return columns(rows, {false, false});
}

std::string rates_table(const std::vector<channel_state>& channels, const std::vector<rates>& each) {
  std::vector<row> rows{{"NAME", "STATE", "DEPTH", "SENT/s", "TAKEN/s", "PARKS/s", "WAKES/s", "SENDER", "RECEIVER"}};
  for (std::size_t i = 0; i < channels.size(); ++i) {
    const channel_state& channel = channels[i];
    row cells{safe(channel.name.text()), condition_of(channel)};
    if (is_known(channel)) {
      cells.insert(cells.end(), {bar(channel.depth, channel.capacity), brief(each[i].sent), brief(each[i].taken),
                                 brief(each[i].parks), brief(each[i].wakes), end_of(channel, role::sender),
                                 end_of(channel, role::receiver)});
    }
    rows.push_back(std::move(cells));
  }
  return columns(rows, {false, false, false, true, true, true, true, false, false});
}

}  // namespace tool
