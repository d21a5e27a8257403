# What whoever imports strait must have, whether its source is a part of the build or it comes installed. Sets
# STRAIT_UNMET to a sentence that names the missing thing, what was found and the setting that helps; empty when all is
# well. Included, not called: a function would see the policies of this file instead of its user's.
#
# STRAIT_SCANS_IMPORTS: the user's policy CMP0155, and STRAIT_USERS_MINIMUM, his cmake_minimum_required: set beforehand by
# those who had to change them.
set(STRAIT_UNMET "")
if(NOT DEFINED STRAIT_SCANS_IMPORTS)
  set(STRAIT_SCANS_IMPORTS "")
  if(POLICY CMP0155)
    cmake_policy(GET CMP0155 STRAIT_SCANS_IMPORTS)
  endif()
  set(STRAIT_USERS_MINIMUM "${CMAKE_MINIMUM_REQUIRED_VERSION}")
endif()

if(CMAKE_VERSION VERSION_LESS 3.28)
  string(CONCAT STRAIT_UNMET "C++20 modules need CMake: expected 3.28 or newer, found ${CMAKE_VERSION}. On Debian 12 it "
    "comes from the backports: apt-get install -t bookworm-backports cmake")
elseif(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang" OR CMAKE_CXX_COMPILER_VERSION VERSION_LESS 19)
  string(CONCAT STRAIT_UNMET "C++20 modules need clang: expected Clang 19 or newer, found "
    "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}. Configure with -DCMAKE_CXX_COMPILER=clang++-19")
elseif(NOT CMAKE_GENERATOR MATCHES "^Ninja")
  string(CONCAT STRAIT_UNMET "C++20 modules need the generator: expected Ninja, found ${CMAKE_GENERATOR}. "
    "Configure with -G Ninja")
elseif(NOT CMAKE_CXX_COMPILER_CLANG_SCAN_DEPS)
  string(CONCAT STRAIT_UNMET "C++20 modules need clang-scan-deps, which looks for imports: expected it beside "
    "${CMAKE_CXX_COMPILER}, found none. On Debian: apt-get install clang-tools-19, then configure in an empty folder, "
    "or with -DCMAKE_CXX_COMPILER_CLANG_SCAN_DEPS=PATH")
elseif(DEFINED CMAKE_CXX_SCAN_FOR_MODULES AND NOT CMAKE_CXX_SCAN_FOR_MODULES)
  string(CONCAT STRAIT_UNMET "this project's files are not scanned for imports: expected CMAKE_CXX_SCAN_FOR_MODULES to "
    "be ON, found ${CMAKE_CXX_SCAN_FOR_MODULES}")
elseif(NOT DEFINED CMAKE_CXX_SCAN_FOR_MODULES AND NOT STRAIT_SCANS_IMPORTS STREQUAL "NEW")
  string(CONCAT STRAIT_UNMET "this project's files are not scanned for imports: expected cmake_minimum_required(VERSION "
    "3.28) or newer, found ${STRAIT_USERS_MINIMUM}. Where that must stay: set(CMAKE_CXX_SCAN_FOR_MODULES ON) "
    "before the targets that import strait")
endif()
