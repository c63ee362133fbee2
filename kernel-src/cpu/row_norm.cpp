// row_norm on the CPU: out[n] = sqrt(sum_k (W[n,k] + s * sum_r B[n,r] A[r,k])^2), fp32 [N].
//
// W [N,K], A [R,K], B [N,R], each fp32, bf16 or fp16. B·A exists only as a 4×16 register
// tile: A is packed once into fp32 panels of 16 columns ([R][16], R·K floats in all), a
// block of 32 rows walks over the panels, and the tile starts from W, takes the rank-R product
// on top and is squared into the row's sum. fp32 accumulation in an order that depends
// on the shape alone, so that the result does not change with the number of threads.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../common/dtypes.h"
#include "../common/kernels.h"
#include "../common/row_norm_check.h"
#include "../common/tensors.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define MULTI_ARCH __attribute__((target_clones("fma", "default")))
#else
#define MULTI_ARCH
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kPanel = 16;  // columns of a register tile: two 8-lane vectors
constexpr int kRows = 4;    // rows of a register tile: 8 accumulators of 16 AVX2 registers
constexpr int kBlock = 32;  // rows that share a panel of A while it is in L1

typedef float Vec __attribute__((vector_size(32)));

inline void load(Vec& v, const float* p) { std::memcpy(&v, p, sizeof v); }

// sums[4][8] += squares of (tile + B·A_panel), tile [4][16], b [R][4], a [R][16].
MULTI_ARCH void add_squares(float* sums, const float* tile, const float* b, const float* a, int64_t rank) {
  Vec acc[kRows][2];
  for (int i = 0; i < kRows; ++i)
    for (int h = 0; h < 2; ++h) load(acc[i][h], tile + i * kPanel + 8 * h);
  for (int64_t r = 0; r < rank; ++r) {
    Vec a0, a1;
    load(a0, a + r * kPanel);
    load(a1, a + r * kPanel + 8);
    for (int i = 0; i < kRows; ++i) {
      const float bi = b[r * kRows + i];
      acc[i][0] += a0 * bi;
      acc[i][1] += a1 * bi;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    Vec s;
    load(s, sums + 8 * i);
    s += acc[i][0] * acc[i][0] + acc[i][1] * acc[i][1];
    std::memcpy(sums + 8 * i, &s, sizeof s);
  }
}

template <typename T>
void to_float(float* out, const T* in, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
}

// One row segment as fp32, from a contiguous tensor of any of the three dtypes.
struct Reader {
  const void* data;
  ScalarType dtype;
  explicit Reader(const Tensor& t) : data(t.const_data_ptr()), dtype(t.scalar_type()) {}
  void read(float* out, int64_t offset, int64_t count) const {
    LORA_FUSED_UP_TO_FLOAT32(dtype, "row_norm",
                             [&] { to_float(out, static_cast<const scalar_t*>(data) + offset, count); });
  }
};

struct Problem {
  Reader weight, lora_b;
  const float* panels;
  int64_t n, k, rank;
  float scaling;
};

// packed [R][4] = s·B for rows first .. first+3; rows past N are zero.
void pack_b(float* packed, float* scratch, const Problem& p, int64_t first) {
  for (int i = 0; i < kRows; ++i) {
    const bool inside = first + i < p.n;
    if (inside) p.lora_b.read(scratch, (first + i) * p.rank, p.rank);
    for (int64_t r = 0; r < p.rank; ++r) packed[r * kRows + i] = inside ? p.scaling * scratch[r] : 0.0f;
  }
}

void norm_block(float* out, const Problem& p, int64_t first, std::vector<float>& packed_b,
                std::vector<float>& scratch) {
  const int64_t rows = std::min<int64_t>(kBlock, p.n - first);
  const int64_t groups = (rows + kRows - 1) / kRows;
  for (int64_t g = 0; g < groups; ++g)
    pack_b(packed_b.data() + g * p.rank * kRows, scratch.data(), p, first + g * kRows);
  float sums[kBlock][8] = {};
  for (int64_t col = 0; col < p.k; col += kPanel) {
    const int64_t cols = std::min<int64_t>(kPanel, p.k - col);
    for (int64_t g = 0; g < groups; ++g) {
      float tile[kRows * kPanel] = {};
      const int64_t row = first + g * kRows;
      for (int i = 0; i < kRows && row + i < p.n; ++i) p.weight.read(tile + i * kPanel, (row + i) * p.k + col, cols);
      add_squares(sums[g * kRows], tile, packed_b.data() + g * p.rank * kRows, p.panels + col * p.rank, p.rank);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    double total = 0.0;
    for (float s : sums[i]) total += s;
    out[first + i] = static_cast<float>(std::sqrt(total));
  }
}

}  // namespace

void lora_fused::row_norm_cpu(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling,
                              const Tensor& norm) {
  lora_fused::check_row_norm(weight, lora_a, lora_b, /*cuda=*/false);
  const Tensor w = in_rows(weight), a = in_rows(lora_a), b = in_rows(lora_b);
  const int64_t n = w.size(0), k = w.size(1), rank = a.size(0);
  if (n == 0) return;

  const int64_t panel_count = (k + kPanel - 1) / kPanel;
  std::vector<float> panels(panel_count * rank * kPanel);
  const Reader read_a(a);
  torch::stable::parallel_for(0, panel_count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t r = 0; r < rank; ++r)
        read_a.read(panels.data() + (p * rank + r) * kPanel, r * k + p * kPanel,
                    std::min<int64_t>(kPanel, k - p * kPanel));
  });

  const Problem problem{Reader(w), Reader(b), panels.data(), n, k, rank, static_cast<float>(scaling)};
  float* result = static_cast<float*>(norm.mutable_data_ptr());
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, 65536 / (kBlock * (k + 1) * (rank + 1)));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> packed_b(kBlock * rank), scratch(rank);
    for (int64_t i = begin; i < end; ++i) norm_block(result, problem, i * kBlock, packed_b, scratch);
  });
}
