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
  const Backward backward(members, rows, {dys, us, norms, needs, need_dx});
  Tensors dx, grads;
  if (need_dx) {
    dx.push_back(empty_as(x, rows.size(1)));
    backward.input(matrix(dx[0]));
  }
  backward.parameters(rows, t, grads);
  return {dx, grads};
}

std::tuple<Tensors, Tensors> dora_gains(Tensors weights, Tensors lora_a, Tensors lora_b, Tensors magnitudes,
                                        std::vector<double> scalings) {
  const OnDevice device(weights[0]);
  Tensors norms, gains;
#if defined(CUDA_KERNEL)
  if (weights[0].is_cuda()) {
    std::vector<RowNorm> all;
    for (size_t i = 0; i < weights.size(); ++i) {
      for (Tensors* vectors : {&norms, &gains})
        vectors->push_back(empty(weights[i], {weights[i].size(0)}, ScalarType::Float));
      all.push_back({weights[i], lora_a[i], lora_b[i], norms[i], scalings[i], magnitudes[i], gains[i]});
    }
    row_norms_cuda(all);
    return {norms, gains};
  }
#endif
  for (size_t i = 0; i < weights.size(); ++i) {
    norms.push_back(row_norm_cpu(weights[i], lora_a[i], lora_b[i], scalings[i]));
    gains.push_back(gain_cpu(magnitudes[i], norms.back()));
  }
  return {norms, gains};
}
