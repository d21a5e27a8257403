#!/usr/bin/env bash
# Builds strait's consumers from scratch, as a stranger would: from a source archive, knowing nothing of our build.
#
#     consume.sh SOURCE WORK COMPILER package              the archive, the installation and the Debian package
#     consume.sh SOURCE WORK COMPILER WAY LANGUAGE [TYPE]  the project tests/consumers/WAY; WAY may be `debian`, too
#     consume.sh SOURCE WORK COMPILER complaints           what must not work says what to change
#
# All but the first need what the first leaves in WORK. LANGUAGE is `default` for what CMake does when nobody says
# anything, or c++20, gnu++20, c++23, gnu++23; TYPE is CMake's build type, none when nobody says it. What fails stays in WORK.
set -euo pipefail
export LC_ALL=C
unset CXXFLAGS CMAKE_PREFIX_PATH strait_DIR

source=$1
work=$2
compiler=$3
what=$4

die() {
  printf 'consume.sh: %s\n' "$@" >&2
  exit 1
}

# configure FOLDER ARGUMENT...: what a stranger types.
configure() { cmake -S "$1" -B "$1/build" "${@:2}"; }
with_ninja=(-G Ninja "-DCMAKE_CXX_COMPILER=$compiler")
readonly programs=(asio_first strait_first without_asio)

# project WAY NAME: a fresh copy of the project, outside of our source.
project() {
  rm -rf "${work:?}/$2"
  mkdir -p "$work/$2"
  cp -r "$source/tests/consumers/$1/." "$source/tests/consumers/programs" "$work/$2"
  [[ $1 != subdirectory ]] || { mkdir "$work/$2/strait" && tar -xf "$work/strait.tar" -C "$work/$2/strait" --strip-components=1; }
}

# language NAME: CMake's options for it.
language() {
  case $1 in
    default) ;;
    gnu++*) printf '%s\n' "-DCMAKE_CXX_STANDARD=${1#gnu++}" ;;
    c++*) printf '%s\n' "-DCMAKE_CXX_STANDARD=${1#c++}" -DCMAKE_CXX_EXTENSIONS=OFF ;;
    *) die "unknown language: expected default, c++20, gnu++20, c++23 or gnu++23, found '$1'" ;;
  esac
}

# found WAY: how that project is told where strait is.
found() {
  case $1 in
    installed) printf '%s\n' "-DCMAKE_PREFIX_PATH=$work/prefix" ;;
    debian) printf '%s\n' "-DCMAKE_PREFIX_PATH=$work/root/usr" ;;
    fetchcontent) printf '%s\n' "-DSTRAIT_URL=$work/strait.tar" ;;
    subdirectory) ;;
    *) die "unknown way: expected installed, debian, fetchcontent or subdirectory, found '$1'" ;;
  esac
}

package() {
  rm -rf "${work:?}"
  mkdir -p "$work"
  tar -cf "$work/strait.tar" -C "$source" --exclude-vcs --exclude=./build --transform 's,^\.,strait,' .
  mkdir "$work/strait"
  tar -xf "$work/strait.tar" -C "$work/strait" --strip-components=1

  # With /usr as the prefix the folders are Debian's own.
  DEBFULLNAME='A Stranger' DEBEMAIL=stranger@example.org \
    configure "$work/strait" "${with_ninja[@]}" -DCMAKE_INSTALL_PREFIX=/usr -DCMAKE_BUILD_TYPE=Release \
    -DSTRAIT_TESTS=OFF -DSTRAIT_BENCH=OFF -DSTRAIT_EXAMPLES=OFF
  cmake --build "$work/strait/build"
  cmake --install "$work/strait/build" --prefix "$work/prefix"
  (cd "$work/strait/build" && cpack -G DEB)
  mv "$work"/strait/build/libstrait-dev_*.deb "$work/libstrait-dev.deb"
  mv "$work"/strait/build/strait_*.deb "$work/strait.deb"
  rm -rf "${work:?}/strait"

  # What a package carries to its users must hold for their compiler and on their machine.
  if grep -rnE -e '-Werror|-Wall' "$work/prefix" --include='*.cmake'; then die "the installation carries our warnings"; fi
  if grep -rnF "$work" "$work/prefix"; then die "the installation carries paths of our build"; fi
}

# inspect_debian PACKAGE DEPENDENCY...: what the package says of itself is true, and apt would install it.
inspect_debian() {
  local package=$1 deb=$work/$1.deb name
  shift
  dpkg-deb --info "$deb"
  dpkg-deb --contents "$deb"
  [[ $(dpkg-deb -f "$deb" Package) == "$package" ]] || die "expected the package $package, found another name"
  name=$(dpkg-deb -f "$deb" Maintainer)
  [[ $name == 'A Stranger <stranger@example.org>' ]] || die "expected its maker as its maintainer, found '$name'"
  for name in "$@"; do
    [[ $(dpkg-deb -f "$deb" Depends) == *"$name"* ]] || die "expected a dependency on $name, found none"
  done
  # apt is the judge of the dependencies; it only says what it would do.
  apt-get install --simulate --no-install-recommends "$deb" | tee "$work/simulated"
  grep -q "^Inst $package " "$work/simulated" || die "apt would not install the package $package"
  if grep -E '^Inst ' "$work/simulated" | grep -v "^Inst $package "; then
    die "the package $package depends on what its own build did not need"
  fi
  dpkg-deb -x "$deb" "$work/root"
}

