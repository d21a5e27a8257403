#include "store.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <iterator>
#include <limits>
#include <optional>
#include <utility>

namespace kv {
namespace {

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return result;
}

bool arity_fits(int arity, std::size_t arguments) {
  return arity >= 0 ? arguments == static_cast<std::size_t>(arity) : arguments >= static_cast<std::size_t>(-arity);
}

void wrong_arity(std::string& reply, std::string_view name) {
  resp::append_error(reply, fmt::format("ERR wrong number of arguments for '{}' command", name));
}

void unknown_subcommand(std::string& reply, std::string_view command, std::string_view subcommand) {
  resp::append_error(reply,
                     fmt::format("ERR unknown subcommand '{}'. Try {} HELP.", subcommand.substr(0, 128), command));
}

void unknown_command(std::string& reply, const resp::command& request) {
  constexpr std::size_t room = 128;  // as in Redis: enough to recognise the request by
  std::string arguments;
  for (std::size_t i = 1; i < request.size() && arguments.size() < room; ++i) {
    arguments += fmt::format("'{}' ", std::string_view(request[i]).substr(0, room - arguments.size()));
  }
  resp::append_error(reply, fmt::format("ERR unknown command '{}', with args beginning with: {}",
                                        std::string_view(request[0]).substr(0, room), arguments));
}

/// Only the canonical spelling is a number, as in Redis: "007", "+7" and " 7" are strings.
std::optional<std::int64_t> to_integer(std::string_view text) {
  std::int64_t value = 0;
  const auto error = std::from_chars(text.data(), text.data() + text.size(), value).ec;
  if (error != std::errc{} || fmt::to_string(value) != text) return std::nullopt;
  return value;
}

/// What the tools ask for before they start. Nothing is ever saved to disk, and these say so.
using setting = std::pair<std::string_view, std::string_view>;
constexpr std::array settings{setting{"appendonly", "no"}, setting{"databases", "1"}, setting{"save", ""}};

}  // namespace

/// A command in the words of Redis' own table: an arity counts the name of the command, and a negative one is a
/// minimum; keys are the arguments from `first_key` to `last_key` (-1: the last one), or there are none (0).
struct store::command_info {
  std::string_view name;
  int arity;
  std::string_view flag;
  int first_key, last_key;
  void (store::*run)(const resp::command&, std::string&);
};

std::span<const store::command_info> store::commands() {
  static constexpr std::array table{
      command_info{"client", -2, "admin", 0, 0, &store::client},
      command_info{"command", -1, "readonly", 0, 0, &store::command},
      command_info{"config", -2, "admin", 0, 0, &store::config},
      command_info{"dbsize", 1, "readonly", 0, 0, &store::dbsize},
      command_info{"del", -2, "write", 1, -1, &store::del},
      command_info{"echo", 2, "fast", 0, 0, &store::echo},
      command_info{"exists", -2, "readonly", 1, -1, &store::exists},
      command_info{"get", 2, "readonly", 1, 1, &store::get},
      command_info{"incr", 2, "write", 1, 1, &store::incr},
      command_info{"mget", -2, "readonly", 1, -1, &store::mget},
      command_info{"ping", -1, "fast", 0, 0, &store::ping},
      command_info{"quit", -1, "fast", 0, 0, &store::quit},
      command_info{"set", -3, "write", 1, 1, &store::set},
  };
  return table;
}

const store::command_info* store::find_command(std::string_view name) {
  const auto found = std::ranges::find(commands(), lower(name), &command_info::name);
  return found == commands().end() ? nullptr : &*found;
}

std::string store::execute(const resp::command& request) {
  std::string reply;
  const auto* info = find_command(request[0]);
  if (!info) {
    unknown_command(reply, request);
  } else if (!arity_fits(info->arity, request.size())) {
    wrong_arity(reply, info->name);
  } else {
    (this->*info->run)(request, reply);
  }
  return reply;
}

const std::string* store::find(const std::string& key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? nullptr : &found->second;
}

void store::ping(const resp::command& request, std::string& reply) {
  if (request.size() > 2) return wrong_arity(reply, "ping");
  if (request.size() == 2) return resp::append_bulk(reply, request[1]);
  resp::append_simple(reply, "PONG");
}

void store::echo(const resp::command& request, std::string& reply) {
  resp::append_bulk(reply, request[1]);
}

void store::get(const resp::command& request, std::string& reply) {
  const auto* value = find(request[1]);
  value ? resp::append_bulk(reply, *value) : resp::append_null(reply);
}

