# What `cmake --install` puts where, and the Debian packages of the same: `cpack -G DEB` (docs/18-consuming.md).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/strait)
set_target_properties(strait PROPERTIES EXPORT_NAME strait)
install(TARGETS strait EXPORT strait-targets COMPONENT strait
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILE_SET CXX_MODULES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/strait/modules)
install(EXPORT strait-targets COMPONENT strait NAMESPACE strait:: DESTINATION ${package_dir}
  CXX_MODULES_DIRECTORY modules)

configure_package_config_file(cmake/strait-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/strait-config.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# Before 1.0 a minor version may change what an importer sees.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/strait-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/strait-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/strait-config-version.cmake
  cmake/strait-requirements.cmake cmake/strait-agreement.cmake
  DESTINATION ${package_dir} COMPONENT strait)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/libstrait-dev RENAME copyright COMPONENT strait)

# Below another project its packages are its own business.
if(NOT PROJECT_IS_TOP_LEVEL)
  return()
endif()

# Two packages: libstrait-dev for those who build with strait, and the tool, for whose package a built library is enough.
# Whatever else a build installs does not get in by accident.
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME strait)
set(CPACK_PACKAGE_VENDOR strait)
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "")  # else it would stand before the summary of each package
set(CPACK_COMPONENTS_ALL strait)
if(STRAIT_TOOL)
  list(APPEND CPACK_COMPONENTS_ALL tool)
endif()
set(CPACK_COMPONENTS_GROUPING IGNORE)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_STRIP_FILES OFF)
set(CPACK_VERBATIM_VARIABLES ON)

# Whoever makes the package answers for it, as with Debian's own tools: DEBFULLNAME and DEBEMAIL, or the account.
set(maker "$ENV{DEBFULLNAME}")
set(address "$ENV{DEBEMAIL}")
foreach(name IN ITEMS "$ENV{LOGNAME}" "$ENV{USER}" root)
  if(maker STREQUAL "")
    set(maker "${name}")
  endif()
  if(address STREQUAL "" AND NOT name STREQUAL "")
    cmake_host_system_information(RESULT host QUERY FQDN)
    set(address "${name}@${host}")
  endif()
endforeach()
set(CPACK_PACKAGE_CONTACT "${maker} <${address}>")

set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_RELEASE 1)
set(CPACK_DEBIAN_PACKAGE_PRIORITY optional)

set(CPACK_DEBIAN_STRAIT_PACKAGE_NAME libstrait-dev)
set(CPACK_DEBIAN_STRAIT_PACKAGE_SECTION libdevel)
string(CONCAT CPACK_DEBIAN_STRAIT_DESCRIPTION
  "shared-memory channels you can co_await, on Asio (C++20 modules)\n"
  "Channels between coroutines in two threads, two NUMA nodes or two processes,\ninside ordinary Asio applications.\n"
  "This package contains the static library, the module interfaces, the header for\nAsio and the CMake package.")
# There is no program in it for dpkg-shlibdeps to look at. What the config file looks for is what is needed, and Asio
# in exactly the version of which the library holds compiled parts.
math(EXPR next "${patch} + 1")
set(depends "libasio-dev (>= 1:${major}.${minor}.${patch}), libasio-dev (<< 1:${major}.${minor}.${next}~)")
string(APPEND depends ", libhwloc-dev (>= 2.0)")
if(STRAIT_MIMALLOC)
  string(APPEND depends ", libmimalloc-dev (>= 2.0)")
endif()
if(STRAIT_ASIO_IO_URING)
  string(APPEND depends ", liburing-dev")
endif()
string(APPEND depends ", pkg-config | pkgconf")
set(CPACK_DEBIAN_STRAIT_PACKAGE_DEPENDS "${depends}")
# Whoever only unpacks or repackages it needs none of these; whoever builds with it needs all.
set(CPACK_DEBIAN_STRAIT_PACKAGE_RECOMMENDS "clang-19 | clang (>= 1:19), clang-tools-19 | clang-tools (>= 1:19), cmake (>= 3.28), ninja-build")
set(CPACK_DEBIAN_STRAIT_PACKAGE_SUGGESTS strait)

set(CPACK_DEBIAN_TOOL_PACKAGE_NAME strait)
set(CPACK_DEBIAN_TOOL_PACKAGE_SECTION utils)
string(CONCAT CPACK_DEBIAN_TOOL_DESCRIPTION
  "shows the shared-memory channels of strait on this machine\n"
  "Lists the channels between processes with their type, depth and ends, shows\ntheir rates, and removes what a crash left.")
# The shared libraries that it is linked with, as dpkg-shlibdeps (dpkg-dev) finds them.
set(CPACK_DEBIAN_TOOL_PACKAGE_SHLIBDEPS ON)
include(CPack)
