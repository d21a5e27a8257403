// The engine: owns the data, and is one coroutine on strait's runtime. It knows neither clients nor sockets.

#include <fmt/format.h>

#include <csignal>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "message.hpp"
#include "resp.hpp"
#include "roles.hpp"
#include "store.hpp"

// Imports come after all other includes.
#include "channels.hpp"

import strait;

namespace kv {
namespace {

/// Executes one request after the other, in the order in which the gateway sent them. Ends when the gateway has closed
/// its end and all is answered; throws when the gateway died.
strait::task<> serve(strait::receiver<slot> requests, strait::sender<slot> replies) {
  store data;
  assembler incoming;
  std::vector<slot> outgoing;
  while (const auto slot = co_await requests.recv()) {
    const auto request = incoming.add(*slot);
    if (!request) continue;
    outgoing.clear();
    cut(request->to, data.execute(resp::decode(request->bytes)), outgoing);
    co_await replies.send_many(outgoing);
  }
}

}  // namespace

int run_engine(const std::string& pair) {
  // A terminal and a service manager signal both processes. The gateway is the one to act on it: it closes the channel,
  // and that is how the engine is told to stop.
  std::signal(SIGINT, SIG_IGN);
  std::signal(SIGTERM, SIG_IGN);

  auto requests = strait::open_receiver<slot>(requests_of(pair), {.open = strait::open_mode::open});
  auto replies = strait::open_sender<slot>(replies_of(pair), {.open = strait::open_mode::open});
  fmt::print("ready\n");
  std::fflush(stdout);

  strait::runtime runtime;
  runtime.spawn(serve(std::move(requests), std::move(replies)));
  runtime.join();
  return 0;
}

}  // namespace kv
