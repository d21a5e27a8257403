// kv-server: a key-value server that speaks the Redis protocol, in two processes. See README.md.

#include <fmt/format.h>

#include <charconv>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "roles.hpp"

namespace {

constexpr std::string_view usage =
    "usage: kv-server [--port N]\n"
    "\n"
    "Serves Redis clients on 127.0.0.1:N (default 6379; 0 takes a free port) until SIGINT or SIGTERM.\n";

std::optional<std::uint16_t> to_port(std::string_view text) {
  std::uint16_t port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return port;
}

int run(const std::vector<std::string>& arguments) {
  if (arguments.empty()) return kv::run_gateway(6379);
  if (arguments.size() == 1 && arguments[0] == "--help") {
    fmt::print("{}", usage);
    return 0;
  }
  if (arguments.size() == 2 && arguments[0] == "--port") {
    if (const auto port = to_port(arguments[1])) return kv::run_gateway(*port);
    fmt::print(stderr, "kv-server: expected a port from 0 to 65535, found '{}'\n", arguments[1]);
    return 2;
  }
  // The gateway starts this program again like so; people have no use for it.
  if (arguments.size() == 2 && arguments[0] == "--engine") return kv::run_engine(arguments[1]);
  fmt::print(stderr, "{}", usage);
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    fmt::print(stderr, "kv-server: {}\n", error.what());
    return 1;
  }
}
