// A program whose files import strait before they include Asio: a strait application that gets sockets. Headers after
// an import are what this file is about; everywhere else they come first.
import strait;

#include <asio.hpp>

#include <strait/asio.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <utility>

#include "asio_channels.hpp"

TEST_CASE("Asio after strait: channels in asio::awaitable") {
  exchange();
}
