// The only Asio names that strait's module interfaces know (docs/design/modules.md). Declaring them here lets an
// interface unit specialise asio::awaitable without including 58 MiB of Asio; <strait/asio.hpp> brings the rest.
#pragma once

namespace asio {
class any_io_executor;
template <typename T, typename Executor>
class awaitable;
}  // namespace asio

namespace strait {
/// The slow path of an operation that is awaited in an asio::awaitable: defined in <strait/asio.hpp>, because only there
/// Asio is known. Of no module, so that a header may define it.
template <class Operation, class Executor>
struct asio_suspension;
}  // namespace strait
