// Always-on checks for bugs. A failed check prints the expression, both values and the place, then
// aborts: the process is disposable, its data is not. User input never reaches a check; what can be
// expected (not found, full, corrupt, bad request) is a Status.
#pragma once

#include "protocol/base/str.h"

#include <cstdlib>
#include <iostream>

namespace tandem {

[[noreturn]] inline void check_failed(const char* file, int line, const std::string& what) {
  std::cerr << "CHECK failed at " << file << ":" << line << ": " << what << std::endl;
  std::abort();
}

}  // namespace tandem

/// TANDEM_CHECK(condition, "what", value, ...) aborts with the message when the condition is false.
#define TANDEM_CHECK(condition, ...)                                                     \
  do {                                                                                   \
    if (!(condition)) [[unlikely]]                                                       \
      ::tandem::check_failed(__FILE__, __LINE__,                                         \
                             ::tandem::str(#condition, " " __VA_OPT__(, ) __VA_ARGS__)); \
  } while (false)

#define TANDEM_CHECK_OP(a, op, b, ...)                                                        \
  do {                                                                                        \
    const auto& tandem_check_a = (a);                                                         \
    const auto& tandem_check_b = (b);                                                         \
    if (!(tandem_check_a op tandem_check_b)) [[unlikely]]                                     \
      ::tandem::check_failed(__FILE__, __LINE__,                                              \
                             ::tandem::str(#a " " #op " " #b " (", tandem_check_a, " vs ",    \
                                           tandem_check_b, ") " __VA_OPT__(, ) __VA_ARGS__)); \
  } while (false)

#define TANDEM_CHECK_EQ(a, b, ...) TANDEM_CHECK_OP(a, ==, b __VA_OPT__(, ) __VA_ARGS__)
#define TANDEM_CHECK_LT(a, b, ...) TANDEM_CHECK_OP(a, <, b __VA_OPT__(, ) __VA_ARGS__)
#define TANDEM_CHECK_LE(a, b, ...) TANDEM_CHECK_OP(a, <=, b __VA_OPT__(, ) __VA_ARGS__)
#define TANDEM_CHECK_GT(a, b, ...) TANDEM_CHECK_OP(a, >, b __VA_OPT__(, ) __VA_ARGS__)
#define TANDEM_CHECK_GE(a, b, ...) TANDEM_CHECK_OP(a, >=, b __VA_OPT__(, ) __VA_ARGS__)
