#include "subject.hpp"

#include <array>

#include <fmt/format.h>

namespace bench {

std::span<const subject> subjects() {
  static const std::array all{strait_subject(),       unix_socket_subject(), pipe_subject(),
                              posix_mq_subject(),     tcp_subject(),         textbook_ring_subject(),
                              tuned_ring_subject(),   raw_line_subject(),    raw_eventfd_subject(),
                              asio_channel_subject(), raw_ring_subject(),    asio_post_subject(),
                              asio_co_spawn_subject()};
  return all;
}

const subject& subject_named(std::string_view name) {
  for (const subject& one : subjects()) {
    if (one.name == name) return one;
  }
  throw std::runtime_error{fmt::format("there is no subject '{}'", name)};
}

}  // namespace bench
