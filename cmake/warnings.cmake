# Our warnings stay in our own build: what reaches an importer's flags would have to hold for his compiler, too.
function(strait_warnings target)
  target_compile_options(${target} PRIVATE
    $<BUILD_INTERFACE:-Wall> $<BUILD_INTERFACE:-Wextra> $<BUILD_INTERFACE:-Wpedantic> $<BUILD_INTERFACE:-Wconversion>)
  if(STRAIT_WARNINGS_AS_ERRORS)
    target_compile_options(${target} PRIVATE $<BUILD_INTERFACE:-Werror>)
  endif()
endfunction()
