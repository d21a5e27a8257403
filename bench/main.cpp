// strait-demo: what strait does on this machine, beside what one would use instead, in one run.
#include <fcntl.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cases.hpp"
#include "conductor.hpp"
#include "report.hpp"

namespace {

constexpr std::string_view usage =
    R"(usage: strait-demo [--json FILE] [--rounds N] [--quick] [--memory NAME] [--case PREFIX]
                   [--subject PREFIX]

Two processes exchange messages through a strait channel, and through what one would use instead, and check each
message. Takes about a minute; with --memory all some 15 s more.

  --json FILE       write every row of the table to FILE as well, as a JSON array
  --rounds N        interleaved rounds for each subject (default 9; figures that are to be published need at least 9)
  --quick           shorter rounds: to see that it works, not how fast
  --memory NAME     where strait's channels lie: posix (default), sysv, file (in the directory for temporary files),
                    private (both ends are then threads of one process, pinned as the two processes are), unix (sealed
                    memory handed over a Unix socket), or all: the cases with messages of 8 bytes measure strait once in
                    each of these, in the same rounds, and the others in posix
  --case PREFIX     only the cases whose names begin with PREFIX
  --subject PREFIX  only the subjects whose names begin with PREFIX; may be given several times
  --help            this text

Exit status: 0 when every message came whole, once and in order; 1 when one did not, or a process failed; 2 when the
command line is wrong.
)";

struct usage_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct options {
  bench::plan plan;
  std::string json;
  std::string case_prefix;
  bool help = false;
};

options parse(int argc, char** argv) {
  options chosen;
  for (int i = 1; i < argc; ++i) {
    const std::string_view option = argv[i];
    const auto value = [&]() -> std::string_view {
      if (i + 1 == argc) throw usage_error{fmt::format("expected a value after {}, found the end", option)};
      return argv[++i];
    };
    if (option == "--help" || option == "-h") {
      chosen.help = true;
    } else if (option == "--json") {
      chosen.json = value();
    } else if (option == "--quick") {
      chosen.plan.quick = true;
    } else if (option == "--memory") {
      const std::string_view text = value();
      chosen.plan.memories.clear();
      for (std::size_t i = 0; i < bench::memory_names.size(); ++i) {
        if (text == "all" || text == bench::memory_names[i]) {
          chosen.plan.memories.push_back(static_cast<bench::memory>(i));
        }
      }
      if (chosen.plan.memories.empty()) {
        throw usage_error{
            fmt::format("--memory: expected one of {} or all, found '{}'", fmt::join(bench::memory_names, ", "), text)};
      }
    } else if (option == "--case") {
      chosen.case_prefix = value();
    } else if (option == "--subject") {
      chosen.plan.subject_prefixes.emplace_back(value());
    } else if (option == "--rounds") {
      const std::string_view text = value();
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), chosen.plan.rounds);
      if (error != std::errc{} || end != text.data() + text.size() || chosen.plan.rounds < 1 ||
          chosen.plan.rounds > 1000) {
        throw usage_error{fmt::format("--rounds: expected a number from 1 to 1000, found '{}'", text)};
      }
    } else if (option == "--plant") {
      // Not in the help: spoils one message, to show that the receiving end tells.
      const std::string_view text = value();
      if (text == "lost") {
        chosen.plan.fault = bench::plant::lost;
      } else if (text == "doubled") {
        chosen.plan.fault = bench::plant::doubled;
      } else if (text == "torn") {
        chosen.plan.fault = bench::plant::torn;
      } else {
        throw usage_error{fmt::format("--plant: expected lost, doubled or torn, found '{}'", text)};
      }
    } else {
      throw usage_error{
          fmt::format("expected --json, --rounds, --quick, --memory, --case, --subject or --help, found '{}'", option)};
    }
  }
  return chosen;
}

/// The file that the rows go to. Opened before anything is measured: a minute is too late to learn that it cannot be.
class json_file {
 public:
  explicit json_file(const std::string& path)
      : path_{path}, file_{::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666)} {
    if (file_.get() < 0) {
      throw usage_error{
          fmt::format("--json: expected a file that can be written, found '{}': {}", path, std::strerror(errno))};
    }
  }

  void write(std::string_view text) {
    // Only now: a run that fails leaves the last one's file as it was. What is no regular file cannot be truncated.
    [[maybe_unused]] const int truncated = ::ftruncate(file_.get(), 0);
    while (!text.empty()) {
      const ssize_t written = ::write(file_.get(), text.data(), text.size());
      if (written < 0) {
        throw std::system_error{errno, std::system_category(), fmt::format("cannot write '{}'", path_)};
      }
      text.remove_prefix(static_cast<std::size_t>(written));
    }
  }

 private:
  std::string path_;
  bench::descriptor file_;
};

/// One line that is written over on a terminal; one line a case anywhere else.
class status_line {
 public:
  explicit status_line(unsigned rounds) : rounds_{rounds}, terminal_{::isatty(STDERR_FILENO) == 1} {}
  ~status_line() { clear(); }
  status_line(const status_line&) = delete;
  status_line& operator=(const status_line&) = delete;