void store::set(const resp::command& request, std::string& reply) {
  bool only_new = false;
  bool only_present = false;
  for (std::size_t i = 3; i < request.size(); ++i) {
    const auto option = lower(request[i]);
    only_new |= option == "nx";
    only_present |= option == "xx";
    // Keys never expire here, so EX and PX are refused rather than forgotten.
    if (option != "nx" && option != "xx") return resp::append_error(reply, "ERR syntax error");
  }
  if (only_new && only_present) return resp::append_error(reply, "ERR syntax error");

  const bool present = find(request[1]) != nullptr;
  if ((only_new && present) || (only_present && !present)) return resp::append_null(reply);
  values_.insert_or_assign(request[1], request[2]);
  resp::append_simple(reply, "OK");
}

void store::del(const resp::command& request, std::string& reply) {
  std::size_t removed = 0;
  for (std::size_t i = 1; i < request.size(); ++i) removed += values_.erase(request[i]);
  resp::append_integer(reply, static_cast<std::int64_t>(removed));
}

void store::exists(const resp::command& request, std::string& reply) {
  const auto found = std::count_if(request.begin() + 1, request.end(), [this](const auto& key) { return find(key); });
  resp::append_integer(reply, found);
}

void store::incr(const resp::command& request, std::string& reply) {
  const auto* present = find(request[1]);
  const auto value = present ? to_integer(*present) : 0;
  if (!value) return resp::append_error(reply, "ERR value is not an integer or out of range");
  if (*value == std::numeric_limits<std::int64_t>::max()) {
    return resp::append_error(reply, "ERR increment or decrement would overflow");
  }
  values_.insert_or_assign(request[1], fmt::to_string(*value + 1));
  resp::append_integer(reply, *value + 1);
}

void store::mget(const resp::command& request, std::string& reply) {
  resp::append_array(reply, request.size() - 1);
  for (std::size_t i = 1; i < request.size(); ++i) {
    const auto* value = find(request[i]);
    value ? resp::append_bulk(reply, *value) : resp::append_null(reply);
    if (reply.size() > max_reply) {
      reply.clear();
      return resp::append_error(reply, fmt::format("ERR reply is longer than {} bytes", max_reply));
    }
  }
}

void store::dbsize(const resp::command&, std::string& reply) {
  resp::append_integer(reply, static_cast<std::int64_t>(values_.size()));
}

void store::command(const resp::command& request, std::string& reply) {
  const auto subcommand = request.size() > 1 ? lower(request[1]) : "";
  if (subcommand.empty()) {
    resp::append_array(reply, commands().size());
    for (const auto& info : commands()) append_command_info(reply, info);
  } else if (subcommand == "count") {
    resp::append_integer(reply, static_cast<std::int64_t>(commands().size()));
  } else if (subcommand == "docs") {
    resp::append_array(reply, 0);  // redis-cli shows its own hints then
  } else if (subcommand == "info") {
    resp::append_array(reply, request.size() - 2);
    for (std::size_t i = 2; i < request.size(); ++i) {
      const auto* info = find_command(request[i]);
      info ? append_command_info(reply, *info) : resp::append_null(reply);
    }
  } else {
    unknown_subcommand(reply, "COMMAND", request[1]);
  }
}

void store::append_command_info(std::string& reply, const command_info& info) {
  resp::append_array(reply, 6);
  resp::append_bulk(reply, info.name);
  resp::append_integer(reply, info.arity);
  resp::append_array(reply, 1);
  resp::append_simple(reply, info.flag);
  resp::append_integer(reply, info.first_key);
  resp::append_integer(reply, info.last_key);
  resp::append_integer(reply, info.first_key > 0 ? 1 : 0);  // the step from key to key
}

void store::config(const resp::command& request, std::string& reply) {
  if (lower(request[1]) != "get") return unknown_subcommand(reply, "CONFIG", request[1]);
  if (request.size() < 3) return wrong_arity(reply, "config|get");
  const auto asked_for = [&request](const setting& candidate) {
    return std::any_of(request.begin() + 2, request.end(),
                       [&](const std::string& pattern) { return pattern == "*" || lower(pattern) == candidate.first; });
  };
  resp::append_array(reply, 2 * static_cast<std::size_t>(std::ranges::count_if(settings, asked_for)));
  for (const auto& candidate : settings) {
    if (!asked_for(candidate)) continue;
    resp::append_bulk(reply, candidate.first);
    resp::append_bulk(reply, candidate.second);
  }
}

void store::client(const resp::command& request, std::string& reply) {
  const auto subcommand = lower(request[1]);
  // Libraries introduce themselves with these; there is no CLIENT LIST that would show it.
  if (subcommand == "setname" || subcommand == "setinfo") return resp::append_simple(reply, "OK");
  unknown_subcommand(reply, "CLIENT", request[1]);
}

/// The gateway hangs up after this reply; the engine knows no connections.
void store::quit(const resp::command&, std::string& reply) {
  resp::append_simple(reply, "OK");
}

}  // namespace kv
