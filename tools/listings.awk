# Takes the C++ listings out of a page, so that the tests compile them (tests/listings.cmake).
#
#     awk -v page=docs/02-channel.md -v name=docs-channel -v into=DIR -f tools/listings.awk FILE
#
# Writes each ```cpp block of FILE to DIR/NAME-1.cpp, DIR/NAME-2.cpp and so on, with #line pointing back to PAGE, and
# prints for each `run NAME-1` when it has an `int main(`, else `compile NAME-1`.
#
# What a listing needs but would bore a reader stands in comments around it, invisible on the page:
#
#     <!-- before:
#     #include <strait/asio.hpp>
#     -->
#
#     ```cpp
#     asio::awaitable<void> shown();
#     ```
#
#     <!-- after:
#     int main() {}
#     -->
#
# Includes come first and imports last, over the three parts together (docs/design/modules.md).

function fail(line, what) {
  printf "%s:%d: %s\n", page, line, what > "/dev/stderr"
  failed = 1
  exit 1
}

# Adds code from the page, with a #line where it begins.
function add(line, text) {
  if (line != next_line) code = code "#line " line " \"" page "\"\n"
  code = code text "\n"
  next_line = line + 1
}

function finish() {
  if (!listing) return
  file = into "/" name "-" count ".cpp"
  printf "%s", code > file
  close(file)
  # Not anchored: `int main(` may stand behind an attribute. A listing that only mentions it is not worth a parser.
  print (code ~ /int main\(/ ? "run " : "compile ") name "-" count
  listing = 0
  code = ""
  next_line = 0
}

{ sub(/\r$/, "") }

# In a comment that holds code.
comment {
  if ($0 ~ /^-->[ \t]*$/) comment = 0
  else add(FNR, $0)
  next
}

# In a fenced block of any language; only its own fence ends it.
fence != "" {
  text = $0
  sub(/^[ \t]+/, "", text)
  sub(/[ \t]+$/, "", text)
  if (text ~ /^`+$/ && length(text) >= length(fence)) {
    fence = ""
  } else if (shown) {
    # A block in a list is indented; its code is not.
    text = $0
    if (substr(text, 1, indent) ~ /^ *$/) text = substr(text, indent + 1)
    add(FNR, text)
  }
  next
}

/^<!--[ \t]*before:/ {
  finish()
  if ($0 !~ /before:[ \t]*$/) fail(FNR, "expected the code below `<!-- before:`, found it beside")
  comment = opened = FNR
  pending = FNR
  next
}

/^<!--[ \t]*after:/ {
  if (!listing) fail(FNR, "expected a cpp listing right before `<!-- after:`, found none")
  if ($0 !~ /after:[ \t]*$/) fail(FNR, "expected the code below `<!-- after:`, found it beside")
  comment = opened = FNR
  next
}

/^ *```+/ {
  finish()
  match($0, /`+/)
  indent = RSTART - 1
  fence = substr($0, RSTART, RLENGTH)
  language = substr($0, RSTART + RLENGTH)
  gsub(/[ \t]/, "", language)
  opened = FNR
  shown = language == "cpp"
  if (shown) {
    listing = ++count
    pending = 0
  } else if (pending) {
    fail(pending, "expected a cpp listing right after this, found another block")
  }
  next
}

# Prose: whatever belonged to the listing above has been seen.
/[^ \t]/ {
  if (pending) fail(pending, "expected a cpp listing right after this, found text")
  finish()
}

END {
  if (failed) exit 1
  if (comment) fail(opened, "expected a line `-->` to end this comment, found the end of the page")
  if (fence != "") fail(opened, "expected a fence to end this block, found the end of the page")
  if (pending) fail(pending, "expected a cpp listing right after this, found the end of the page")
  finish()
}
