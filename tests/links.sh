#!/usr/bin/env bash
# Every link within the book resolves: in each page, to a file and to a heading in it; and each page that a comment names.
# usage: links.sh SOURCE_DIR
set -uo pipefail
cd "$1" || exit 1

mapfile -t pages < <(find README.md docs examples tests -name '*.md' | sort)
mapfile -t sources < <(find dev CMakeLists.txt bench cmake examples include modules packaging runtime tests tools \
  -type f ! -name '*.md' | sort)

# Prints PAGE:LINE TARGET for each link, and PAGE#ANCHOR for each heading, as GitHub makes it: lower case, blanks to
# hyphens, everything else but letters, digits, hyphens and underscores left out. What stands in fences and between backticks is no link.
read_pages() {
  awk '
    FNR == 1 {fence = ""}
    match($0, /^ *```+/) {
      mark = $0; sub(/^ */, "", mark); sub(/[^`].*$/, "", mark)
      if (fence == "") fence = mark; else if (length(mark) >= length(fence)) fence = ""
      next
    }
    fence != "" {next}
    /^#+ / {
      anchor = tolower($0); sub(/^#+ /, "", anchor)
      gsub(/[^a-z0-9 _-]/, "", anchor); gsub(/ /, "-", anchor)
      print "heading", FILENAME "#" anchor
    }
    {
      text = $0; gsub(/`[^`]*`/, "", text)
      while (match(text, /\]\([^) ]+\)/)) {
        print "link", FILENAME ":" FNR, substr(text, RSTART + 2, RLENGTH - 3)
        text = substr(text, RSTART + RLENGTH)
      }
    }' "${pages[@]}"
}

declare -A headings=()
links=()
while read -r kind first rest; do
  case $kind in
    heading) headings[$first]=1 ;;
    link) links+=("$first $rest") ;;
  esac
done < <(read_pages)

failures=0
missing() {  # WHERE TARGET
  printf 'FAILED: %s: expected a file or heading %s, found none\n' "$1" "$2"
  failures=$((failures + 1))
}

for link in "${links[@]}"; do
  where=${link%% *} target=${link#* }
  page=${where%:*}
  case $target in
    *://* | mailto:*) continue ;;
    \#*) file=$page ;;
    *) file=$(realpath -m --relative-to=. "$(dirname "$page")/${target%%#*}") ;;
  esac
  if [[ ! -e $file ]] || [[ $target == *#* && -z ${headings[$file#${target#*#}]:-} ]]; then missing "$where" "$target"; fi
done

named=0
while IFS=: read -r source line target; do
  named=$((named + 1))
  [[ -e $target ]] || missing "$source:$line" "$target"
done < <(grep -noE '\bdocs/[A-Za-z0-9_/-]+\.md' /dev/null "${sources[@]}")

# A reader of pages that finds nothing would be content with everything.
((${#links[@]} > 50 && named > 5)) || { echo "FAILED: found only ${#links[@]} links and $named pages in comments"; failures=$((failures + 1)); }
((failures == 0)) || exit 1
echo "${#links[@]} links and $named pages in comments, all there"
