/// strait: sees the channels on this machine and clears what a crash left. All knowledge is in strait.endpoint; this
/// prints.
#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "show.hpp"

import strait.error;
import strait.endpoint;

namespace {

using strait::channel_condition;
using strait::channel_state;

constexpr int success = 0;
constexpr int failure = 1;
constexpr int misuse = 2;

/// Everything goes out at once, so that whoever reads along never meets half a document.
void print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw std::system_error{errno, std::system_category(), "writing to the standard output"};
  }
}

void complain(std::string_view what) {
  fmt::print(stderr, "strait: {}\n", tool::safe(what));
}

int list(bool as_json) {
  const auto channels = strait::list_channels();
  if (as_json) {
    print(tool::json(channels));
  } else if (channels.empty()) {
    print("no channels\n");
  } else {
    print(tool::list(channels));
  }
  return success;
}

int statistics(const std::string& name, bool as_json) {
  const channel_state channel = strait::inspect(name);
  print(as_json ? tool::json({channel}) : tool::statistics(channel));
  return success;
}

/// Rows of the terminal; 0 when the output is none.
std::size_t terminal_rows() {
  if (::isatty(STDOUT_FILENO) == 0) return 0;
  ::winsize size{};
  return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_row > 1 ? size.ws_row : 24;
}

/// The screen from its top with these lines, as many as fit. Lines too long are cut off by the terminal, which is left
/// as it was found after each of them: this program ends at any moment, by Ctrl-C.
std::string screen(const std::string& text, std::size_t rows) {
  std::string drawn = "\x1b[H\x1b[?7l";
  std::size_t from = 0;
  for (std::size_t line = 0; line + 1 < rows && from < text.size(); ++line) {
    const std::size_t end = text.find('\n', from);
    drawn += text.substr(from, end - from) + "\x1b[K\n";
    from = end + 1;
  }
  return drawn + "\x1b[?7h\x1b[J";
}

int top(double interval, bool once, bool as_json) {
  using clock = std::chrono::steady_clock;
  std::vector<channel_state> before = strait::list_channels();
  auto looked_at = clock::now();
  bool first = true;
  for (;;) {
    std::this_thread::sleep_for(std::chrono::duration<double>{interval});
    const std::vector<channel_state> now = strait::list_channels();
    const auto at = clock::now();
    const double seconds = std::chrono::duration<double>{at - looked_at}.count();
    std::vector<tool::rates> each;
    for (const channel_state& channel : now) {
      const auto same = std::ranges::find_if(before, [&](const channel_state& other) {
        return other.name.scheme == channel.name.scheme && other.name.name == channel.name.name;
      });
      each.push_back(same == before.end() ? tool::rates{} : tool::between(*same, channel, seconds));
    }
    const std::size_t rows = once || as_json ? 0 : terminal_rows();
    const std::string table = now.empty() ? "no channels\n" : tool::rates_table(now, each);
    if (as_json) {
      print(tool::json(now, &each));
    } else if (rows == 0) {
      print(table);
    } else {
      print((first ? "\x1b[2J" : "") + screen(table, rows));
    }
    if (once) return success;
    before = now;
    looked_at = at;
    first = false;
  }
}

int remove(const std::vector<std::string>& names, bool stale, bool as_json) {
  std::vector<channel_state> removed;
  int status = success;
  const auto attempt = [&](const std::string& name, strait::removal which) {
    try {
      const channel_state channel = strait::inspect(name);
      strait::remove_channel(name, which);
      removed.push_back(channel);
      if (!as_json) print("removed " + tool::safe(channel.name.text()) + '\n');
    } catch (const std::system_error& error) {
      // Somebody else cleared it, or entered it, meanwhile: it is no leftover any more.
      const bool no_leftover = error.code() == std::errc::no_such_file_or_directory ||
                               error.code() == strait::errc::end_in_use ||
                               error.code() == strait::errc::foreign_segment;
      if (which == strait::removal::leftover && no_leftover) return;
      complain(error.what());
      status = failure;
    }
  };
  if (stale) {
    for (const channel_state& channel : strait::list_channels()) {
      if (channel.condition != channel_condition::stale && channel.condition != channel_condition::unfinished) continue;
      if (channel.deposited) {
        complain(fmt::format("{}: kept, its {} messages wait for a receiver; `strait rm NAME` removes it",
                             channel.name.text(), channel.depth));
        continue;
      }
      attempt(channel.name.text(), strait::removal::leftover);
    }
  } else {
    for (const std::string& name : names) attempt(name, strait::removal::any);
  }
  if (as_json) print(tool::json(removed));
  return status;
}

int run(int argc, char** argv) {
  CLI::App app{"Sees the channels on this machine, and clears what a crash left."};
  app.name("strait");
  app.require_subcommand(1);
  app.fallthrough();
  app.footer("A channel is named as in a program: posix:orders, or only orders.");
  bool as_json = false;
  app.add_flag("--json", as_json, "An array of channels, for programs");

  CLI::App* const ls = app.add_subcommand("ls", "Every channel: what it carries, how full it is, who is at its ends");

  CLI::App* const stat = app.add_subcommand("stat", "All that is known of one channel");
  std::string name;
  stat->add_option("NAME", name, "The channel")->required();

  CLI::App* const top_word = app.add_subcommand("top", "Every channel with its rates, again and again");
  bool once = false;
  double interval = 1;
  top_word->add_flag("--once", once, "Prints once and ends");
  top_word->add_option("--interval", interval, "Seconds between two looks")->check(CLI::Range(0.01, 3600.0));

  CLI::App* const rm = app.add_subcommand("rm", "Removes channels in which nobody lives");
  std::vector<std::string> names;
  bool stale = false;
  auto* const named = rm->add_option("NAME", names, "The channels");
  auto* const all_stale = rm->add_flag("--stale", stale, "All that a crash left");
  named->excludes(all_stale);
  rm->require_option(1, 0);

  // CLI11 says of an unknown word only that it did not expect it.
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word.starts_with('-')) continue;
    constexpr std::array<std::string_view, 4> words{"ls", "stat", "top", "rm"};
    if (std::ranges::find(words, word) == words.end()) {
      complain(fmt::format("unknown word: expected one of ls, stat, top, rm; found \"{}\"", word));
      return misuse;
    }
    break;
  }
  try {
    app.parse(argc, argv);
    if (*rm && names.empty() && !stale) throw CLI::RequiredError{"NAME or --stale"};
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);
    complain(error.what());
    fmt::print(stderr, "strait --help tells what there is.\n");
    return misuse;
  }
  if (*ls) return list(as_json);
  if (*stat) return statistics(name, as_json);
  if (*top_word) return top(interval, once, as_json);
  return remove(names, stale, as_json);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    try {
      complain(error.what());
    } catch (const std::exception&) {
      // Standard error is closed: there is nobody to tell.
    }
    return failure;
  }
}
