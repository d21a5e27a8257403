# The listings of README.md and docs/ are compiled, and those with a main are run: `listing-docs-channel-1` is the first
# of docs/02-channel.md; a page's number may change. How a page hides what a listing needs: tools/listings.awk.
#
# They are extracted when CMake runs, because only then is it known how many there are; a changed page runs it again.
if(STRAIT_SANITIZER)
  return()  # they show the interface; what a sanitizer could find is in the tests of the rooms
endif()

find_program(STRAIT_AWK NAMES awk mawk gawk REQUIRED)
set(script "${PROJECT_SOURCE_DIR}/tools/listings.awk")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${script}")
file(GLOB pages CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/README.md")
file(GLOB_RECURSE book CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/docs/*.md")
list(APPEND pages ${book})

set(listings_dir "${CMAKE_CURRENT_BINARY_DIR}/listings")
set(fresh "${listings_dir}/fresh")
file(REMOVE_RECURSE "${fresh}")
file(MAKE_DIRECTORY "${fresh}")
set(compiled)
foreach(page IN LISTS pages)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${page}")
  file(RELATIVE_PATH name "${PROJECT_SOURCE_DIR}" "${page}")
  string(REGEX REPLACE "\\.md$" "" name "${name}")
  string(REGEX REPLACE "/[0-9]+-" "/" name "${name}")
  string(REPLACE "/" "-" name "${name}")
  execute_process(
    COMMAND "${STRAIT_AWK}" -v "page=${page}" -v "name=${name}" -v "into=${fresh}" -f "${script}" "${page}"
    OUTPUT_VARIABLE found ERROR_VARIABLE complaint RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "listings: ${complaint}")
  endif()
  string(REGEX MATCHALL "[^\n]+" found "${found}")
  foreach(line IN LISTS found)
    string(REGEX MATCH "^(run|compile) (.+)$" line "${line}")
    set(listing "${CMAKE_MATCH_2}")
    set(source "${listings_dir}/${listing}.cpp")
    # What is the same stays untouched, and is not compiled again.
    file(COPY_FILE "${fresh}/${listing}.cpp" "${source}" ONLY_IF_DIFFERENT)
    if(CMAKE_MATCH_1 STREQUAL "run")
      add_executable(test-listing-${listing} "${source}")
      target_link_libraries(test-listing-${listing} PRIVATE strait::strait fmt::fmt)
      strait_warnings(test-listing-${listing})
      strait_in_no_hurry(test-listing-${listing})
      add_test(NAME listing-${listing} COMMAND test-listing-${listing})
      set_tests_properties(listing-${listing} PROPERTIES LABELS listings TIMEOUT 60)
      if(name STREQUAL "docs-asio")
        set_property(TEST listing-${listing} APPEND PROPERTY LABELS asio)  # what the page shows, each version of it does
      endif()
    else()
      list(APPEND compiled "${source}")
    endif()
  endforeach()
endforeach()
if(compiled)
  add_library(test-listings OBJECT ${compiled})
  target_link_libraries(test-listings PRIVATE strait::strait fmt::fmt)
  target_include_directories(test-listings PRIVATE "${PROJECT_SOURCE_DIR}")  # docs/17-examples.md includes from examples/
  strait_warnings(test-listings)
  strait_in_no_hurry(test-listings)
endif()