  void begin(std::size_t number, std::size_t of, std::string_view name) {
    where_ = fmt::format("[{}/{}] {}", number, of, name);
    if (!terminal_) fmt::print(stderr, "{}: measuring\n", where_);
  }
  void show(unsigned round, std::string_view subject) {
    if (!terminal_) return;
    const auto stage = round == 0 ? std::string{"warming up"} : fmt::format("round {} of {}", round, rounds_);
    fmt::print(stderr, "\r\x1b[K{}  {}  {}", where_, stage, subject);
    std::fflush(stderr);
    shown_ = true;
  }
  void clear() {
    if (!shown_) return;
    fmt::print(stderr, "\r\x1b[K");
    std::fflush(stderr);
    shown_ = false;
  }

 private:
  unsigned rounds_;
  bool terminal_;
  bool shown_ = false;
  std::string where_;
};

std::string cpu_model() {
  std::ifstream file{"/proc/cpuinfo"};
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown CPU";
}

std::string kernel() {
  utsname names{};
  ::uname(&names);
  return fmt::format("{} {}", static_cast<const char*>(names.sysname), static_cast<const char*>(names.release));
}

int demonstrate(const options& chosen) {
  std::vector<const bench::bench_case*> wanted;
  std::string known;
  for (const bench::bench_case& one : bench::cases()) {
    known += fmt::format("{}{}", known.empty() ? "" : ", ", one.name);
    if (!one.name.starts_with(chosen.case_prefix)) continue;
    const bool any = std::any_of(one.subjects.begin(), one.subjects.end(),
                                 [&](std::string_view name) { return chosen.plan.wants(name); });
    if (any) wanted.push_back(&one);
  }
  if (wanted.empty()) {
    throw usage_error{fmt::format("expected the beginning of one of {}, with one of its subjects; found '{}' with '{}'",
                                  known, chosen.case_prefix, fmt::join(chosen.plan.subject_prefixes, ", "))};
  }
  std::optional<json_file> file;
  if (!chosen.json.empty()) file.emplace(chosen.json);

  const auto started = std::chrono::steady_clock::now();
  bench::conductor conductor{bench::choose_placement()};
  const bench::placement& where = conductor.where();
  fmt::print("{}, {}\n", cpu_model(), kernel());
  if (where.one_cpu()) {
    fmt::print(
        "One CPU only ({}): the two processes take turns on it, spin less and yield instead. These figures say what a\n"
        "switch between processes costs, not what the channel does.\n",
        where.producer);
  } else {
    fmt::print("Producer on CPU {}, consumer on CPU {}: {}.\n", where.producer, where.consumer, where.words);
  }
  fmt::print(
      "{} interleaved rounds a subject. Rates: the best is max; times: the best is min. Each message is checked.\n",
      chosen.plan.rounds);
  if (std::ranges::find(chosen.plan.memories, bench::memory::file) != chosen.plan.memories.end()) {
    fmt::print("strait's channels in files lie in {}.\n", std::filesystem::temp_directory_path().string());
  }
  if (chosen.plan.rounds < 9 || chosen.plan.quick) fmt::print("A short run: to see that it works, not how fast.\n");
  fmt::print("\n");
  std::fflush(stdout);

  bench::line_probe line{conductor};
  std::vector<bench::row> rows;
  status_line status{chosen.plan.rounds};
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    status.begin(i + 1, wanted.size(), wanted[i]->name);
    const auto found = bench::run_case(conductor, line, *wanted[i], chosen.plan,
                                       [&](unsigned round, std::string_view subject) { status.show(round, subject); });
    status.clear();
    fmt::print("{}\n", bench::table(found));
    std::fflush(stdout);
    rows.insert(rows.end(), found.begin(), found.end());
  }
  fmt::print("{}", bench::where_the_cpus_were(rows));
  if (const std::string text = bench::promises(rows); !text.empty()) {
    fmt::print("What strait promises (best round against best round):\n{}\n", text);
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
  fmt::print("Every message came whole, once and in order. {:.0f} s.\n", took.count());
  if (file) {
    file->write(bench::json(rows));
    fmt::print("{} rows written to {}.\n", rows.size(), chosen.json);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  // Started by itself, as the producer or the consumer of one subject?
  if (const int status = bench::run_end(argc, argv); status >= 0) return status;
  ::signal(SIGPIPE, SIG_IGN);
  try {
    const options chosen = parse(argc, argv);
    if (chosen.help) {
      fmt::print("{}", usage);
      return 0;
    }
    return demonstrate(chosen);
  } catch (const usage_error& wrong) {
    fmt::print(stderr, "strait-demo: {}\n", wrong.what());
    return 2;
  } catch (const bench::interrupted& by) {
    fmt::print(stderr, "strait-demo: interrupted; both processes are ended, nothing is left behind\n");
    return 128 + by.signal;
  } catch (const std::exception& problem) {
    fmt::print(stderr, "strait-demo: {}\n", problem.what());
    return 1;
  }
}
