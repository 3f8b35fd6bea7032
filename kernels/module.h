// Parts of the program that need libraries not every machine has: shared modules beside the
// program, opened when they are wanted, so that one program runs with and without them and a
// missing library is an error message. C names, C++ types: both sides are built by one compiler
// from one tree, which the version checks.
#pragma once

#include "protocol/base/result.h"

#include <string>

namespace tandem::kernels {

/// Opens `file` (beside the program, or beside it in lib/, where the build and `install` put it)
/// and calls `entry`, a function without arguments that gives a table whose first member is the
/// module's version (const char*). Never closed. unavailable_error names `what`.
Result<const void*> open_module(const char* file, const char* entry, const char* what);

template <class Table>
Result<const Table*> open_module(const char* file, const char* entry, const char* what) {
  TANDEM_ASSIGN_OR_RETURN(const void* table, open_module(file, entry, what));
  return static_cast<const Table*>(table);
}

}  // namespace tandem::kernels
