# Clang refuses to import an interface that was compiled for another language standard, in words that do not name the
# setting to change ("C++23 was disabled in PCH file"). So whoever links strait is looked at here, when all of the project
# has been read, and told in CMake's words.
#
#     strait_expect_agreement(STANDARD EXTENSIONS): with what the interfaces are compiled, as CMake's properties say it
function(strait_expect_agreement standard extensions)
  get_property(known GLOBAL PROPERTY STRAIT_STANDARD SET)
  if(known)
    return()
  endif()
  set_property(GLOBAL PROPERTY STRAIT_STANDARD "${standard}")
  set_property(GLOBAL PROPERTY STRAIT_EXTENSIONS "${extensions}")
  cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL strait_check_agreement "${CMAKE_SOURCE_DIR}")
endfunction()

# strait_language(STANDARD EXTENSIONS FEATURES OUT): such as gnu++20; no less than 20, because strait asks for that.
function(strait_language standard extensions features out)
  set(newest 20)
  string(REGEX MATCHALL "cxx_std_[0-9]+" wanted "${features}")
  list(TRANSFORM wanted REPLACE "cxx_std_" "")
  foreach(candidate ${standard} ${wanted})
    # 98 is older than 20.
    if(candidate MATCHES "^[0-9]+$" AND candidate LESS 90 AND candidate GREATER newest)
      set(newest ${candidate})
    endif()
  endforeach()
  # As CMake has it: extensions are on where nobody says otherwise.
  if("${extensions}" STREQUAL "" OR extensions)
    set(${out} "gnu++${newest}" PARENT_SCOPE)
  else()
    set(${out} "c++${newest}" PARENT_SCOPE)
  endif()
endfunction()

# strait_property(TARGET PROPERTY OUT): its value, empty when it has none.
function(strait_property target property out)
  get_property(value TARGET ${target} PROPERTY ${property})
  set(${out} "${value}" PARENT_SCOPE)
endfunction()

function(strait_check_agreement directory)
  get_property(standard GLOBAL PROPERTY STRAIT_STANDARD)
  get_property(extensions GLOBAL PROPERTY STRAIT_EXTENSIONS)
  strait_language("${standard}" "${extensions}" "" ours)
  get_property(targets DIRECTORY "${directory}" PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    strait_property(${target} TYPE type)
    strait_property(${target} LINK_LIBRARIES libraries)
    if(type STREQUAL "INTERFACE_LIBRARY" OR NOT libraries MATCHES "(^|;)strait(::strait)?(;|$)")
      continue()
    endif()
    strait_property(${target} CXX_STANDARD standard)
    strait_property(${target} CXX_EXTENSIONS extensions)
    strait_property(${target} COMPILE_FEATURES features)
    strait_language("${standard}" "${extensions}" "${features}" theirs)
    if(NOT theirs STREQUAL ours)
      message(SEND_ERROR "strait: the target ${target} cannot import strait, because clang wants one language on both "
        "sides: expected ${ours}, with which strait's interfaces are compiled, found ${theirs}. Set "
        "CMAKE_CXX_STANDARD and CMAKE_CXX_EXTENSIONS for the whole project, before strait is found or added, instead of "
        "CXX_STANDARD, CXX_EXTENSIONS or a compile feature for one target.")
    endif()
  endforeach()
  get_property(below DIRECTORY "${directory}" PROPERTY SUBDIRECTORIES)
  foreach(subdirectory IN LISTS below)
    strait_check_agreement("${subdirectory}")
  endforeach()
endfunction()
