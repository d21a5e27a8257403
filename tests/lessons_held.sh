#!/usr/bin/env bash
# docs/design/lessons.md tells the truth: every test that it names exists, and no lesson is left out.
# usage: lessons_held.sh SOURCE_DIR CTEST BUILD_DIR
set -uo pipefail
cd "$1" || exit 1
readonly page=docs/design/lessons.md

# Every test that there is, as the page writes it, one a line. A name may stand on the line below its macro.
known=$'\n'
for file in tests/*.cpp; do
  known+=$(tr -s ' \n' ' ' <"$file" | grep -oE 'TEST_CASE(_TEMPLATE)?\( ?"[^"]*"' | sed -E "s#[^\"]*\"(.*)\"#${file#tests/}: \1#")$'\n'
done
known+=$("$2" --test-dir "$3" -N | sed -nE 's/^ *Test +#[0-9]+: /ctest /p')$'\n'

failures=0
fail() {
  printf 'FAILED: %s\n' "$*"
  failures=$((failures + 1))
}

tests=0
while IFS= read -r span; do
  tests=$((tests + 1))
  [[ $known == *$'\n'"$span"$'\n'* ]] || fail "expected a test \"$span\", found none"
done < <(grep '^|' "$page" | grep -oE '`([a-z_]+\.cpp: |ctest )[^`]+`' | tr -d '`')

for lesson in {1..36}; do
  row=$(grep -E "^\| $lesson \|" "$page")
  [[ $row == *.cpp:* || $row == *'ctest '* || $row == *'does not apply'* || $row == *'**not met**'* || $row == *'| the same |' ]] ||
    fail "expected a row for lesson $lesson with a test or a reason, found \"$row\""
done

((tests > 50)) || fail "expected more than 50 tests, found $tests"
((failures == 0)) || exit 1
echo "36 lessons, $tests tests, all there"
