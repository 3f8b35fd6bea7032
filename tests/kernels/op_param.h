// Parameters every op test shares: a backend that executes, the compute dtype, and a row of the
// test's own table of shapes.
#pragma once

#include "tests/support/op_harness.h"

#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

namespace tandem::kernels::testing {

using OpParam = std::tuple<std::string, DType, int>;

class OpTest : public ::testing::TestWithParam<OpParam> {
 protected:
  [[nodiscard]] static const std::string& backend() { return std::get<0>(GetParam()); }
  [[nodiscard]] static DType dtype() { return std::get<1>(GetParam()); }
  template <class Table>
  [[nodiscard]] static const auto& row(const Table& table) {
    return table[static_cast<std::size_t>(std::get<2>(GetParam()))];
  }
};

inline std::string op_param_name(const ::testing::TestParamInfo<OpParam>& info) {
  return std::get<0>(info.param) + "_" + dtype_name(std::get<1>(info.param)) + "_row" +
         std::to_string(std::get<2>(info.param));
}

/// Every executing backend, each compute dtype that it offers, and each of `rows` rows.
inline std::vector<OpParam> op_params(std::size_t rows) {
  std::vector<OpParam> params;
  for (const std::string& backend : executing_backends()) {
    DeviceProfile profile;
    profile.type = backend == "cuda" ? DeviceType::kCuda : DeviceType::kCpu;
    for (const DType dtype : compute_dtypes(profile))
      for (int row = 0; row < static_cast<int>(rows); ++row)
        params.emplace_back(backend, dtype, row);
  }
  return params;
}

/// TANDEM_OP_TEST(AddRmsNorm, kShapes) runs the suite with op_params and every row of the table.
#define TANDEM_OP_TEST(suite, table)                                                          \
  INSTANTIATE_TEST_SUITE_P(Backends, suite, ::testing::ValuesIn(op_params(std::size(table))), \
                           op_param_name)

}  // namespace tandem::kernels::testing
