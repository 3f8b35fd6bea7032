// Test only: a backend that fails when a file says so, as a device does whose kernel faulted or
// whose memory is out. Tests of real processes write the file while these run; see
// TANDEM_TEST_FAULT_FILE in worker/main.cc. Its text is one of
//   OP            every call of that op (an Ops method's name, linear_backward) throws DeviceError
//   OP once       the next call does; the file is removed before
//   memory BYTES  the allocator refuses to map more than BYTES in all
// No file: no fault.
#pragma once

#include "kernels/ops.h"

#include <string>

namespace tandem::kernels {

Backend with_faults(Backend backend, const std::string& file);

}  // namespace tandem::kernels
