// moderator: takes what is said in the chat, puts stars over a word, drops lines with links, and lets the rest pass.
// The other process of examples/embed; it knows no sockets and no clients.

#include <asio.hpp>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>

#include "moderation.hpp"

import strait;

namespace {

/// What becomes of a line; empty: nobody is told.
std::string judge(std::string_view said, std::string_view unwanted) {
  std::string text{said};
  if (text.find("http://") != text.npos || text.find("https://") != text.npos) return {};
  for (auto at = text.find(unwanted); at != text.npos; at = text.find(unwanted, at)) {
    std::fill_n(text.begin() + static_cast<std::ptrdiff_t>(at), unwanted.size(), '*');
    at += unwanted.size();
  }
  return text;
}

/// Ends when the server closes its end; throws when the server died.
///
/// A line is released only when its judgement was sent. If we are killed between the two, our replacement gets the line
/// again, and the server sees that it has told it already: no line is lost, and none is told twice.
strait::task<> moderate(strait::receiver<chat_line>& said, strait::sender<chat_line>& passed,
                        std::string_view unwanted) {
  for (;;) {
    const auto lines = co_await said.peek();
    if (lines.empty()) co_return;
    const std::string text = judge(lines[0].view(), unwanted);
    if (!text.empty()) co_await passed.send(chat_line{lines[0].number, text});
    said.release(1);
  }
}

/// No signal is handled: a moderator that is told to end dies, and what is said waits for the next one. Were it to
/// close its ends, the server would take that for the end of moderation.
void run(int port, std::string_view unwanted) {
  auto said = strait::open_receiver<chat_line>(said_in(port), moderation);
  auto passed = strait::open_sender<chat_line>(passed_in(port), moderation);
  std::printf("moderating the chat on port %d\n", port);
  std::fflush(stdout);
  asio::io_context context{1};
  strait::spawn(context, moderate(said, passed, unwanted));
  context.run();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view argument = argc == 3 ? argv[1] : "";
  const char* const end = argument.data() + argument.size();
  unsigned short port = 0;
  if (argument.empty() || std::from_chars(argument.data(), end, port).ptr != end || *argv[2] == '\0') {
    std::fprintf(stderr, "usage: %s PORT WORD    (stars over WORD in the chat on PORT)\n", argv[0]);
    return 2;
  }
  try {
    run(port, argv[2]);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
}
