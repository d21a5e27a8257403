#pragma once
/// Both ends of a channel in one process, in the memory of this run.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "segment_files.hpp"

import strait;

namespace test {

/// The names of all channels that were made here; at the end of the program nothing may be under them.
class made_names {
 public:
  made_names() = default;
  made_names(const made_names&) = delete;
  made_names& operator=(const made_names&) = delete;
  ~made_names() {
    for (const auto& name : names_) {
      if (!name->exists()) continue;
      std::fprintf(stderr, "left behind: %s\n", name->text().c_str());
      std::_Exit(1);
    }
  }
  const channel_name& next() { return *names_.emplace_back(std::make_unique<channel_name>("ends")); }

 private:
  std::vector<std::unique_ptr<channel_name>> names_;
};

struct two_ends {
  std::unique_ptr<strait::endpoint> sending;
  std::unique_ptr<strait::endpoint> receiving;
};

/// One direction of a pair whose sides meet at that socket: in turn the one towards the listener, and the one back. The
/// listener and the other direction are closed when this returns.
template <class Message>
two_ends ends_at_a_socket(const std::string& socket, const strait::channel_options& options) {
  const auto& shape = strait::duplex_shape_of<Message, Message>;
  strait::doorkeeper keeper{socket, shape, {.lanes = options}};
  const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds{30};
  strait::arrival client = strait::caller::call(socket, shape, {.lanes = options}, patience);
  strait::arrival peer = keeper.arrivals().blocking_recv().value();
  static bool back = false;
  back = !back;
  strait::arrival& sends = back ? peer : client;
  strait::arrival& receives = back ? client : peer;
  return {std::move(sends.sending), std::move(receives.receiving)};
}

/// Both ends of a channel under a name that nobody uses.
template <class Message>
two_ends make_ends(const channel_name& name, const strait::channel_options& options) {
  if (name.is_handed_over()) return ends_at_a_socket<Message>(name.text(), options);
  two_ends made;
  made.receiving = strait::endpoint::open(strait::role::receiver, name.text(), strait::shape_of<Message>, options);
  made.sending = strait::endpoint::open(strait::role::sender, name.text(), strait::shape_of<Message>, options);
  return made;
}

/// The same in the memory of this run.
template <class Message>
two_ends make_ends(const strait::channel_options& options) {
  if (memory() == "private") {
    static_assert(std::is_trivially_destructible_v<Message>);
    two_ends made;
    std::tie(made.sending, made.receiving) =
        strait::endpoint::make_private(strait::shape_of<Message>, options, nullptr);
    return made;
  }
  static made_names names;
  const channel_name& name = names.next();
  two_ends made = make_ends<Message>(name, options);
  if (name.outlives_its_ends()) ::unlink(name.path().c_str());  // they do not notice
  return made;
}

template <class Message>
std::pair<strait::sender<Message>, strait::receiver<Message>> make_channel(
    const strait::channel_options& options = {}) {
  auto made = make_ends<Message>(options);
  return {strait::sender<Message>{std::move(made.sending)}, strait::receiver<Message>{std::move(made.receiving)}};
}

}  // namespace test
