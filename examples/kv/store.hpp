#pragma once
// The data and the commands on it. Knows nothing of sockets, channels or threads: one caller at a time.

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>

#include "resp.hpp"

namespace kv {

class store {
 public:
  /// A reply longer than this is an error instead: it bounds what a small MGET can make us hold for a slow client.
  static constexpr std::size_t max_reply = 2 * 1024 * 1024;

  /// Executes one request, which must not be empty, and returns the reply in RESP. Never throws for what a client says.
  std::string execute(const resp::command& request);

 private:
  struct command_info;
  static std::span<const command_info> commands();
  static const command_info* find_command(std::string_view name);
  static void append_command_info(std::string& reply, const command_info& info);

  // Each executes one command and appends the reply; the number of arguments has been checked.
  void ping(const resp::command& request, std::string& reply);
  void echo(const resp::command& request, std::string& reply);
  void get(const resp::command& request, std::string& reply);
  void set(const resp::command& request, std::string& reply);
  void del(const resp::command& request, std::string& reply);
  void exists(const resp::command& request, std::string& reply);
  void incr(const resp::command& request, std::string& reply);
  void mget(const resp::command& request, std::string& reply);
  void dbsize(const resp::command& request, std::string& reply);
  void command(const resp::command& request, std::string& reply);
  void config(const resp::command& request, std::string& reply);
  void client(const resp::command& request, std::string& reply);
  void quit(const resp::command& request, std::string& reply);

  const std::string* find(const std::string& key) const;

  std::unordered_map<std::string, std::string> values_;
};

}  // namespace kv
