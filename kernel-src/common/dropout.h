// The dropout mask and the input checks that the CPU and the CUDA op share.
//
// The mask is a function of (seed, row, column) alone, so that every backend, tile size and pass
// draws the same one and nothing is stored: Philox4x32-7 (Salmon et al. 2011,
// doi 10.1145/2063384.2063405, who find seven rounds enough for BigCrush) with key = seed and counter =
// (column / 8, row, row >> 32, 0). Its 128 bits are eight numbers of 16, low half first; number
// column % 8 keeps the element if it is at least p·2¹⁶, rounded: p is resolved to 2⁻¹⁷.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "host_device.h"

namespace lora_fused {

constexpr int kMaskColumns = 8;  // of one Philox block

struct Words {
  uint32_t word[4];
  LORA_FUSED_HD uint32_t number(int i) const { return i % 2 == 0 ? word[i / 2] & 0xffffu : word[i / 2] >> 16; }
};

LORA_FUSED_HD uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

LORA_FUSED_HD Words philox(uint64_t seed, uint64_t row, uint32_t column_block) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = column_block, c1 = static_cast<uint32_t>(row);
  uint32_t c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = high_product(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high2 = high_product(0xCD9E8D57u, c2), low2 = 0xCD9E8D57u * c2;
    c0 = high2 ^ c1 ^ key0;
    c1 = low2;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Drops everything at p = 1, where no number of 16 bits is at least 2¹⁶. What is kept is scaled, or left as it is.
struct Keep {
  uint32_t threshold;
  double scale;
  explicit Keep(double p, bool scaled = true)
      : threshold(static_cast<uint32_t>(std::nearbyint(p * 65536.0))),
        scale(!scaled   ? 1.0
              : p < 1.0 ? 1.0 / (1.0 - p)
                        : 0.0) {}
};

// A projection's mask over its input [M, K].
struct Dropped {
  torch::stable::Tensor seed;
  double p;
};

// 1 / (1 - p), which a masked product is scaled by.
inline double scale_of(const std::optional<Dropped>& dropped) { return dropped ? Keep(dropped->p).scale : 1.0; }

inline bool is_dropout_dtype(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

// x and out [M, K], contiguous, seed int64 [1], all on one device.
inline void check_dropout(const torch::stable::Tensor& x, const torch::stable::Tensor& seed, double p,
                          const torch::stable::Tensor& out, bool cuda) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "dropout: x must be contiguous and 2-D");
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == x.size(0) && out.size(1) == x.size(1),
                  "dropout: out must be contiguous and shaped as x is");
  STD_TORCH_CHECK(is_dropout_dtype(x.scalar_type()) && is_dropout_dtype(out.scalar_type()),
                  "dropout: x and out must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "dropout: seed must be int64 with one element");
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout: p is ", p, ", expected 0 to 1");
  for (const auto* tensor : {&x, &seed, &out})
    STD_TORCH_CHECK(cuda ? tensor->is_cuda() && tensor->get_device_index() == x.get_device_index() : tensor->is_cpu(),
                    "dropout: x, seed and out must be on one device");
}

}  // namespace lora_fused
