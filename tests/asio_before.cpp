// A program whose files include Asio before they import strait: an Asio application that gets channels. The imports
// stand where they would stand there, after everything that is included.
#include <asio.hpp>

#include <strait/asio.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <utility>

import strait;

#include "asio_channels.hpp"

TEST_CASE("Asio before strait: channels in asio::awaitable") {
  exchange();
}
