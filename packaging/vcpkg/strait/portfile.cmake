# An overlay port (docs/18-consuming.md). Untested: vcpkg was not at hand. It builds the source beside it, and needs a triplet
# whose compiler is clang 19 or newer (VCPKG_CHAINLOAD_TOOLCHAIN_FILE).
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

vcpkg_check_features(OUT_FEATURE_OPTIONS features FEATURES mimalloc STRAIT_MIMALLOC)
vcpkg_find_acquire_program(PKGCONFIG)
vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS
    ${features}
    -DSTRAIT_TESTS=OFF
    -DSTRAIT_BENCH=OFF
    -DSTRAIT_EXAMPLES=OFF
    -DSTRAIT_TOOL=OFF
    -DSTRAIT_WARNINGS_AS_ERRORS=OFF
    "-DPKG_CONFIG_EXECUTABLE=${PKGCONFIG}")
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME strait CONFIG_PATH lib/cmake/strait)

# The interfaces are the same for both configurations.
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/debug/include" "${CURRENT_PACKAGES_DIR}/debug/share")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
