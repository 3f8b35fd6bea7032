// Private to kernels/cuda: what a thread of a row-wise kernel takes at a time, 16 bytes where rows
// allow it, else one element.
#pragma once

#include "kernels/cuda/device.cuh"

#include <cstdint>
#include <initializer_list>

namespace tandem::kernels::cuda {

template <class T, bool kVector>
struct Chunk {
  static constexpr int kSize = kVector ? Vec<T>::kSize : 1;
  T at[kSize];
  __device__ static Chunk load(const T* p) {
    Chunk c;
    if constexpr (kVector) {
      const Vec<T> v = load_vec(p);
#pragma unroll
      for (int i = 0; i < kSize; ++i) c.at[i] = v.at[i];
    } else {
      c.at[0] = *p;
    }
    return c;
  }
  __device__ void store(T* p) const {
    if constexpr (kVector) {
      Vec<T> v;
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.at[i] = at[i];
      store_vec(p, v);
    } else {
      *p = at[0];
    }
  }
};

/// Whether rows of `row_bytes` from these pointers on are whole 16-byte words.
inline bool aligned(std::initializer_list<const void*> pointers, std::int64_t row_bytes) {
  std::uintptr_t bits = static_cast<std::uintptr_t>(row_bytes);
  for (const void* p : pointers) bits |= reinterpret_cast<std::uintptr_t>(p);
  return bits % 16 == 0;
}

}  // namespace tandem::kernels::cuda
