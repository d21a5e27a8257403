// What moved out of asio::experimental: under one name for every version of Asio.
#pragma once

#include <asio/version.hpp>

#if ASIO_VERSION >= 102300
#include <asio/as_tuple.hpp>
#include <asio/deferred.hpp>
namespace moved {
using asio::as_tuple;
using asio::deferred;
}  // namespace moved
#else
#include <asio/experimental/as_tuple.hpp>
#include <asio/experimental/deferred.hpp>
namespace moved {
using asio::experimental::as_tuple;
using asio::experimental::deferred;
}  // namespace moved
#endif