# consume WAY LANGUAGE [TYPE]
consume() {
  local name=$1-$2${3:+-$3} options program
  if [[ $1 == debian ]]; then
    rm -rf "${work:?}/root"
    inspect_debian libstrait-dev libasio-dev libhwloc-dev libmimalloc-dev pkg-config
    inspect_debian strait libc6 libhwloc
    "$work/root/usr/bin/strait" ls --json
    project installed "$name"
  else
    project "$1" "$name"
  fi
  mapfile -t options < <(language "$2" && found "$1")
  configure "$work/$name" "${with_ninja[@]}" "${options[@]}" ${3:+"-DCMAKE_BUILD_TYPE=$3"}
  cmake --build "$work/$name/build"
  for program in "${programs[@]}"; do
    "$work/$name/build/$program"
    printf '%s: ran\n' "$program"
  done
  rm -rf "${work:?}/$name"
}

# complains EXPECTED ARGUMENT...: configuring the project `complaints` fails and says so.
complains() {
  local expected=$1 said
  shift
  rm -rf "$work/complaints/build"
  if said=$(configure "$work/complaints" "$@" 2>&1); then
    die "expected a complaint with '$expected', found that it was configured:" "$said"
  fi
  said=$(tr -s ' \n' ' ' <<<"$said")  # CMake breaks lines
  [[ $said == *"$expected"* ]] || die "expected '$expected', found:" "$said"
  printf 'complained: %s\n' "$expected"
}

complaints() {
  local way options
  for way in installed subdirectory; do
    project "$way" complaints
    mapfile -t options < <(found "$way")
    if command -v make >/dev/null; then
      complains 'expected Ninja, found Unix Makefiles. Configure with -G Ninja' \
        -G 'Unix Makefiles' "-DCMAKE_CXX_COMPILER=$compiler" "${options[@]}"
    fi
    if command -v g++ >/dev/null; then
      complains 'expected Clang 19 or newer, found GNU' -G Ninja -DCMAKE_CXX_COMPILER=g++ "${options[@]}"
    fi
    complains 'expected it beside' "${with_ninja[@]}" "${options[@]}" -DCMAKE_CXX_COMPILER_CLANG_SCAN_DEPS=
    complains 'expected CMAKE_CXX_SCAN_FOR_MODULES to be ON' "${with_ninja[@]}" "${options[@]}" \
      -DCMAKE_CXX_SCAN_FOR_MODULES=OFF

    printf '%s\n' 'set_target_properties(without_asio PROPERTIES CXX_STANDARD 23)' >>"$work/complaints/CMakeLists.txt"
    complains 'expected gnu++20, with which strait'"'"'s interfaces are compiled, found gnu++23' \
      "${with_ninja[@]}" "${options[@]}"
    project "$way" complaints
    printf '%s\n' 'target_compile_features(without_asio PRIVATE cxx_std_23)' >>"$work/complaints/CMakeLists.txt"
    complains 'found gnu++23. Set CMAKE_CXX_STANDARD' "${with_ninja[@]}" "${options[@]}"
    configure "$work/complaints" "${with_ninja[@]}" "${options[@]}" -DCMAKE_CXX_STANDARD=23
    project "$way" complaints
    printf '%s\n' 'set_target_properties(without_asio PROPERTIES CXX_EXTENSIONS OFF)' >>"$work/complaints/CMakeLists.txt"
    complains 'found c++20' "${with_ninja[@]}" "${options[@]}"

    project "$way" complaints
    sed -i 's/^cmake_minimum_required(.*/cmake_minimum_required(VERSION 3.20)/' "$work/complaints/CMakeLists.txt"
    complains 'expected cmake_minimum_required(VERSION 3.28) or newer, found 3.20' "${with_ninja[@]}" "${options[@]}"
    configure "$work/complaints" "${with_ninja[@]}" "${options[@]}" -DCMAKE_CXX_SCAN_FOR_MODULES=ON
  done

  # The library holds parts of the Asio that it was compiled with.
  project installed complaints
  mkdir -p "$work/complaints/other/asio"
  touch "$work/complaints/other/asio.hpp"
  printf '#define ASIO_VERSION 109900\n' >"$work/complaints/other/asio/version.hpp"
  complains 'with which this strait was compiled, found another' "${with_ninja[@]}" \
    "-DCMAKE_PREFIX_PATH=$work/prefix" "-DSTRAIT_ASIO_INCLUDE_DIR=$work/complaints/other"
  rm -rf "${work:?}/complaints"
}

case $what in
  package) package ;;
  complaints) complaints ;;
  *) consume "$what" "${@:5}" ;;
esac
