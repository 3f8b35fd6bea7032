// Writes GGUF files of version 3 for tests: metadata, then f32 tensors.
#pragma once

#include "protocol/base/check.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::test {

class GgufWriter {
 public:
  void text(const std::string& key, const std::string& value) {
    begin(key, 8);
    put_text(metadata_, value);
  }
  void integer(const std::string& key, std::uint32_t value) {
    begin(key, 4);
    put(metadata_, value);
  }
  void number(const std::string& key, float value) {
    begin(key, 6);
    put(metadata_, value);
  }
  void boolean(const std::string& key, bool value) {
    begin(key, 7);
    metadata_ += value ? '\1' : '\0';
  }
  void texts(const std::string& key, const std::vector<std::string>& values) {
    begin(key, 9);
    put(metadata_, std::uint32_t{8});
    put(metadata_, static_cast<std::uint64_t>(values.size()));
    for (const std::string& value : values) put_text(metadata_, value);
  }
  /// Shape as Hugging Face has it; the file has it backwards.
  void tensor(const std::string& name, const std::vector<std::int64_t>& shape,
              const std::vector<float>& values) {
    put_text(infos_, name);
    put(infos_, static_cast<std::uint32_t>(shape.size()));
    for (auto d = shape.rbegin(); d != shape.rend(); ++d)
      put(infos_, static_cast<std::uint64_t>(*d));
    put(infos_, std::uint32_t{0});  // f32
    put(infos_, static_cast<std::uint64_t>(data_.size()));
    for (const float value : values) put(data_, value);
    pad(data_);
    ++tensors_;
  }
  [[nodiscard]] std::string bytes() const {
    std::string file = "GGUF";
    put(file, std::uint32_t{3});
    put(file, tensors_);
    put(file, keys_);
    file += metadata_ + infos_;
    pad(file);
    return file + data_;
  }

 private:
  template <class T>
  static void put(std::string& to, T value) {
    to.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  static void put_text(std::string& to, std::string_view text) {
    put(to, static_cast<std::uint64_t>(text.size()));
    to += text;
  }
  static void pad(std::string& to) { to.resize((to.size() + 31) / 32 * 32); }
  void begin(const std::string& key, std::uint32_t type) {
    put_text(metadata_, key);
    put(metadata_, type);
    ++keys_;
  }

  std::string metadata_, infos_, data_;
  std::uint64_t keys_ = 0, tensors_ = 0;
};

}  // namespace tandem::test
