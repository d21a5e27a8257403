// A strait application that gets a timer of Asio's: strait is there before Asio comes. Headers after an import are what
// this program is about; elsewhere they come first.
import strait;

#include <asio.hpp>

#include <strait/asio.hpp>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <utility>

#include "exchange.hpp"

int main() {
  return exchange() ? 0 : 1;
}
