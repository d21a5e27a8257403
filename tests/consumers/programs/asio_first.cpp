// An Asio application that gets a channel: Asio is there before strait comes.
#include <asio.hpp>

#include <strait/asio.hpp>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <utility>

import strait;

#include "exchange.hpp"

int main() {
  return exchange() ? 0 : 1;
}
