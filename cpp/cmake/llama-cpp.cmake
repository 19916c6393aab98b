# Where the patched llama.cpp comes from: prepare_llama_cpp.py makes the tree, this asks it to, and again when
# the lock, the series or a patch changes.

set(MELT_LOCK    ${CMAKE_CURRENT_SOURCE_DIR}/llama.cpp.lock)
set(MELT_PATCHES ${CMAKE_CURRENT_SOURCE_DIR}/patches)
set(MELT_PREPARE ${CMAKE_CURRENT_SOURCE_DIR}/cmake/prepare_llama_cpp.py)

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)

# melt_read_lock(<key> <out>): one value of the lock file
function(melt_read_lock key out)
    file(STRINGS ${MELT_LOCK} line REGEX "^${key} *=")
    string(REGEX REPLACE "^${key} *= *([^ ]+).*" "\\1" value "${line}")
    set(${out} ${value} PARENT_SCOPE)
endfunction()

# melt_prepare_llama_cpp(<tree>): makes the patched tree in the build folder
function(melt_prepare_llama_cpp tree)
    file(GLOB patches CONFIGURE_DEPENDS ${MELT_PATCHES}/*.patch)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
        ${MELT_LOCK} ${MELT_PREPARE} ${MELT_PATCHES}/series ${patches})

    set(dest ${CMAKE_BINARY_DIR}/llama.cpp)
    set(local "")
    if (MELT_LLAMA_CPP_DIR)
        set(local --local ${MELT_LLAMA_CPP_DIR})
    endif()
    execute_process(
        COMMAND ${Python_EXECUTABLE} ${MELT_PREPARE} tree ${dest} ${local}
        OUTPUT_QUIET
        ERROR_VARIABLE  error ECHO_ERROR_VARIABLE
        RESULT_VARIABLE result)
    if (NOT result EQUAL 0)
        message(FATAL_ERROR "llama.cpp could not be prepared: ${error}")
    endif()

    set(${tree} ${dest} PARENT_SCOPE)
endfunction()

# melt_sources_sha256(<out>): changes with every byte of the patches and of our own sources. runtime/library.py
# computes the same, and refuses a library that was built from others.
function(melt_sources_sha256 out)
    cmake_path(GET CMAKE_CURRENT_FUNCTION_LIST_DIR PARENT_PATH cpp)
    file(GLOB files CONFIGURE_DEPENDS ${cpp}/patches/series ${cpp}/patches/*.patch ${cpp}/src/*.cpp ${cpp}/src/*.h)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${files})

    set(lines "")
    foreach (path IN LISTS files)
        file(SHA256 ${path} digest)
        cmake_path(GET path FILENAME name)
        list(APPEND lines "${name} ${digest}\n")
    endforeach()
    list(SORT lines)
    list(JOIN lines "" lines)
    string(SHA256 digest "${lines}")

    set(${out} ${digest} PARENT_SCOPE)
endfunction()
