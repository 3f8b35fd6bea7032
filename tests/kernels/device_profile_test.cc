#include "kernels/device_profile.h"

#include <gtest/gtest.h>

namespace tandem::kernels {
namespace {

DeviceProfile profile(DeviceType type) {
  DeviceProfile p;
  p.type = type;
  return p;
}

TEST(ComputeDtypes, F16IsAGpusAlone) {
  EXPECT_TRUE(offers(profile(DeviceType::kCuda), DType::kF16));
  EXPECT_FALSE(offers(profile(DeviceType::kCpu), DType::kF16));
  for (const DeviceType type : {DeviceType::kCpu, DeviceType::kCuda})
    for (const DType dtype : {DType::kF32, DType::kBF16})
      EXPECT_EQ(parse_compute_dtype(profile(type), dtype_name(dtype)).value(), dtype);
  EXPECT_EQ(parse_compute_dtype(profile(DeviceType::kCuda), "f16").value(), DType::kF16);
}

TEST(ComputeDtypes, WhatADeviceHasNotIsRefusedByNameWithWhatItHas) {
  const auto cpu = parse_compute_dtype(profile(DeviceType::kCpu), "f16").status();
  EXPECT_EQ(cpu.code(), StatusCode::kRefused);
  EXPECT_EQ(cpu.message(), "dtype f16: a CPU computes in f32 and bf16");
}

TEST(ComputeDtypes, AnUnknownWordNamesTheNearest) {
  const DeviceProfile gpu = profile(DeviceType::kCuda);
  const std::pair<const char*, const char*> cases[] = {
      {"fp16", "f16"}, {"float16", "f16"}, {"half", "f16"}, {"bfloat16", "bf16"}, {"fp32", "f32"}};
  for (const auto& [word, meant] : cases) {
    const auto status = parse_compute_dtype(gpu, word).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalid) << word;
    EXPECT_EQ(status.message(), str("dtype \"", word, "\" is unknown; did you mean \"", meant,
                                    "\"? (a GPU computes in f32, bf16 and f16)"));
  }
  const auto status = parse_compute_dtype(gpu, "i32").status();  // a dtype, but none to compute in
  EXPECT_EQ(status.code(), StatusCode::kInvalid);
}

TEST(StoredFloats, RoundTripsKeepWhatTheDtypeHolds) {
  const std::vector<float> values{0.0f, -0.0f, 1.0f, -1.5f, 65504.0f, 0x1p-24f, 0x1p-14f};
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    // One byte off: tensors in files are not aligned.
    std::vector<std::byte> bytes(1 + values.size() * static_cast<std::size_t>(dtype_bytes(dtype)));
    store_floats(values, dtype, bytes.data() + 1);
    std::vector<float> again(values.size());
    load_floats(bytes.data() + 1, dtype, again);
    for (std::size_t e = 0; e < values.size(); ++e)
      EXPECT_EQ(again[e], rounded(values[e], dtype)) << dtype_name(dtype) << " " << values[e];
  }
  EXPECT_EQ(rounded(65504.0f, DType::kBF16), 65536.0f);
  EXPECT_EQ(rounded(65504.0f, DType::kF16), 65504.0f);
  EXPECT_TRUE(rounded(70000.0f, DType::kF16) > 1e30f);  // infinite
}

}  // namespace
}  // namespace tandem::kernels
