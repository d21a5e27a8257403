// What asio/timer-beside-load and asio/socket-beside-load measure, the same for every kind of load: an ordinary Asio
// coroutine in a context that at the same time takes messages from another thread, as fast as that sends them.
#pragma once

#include <asio/awaitable.hpp>
#include <asio/io_context.hpp>

#include <cstdint>

#include "../subject.hpp"

namespace bench {

/// Messages that may be on their way, in the channel or in the context's queue.
inline constexpr std::uint64_t load_capacity = capacity_for(8);

/// Makes the samples of one round, once the load flows: how late timers are, or how long round trips through sockets
/// take. `taken` counts the messages of the load.
[[nodiscard]] asio::awaitable<void> probe(end& self, end::round round, const std::uint64_t& taken);

}  // namespace bench
