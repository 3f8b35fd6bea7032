#include "kernels/device_profile.h"

#include <algorithm>

namespace tandem::kernels {

std::vector<DType> compute_dtypes(const DeviceProfile& profile) {
  if (profile.type == DeviceType::kCuda) return {DType::kF32, DType::kBF16, DType::kF16};
  return {DType::kF32, DType::kBF16};
}

bool offers(const DeviceProfile& profile, DType dtype) {
  const auto all = compute_dtypes(profile);
  return std::find(all.begin(), all.end(), dtype) != all.end();
}

std::string dtype_names(const std::vector<DType>& dtypes) {
  std::string names;
  for (std::size_t d = 0; d < dtypes.size(); ++d)
    names += str(d == 0 ? "" : d + 1 == dtypes.size() ? " and " : ", ", dtype_name(dtypes[d]));
  return names;
}

Result<DType> parse_compute_dtype(const DeviceProfile& profile, const std::string& word) {
  const auto dtype = parse_dtype(word);
  if (dtype && offers(profile, *dtype)) return *dtype;
  const std::string computes = str(profile.type == DeviceType::kCuda ? "a GPU" : "a CPU",
                                   " computes in ", dtype_names(compute_dtypes(profile)));
  if (dtype && is_stored_float(*dtype)) return refused_error(str("dtype ", word, ": ", computes));
  const std::string meant = meant_dtype(word);
  return invalid_error(str("dtype \"", word, "\" is unknown",
                           meant.empty() ? "" : str("; did you mean \"", meant, "\"?"), " (",
                           computes, ")"));
}

}  // namespace tandem::kernels
