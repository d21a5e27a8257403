// A program whose files know strait only through its header, before Asio.
#include <strait/asio.hpp>

#include <asio.hpp>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <utility>

#include <doctest/doctest.h>

#include "asio_channels.hpp"

TEST_CASE("the header alone: channels in asio::awaitable") {
  exchange();
}
