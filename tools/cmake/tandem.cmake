# Helpers shared by every CMakeLists.txt of the project.

# Instrumented tests are many times slower.
set(TANDEM_TEST_SLOWNESS 1)
if(TANDEM_SANITIZE)
  set(TANDEM_TEST_SLOWNESS 20)
endif()
math(EXPR TANDEM_TEST_TIMEOUT "120 * ${TANDEM_TEST_SLOWNESS}")

# Warnings are errors in our own targets; foreign headers come in as SYSTEM.
function(tandem_options target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor
    -Woverloaded-virtual -Wunused -Werror -fno-omit-frame-pointer)
  target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR})
  if(TANDEM_SANITIZE)
    target_compile_options(${target} PUBLIC -fsanitize=${TANDEM_SANITIZE} -fno-sanitize-recover=all)
    target_link_options(${target} PUBLIC -fsanitize=${TANDEM_SANITIZE})
  endif()
  if(TANDEM_FUZZ)
    # Coverage for the fuzzers' guidance; only the targets themselves have libFuzzer's main.
    target_compile_options(${target} PRIVATE -fsanitize=fuzzer-no-link)
    target_link_options(${target} PUBLIC -fsanitize=fuzzer-no-link)
  endif()
  if(TANDEM_COVERAGE)
    target_compile_options(${target} PUBLIC --coverage)
    target_link_options(${target} PUBLIC --coverage)
  endif()
endfunction()

# tandem_library(NAME SOURCES a.cc ... PUBLIC deps... PRIVATE deps...): a static library named tandem_NAME.
function(tandem_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(tandem_${name} STATIC ${ARG_SOURCES})
  tandem_options(tandem_${name})
  target_link_libraries(tandem_${name} PUBLIC ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE})
endfunction()

# tandem_executable(NAME SOURCES ... LIBS ...): a program called NAME in build/<preset>/bin.
function(tandem_executable name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  tandem_options(${name})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
endfunction()

# tandem_test(NAME LABELS l... SOURCES ... LIBS ...): a GoogleTest program, registered as one CTest.
# Labels: unit (fast), golden, sim, system (starts processes), style, slow (only with --full).
function(tandem_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBS;LABELS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  tandem_options(${name})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gtest GTest::gtest_main)
  # One folder for all, so that they can travel to another machine together.
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin/tests)
  target_compile_definitions(${name} PRIVATE TANDEM_SOURCE_DIR="${PROJECT_SOURCE_DIR}"
    TANDEM_BIN_DIR="${CMAKE_BINARY_DIR}/bin")
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * ${TANDEM_TEST_SLOWNESS}")
  add_test(NAME ${name} COMMAND ${name})
  # Spinning OpenMP threads starve each other where tests share cores (50x slower was seen).
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "OMP_WAIT_POLICY=passive")
endfunction()

# tandem_mpi_test(NAME TARGET RANKS ARGS...): runs a test program as a gang of RANKS under mpirun. The
# variables are what root, more ranks than cores and idle ranks need (DESIGN section 10); containers that forbid
# reading another process's memory need the copy through shared memory.
function(tandem_mpi_test name target ranks)
  add_test(NAME ${name} COMMAND ${MPIEXEC_EXECUTABLE} -np ${ranks} --oversubscribe --bind-to none
    --mca btl vader,self --mca btl_vader_single_copy_mechanism none
    --mca odls_base_sigkill_timeout 0 $<TARGET_FILE:${target}> ${ARGN})
  set_tests_properties(${name} PROPERTIES LABELS unit TIMEOUT ${TANDEM_TEST_TIMEOUT} PROCESSORS 2
    ENVIRONMENT "OMP_WAIT_POLICY=passive;OMP_NUM_THREADS=1;OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_mpi_yield_when_idle=1")
endfunction()
