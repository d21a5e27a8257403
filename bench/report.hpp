// What people and programs read.
#pragma once

#include <span>
#include <string>

#include "measure.hpp"

namespace bench {

/// The lines of one case, with its heading.
[[nodiscard]] std::string table(std::span<const row> rows);

/// The rows as a JSON array of flat objects; what does not apply is null.
[[nodiscard]] std::string json(std::span<const row> rows);

/// What a bare cache line took, and which figures may be held against each other for that. Empty when nobody looked.
[[nodiscard]] std::string where_the_cpus_were(std::span<const row> rows);

/// The ratios that strait promises, each with its target: of rates the best round of each side, of times the same.
/// Empty when the rows hold none of them.
[[nodiscard]] std::string promises(std::span<const row> rows);

}  // namespace bench
