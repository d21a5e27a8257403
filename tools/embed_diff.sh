#!/usr/bin/env bash
# The difference that moderation makes to the chat server of examples/embed, as docs/17-examples.md shows it.
#
#     tools/embed_diff.sh             prints it
#     tools/embed_diff.sh --write     puts it into the page
#     tools/embed_diff.sh --check     fails when the page shows another one, or when it is 20 added lines or more
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

readonly page=docs/17-examples.md
readonly begin='<!-- the output of tools/embed_diff.sh -->'

made() {
  local status=0
  diff -U 2 --label chat_server.cpp --label chat_server_moderated.cpp \
    examples/embed/chat_server.cpp examples/embed/chat_server_moderated.cpp || status=$?
  ((status == 1))  # 0: no difference; 2: trouble
}

# The block behind the comment.
shown() { awk -v begin="$begin" '$0 == begin {found = 1; next} found && /^```/ {if (open) exit; open = 1; next} open' "$page"; }

case ${1:-} in
  "") made ;;
  --write)
    text=$(made) awk -v begin="$begin" '
      {if (!inside) print}
      $0 == begin {found = 1; next}
      found == 1 && /^```/ {print ENVIRON["text"]; inside = 1; found = 2; next}
      inside && /^```/ {inside = 0; print}' "$page" >"$page.new"
    mv "$page.new" "$page"
    ;;
  --check)
    diff <(shown) <(made) || { echo "$page shows another difference (<) than there is (>): tools/embed_diff.sh --write"; exit 1; }
    added=$(made | grep -c '^+[^+]\|^+$')
    ((added < 20)) || { echo "expected fewer than 20 added lines, found $added"; exit 1; }
    ;;
  *)
    echo "usage: tools/embed_diff.sh [--write | --check]" >&2
    exit 2
    ;;
esac
