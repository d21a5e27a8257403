// The only two Asio names that strait's module interfaces know (docs/design/modules.md). Declaring them here lets
// an interface unit specialise asio::awaitable without including 58 MiB of Asio; <strait/asio.hpp> brings the rest.
#pragma once

namespace asio {
class any_io_executor;
template <typename T, typename Executor>
class awaitable;
}  // namespace asio
