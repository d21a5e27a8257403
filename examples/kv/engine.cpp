// The engine: owns the data, and is a coroutine on strait's runtime. It knows neither clients nor sockets.

#include <fmt/format.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "message.hpp"
#include "resp.hpp"
#include "roles.hpp"
#include "store.hpp"

#include "channels.hpp"

import strait;

namespace kv {
namespace {

/// The whole engine: one request after the other, in the order in which the gateway sent them.
strait::task<> serve(strait::receiver<slot>& requests, strait::sender<slot>& replies) {
  store data;
  assembler incoming;
  std::vector<slot> outgoing;
  while (auto slot = co_await requests.recv()) {
    const auto request = incoming.add(*slot);
    if (!request) continue;
    outgoing.clear();
    cut(request->to, data.execute(resp::decode(request->bytes)), outgoing);
    co_await replies.send_many(outgoing);
  }
}

/// Serves until the gateway has closed its end. A task has nobody to throw at, so it leaves its verdict in `status`.
strait::task<> engine(strait::receiver<slot> requests, strait::sender<slot> replies, int& status) {
  try {
    co_await serve(requests, replies);
    status = 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "kv-server engine: {}\n", error.what());
  }
}

}  // namespace

int run_engine(const std::string& pair) {
  // A terminal and a service manager signal both processes. The gateway answers what it has taken and then closes the
  // channel, which is how the engine is told to stop.
  std::signal(SIGINT, SIG_IGN);
  std::signal(SIGTERM, SIG_IGN);

  auto requests = strait::open_receiver<slot>(requests_of(pair), {.open = strait::open_mode::open});
  auto replies = strait::open_sender<slot>(replies_of(pair), {.open = strait::open_mode::open});
  fmt::print("ready\n");
  std::fflush(stdout);

  int status = 1;
  strait::runtime runtime;
  runtime.spawn(engine(std::move(requests), std::move(replies), status));
  runtime.join();
  return status;
}

}  // namespace kv
