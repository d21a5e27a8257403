#pragma once
// The two roles that kv-server plays, each in its own process. Both return the exit status of their process.

#include <cstdint>
#include <string>

namespace kv {

/// Serves clients on 127.0.0.1:`port` (0: a free port) with an engine that it starts, until SIGINT or SIGTERM.
int run_gateway(std::uint16_t port);

/// Owns the data and serves the gateway that made the channels of `pair`, until that closes them or dies.
int run_engine(const std::string& pair);

}  // namespace kv
