// LoRA and DoRA projections of one input as one op a direction.
//
//   t = s·D(x) Aᵀ     y = x Wᵀ + t Bᵀ + b
//   dt = s·dy' B      dx = dy' W + D(dt A)     dA = dtᵀ D(x)     dB = dy'ᵀ t     db = Σ dy
//
// D is dropout, dy' = dy for LoRA. DoRA keeps u, the value before its gain g, and has dy' = g∘dy:
//
//   without dropout   u = x Wᵀ + t Bᵀ + b    y = g∘(u - b) + b            dm = Σ dy∘(u - b) / norm
//   with dropout      u = D(x) Wᵀ + t Bᵀ     y = x Wᵀ + t Bᵀ + b + (g - 1)∘u    dm = Σ dy∘u / norm
//                     dx = dy W + D(((g - 1)∘dy) W + dt A)
//
// Without dropout the members' A's stand below each other, so that x is read once for all t and
// once for all dA. What Python and the dispatcher would cost between products is saved; the
// arithmetic is that of reference.py. x [..., K], weight [N, K] of any strides, A [R, K], B [N, R]; A
// and B of any dtype are converted to x's, all in one launch; gains [N] come from `dora_gains`. A weight in
// four bits is made floating point for its own product (projections.h), in backward all of a group
// for theirs, which may be one launch.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../../torch-ext/torch_binding.h"
#include "projections.h"

using namespace lora_fused;

std::tuple<Tensors, Tensors, Tensor> lora_forward(const Tensor& x, Tensors weights, Optionals biases,
                                                  Optionals lora_a, Optionals lora_b, Optionals gains,
                                                  std::vector<double> scalings, std::optional<Tensor> seeds,
                                                  std::vector<double> dropouts, Tensors scales,
                                                  std::vector<int64_t> quantized, bool exact) {
  const OnDevice device(x);
  const Lists lists{weights, biases, lora_a, lora_b, gains, scalings, seeds, dropouts, scales, quantized, exact};
  Outputs out = project(matrix(x), x, Members(lists, 0, weights.size()), /*scaled_too=*/true);
  return {out.ys, out.us, out.t};
}

std::tuple<Tensors, Tensors> lora_backward(Optionals dys, const Tensor& x, const Tensor& t, Tensors us,
                                           Tensors weights, Optionals biases, Optionals lora_a,
                                           Optionals lora_b, Optionals gains, Optionals norms,
                                           std::vector<double> scalings, std::optional<Tensor> seeds,
                                           std::vector<double> dropouts, Tensors scales,
                                           std::vector<int64_t> quantized, bool exact, bool need_dx,
                                           std::vector<int64_t> needs) {
  const OnDevice device(x);
  const Lists lists{weights, biases, lora_a, lora_b, gains, scalings, seeds, dropouts, scales, quantized, exact};
  const Members members(lists, 0, weights.size());
  const View rows = matrix(x);
  const Backward backward(members, rows, {dys, us, norms, needs, need_dx, t});
  Tensors dx, grads;
  if (need_dx) {
    dx.push_back(empty_as(x, rows.size(1)));
    backward.input(matrix(dx[0]));
  }
  backward.parameters(rows, grads);
  return {dx, grads};
}

namespace {

// Elements of a weight in four bits that its norm has in floating point at a time: 32 MB of bfloat16, which stay
// in the cache of a large GPU between the two kernels.
constexpr int64_t kNormElements = int64_t(1) << 24, kNormRows = 128;

// `count` elements of a contiguous vector or rows of a matrix, from `first` on.
Tensor slice(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 0, first, count); }

void row_norms(const std::vector<RowNorm>& norms) {
#if defined(CUDA_KERNEL)
  if (!norms.empty() && norms[0].norm.is_cuda()) return row_norms_cuda(norms);
#endif
  for (const RowNorm& of : norms) {
    if (of.fill) of.fill();
    Tensor norm = of.norm, gain = *of.gain;
    torch::stable::copy_(norm, row_norm_cpu(of.weight, of.a, of.b, of.scaling));
    torch::stable::copy_(gain, gain_cpu(*of.magnitude, norm));
  }
}

}  // namespace

std::tuple<Tensors, Tensors> dora_gains(Tensors weights, Tensors lora_a, Tensors lora_b, Tensors magnitudes,
                                        std::vector<double> scalings, Tensors scales,
                                        std::vector<int64_t> quantized) {
  const OnDevice device(weights[0]);
  Tensors norms, gains;
  std::vector<RowNorm> all;
  MaybeTensor made;  // rows of one weight after another, in floating point
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t* numbers = quantized.empty() ? nullptr : quantized.data() + kQuantizedFields * i;
    const bool packed = numbers != nullptr && numbers[0] != 0;
    const int64_t n = packed ? numbers[1] : weights[i].size(0);
    for (Tensors* vectors : {&norms, &gains}) vectors->push_back(empty(weights[i], {n}, ScalarType::Float));
    if (!packed) {
      all.push_back({weights[i], lora_a[i], lora_b[i], norms[i], scalings[i], magnitudes[i], gains[i]});
      continue;
    }
    const FourBitWeight weight(weights[i], scales, numbers);
    const int64_t k = weight.cols(), blocks = kNormElements / std::max<int64_t>(k, 1) / kNormRows;
    const int64_t rows = std::min(n, std::max<int64_t>(blocks, 1) * kNormRows);
    if (!made || made->numel() < rows * k || made->scalar_type() != weight.dtype())
      made = empty(weights[i], {rows * k}, weight.dtype());
    const Tensor a = in_rows(lora_a[i]), b = in_rows(lora_b[i]);
    for (int64_t first = 0; first < n; first += rows) {
      const int64_t count = std::min(rows, n - first);
      const Tensor chunk = View(*made, count, k, k, 1).tensor();
      all.push_back({chunk, a, slice(b, first, count), slice(norms[i], first, count), scalings[i],
                     slice(magnitudes[i], first, count), slice(gains[i], first, count),
                     [=] { weight.dequantize(first * k, chunk); }});
    }
  }
  row_norms(all);
  return {norms, gains};
}
