// LoRA and DoRA projections of one input as one op a direction.
//
//   t = s·D(x) Aᵀ     y = x Wᵀ + t Bᵀ + b
//   dt = s·dy' B      dx = dy' W + D(dt A)     dA = dtᵀ D(x)     dB = dy'ᵀ t     db = Σ dy
//
// D is dropout, dy' = dy for LoRA. DoRA keeps the unscaled output u and has dy' = c∘dy, with c = m / ‖W + s·B A‖,
// PEFT's mag_norm_scale:
//
//   without dropout   u = x Wᵀ + t Bᵀ + b    y = c∘(u - b) + b            dm = Σ dy∘(u - b) / norm
//   with dropout      u = D(x) Wᵀ + t Bᵀ     y = x Wᵀ + t Bᵀ + b + (c - 1)∘u    dm = Σ dy∘u / norm
//                     dx = dy W + D(((c - 1)∘dy) W + dt A)
//
// Without dropout the members' A's stand below each other, so that x is read once for all t and
// once for all dA. What Python and the dispatcher would cost between products is saved; the
// arithmetic is that of torch-ext/lora_fused/backends/reference. x [..., K], weight [N, K] of any strides, A [R, K], B
// [N, R]; A and B of any dtype are converted to x's, all in one launch; mag_norm_scales [N] are given, or made from
// magnitudes [N] (group/dora_norms.h) and given back with their norms. A weight in four bits is made floating point for
// its own product (group/members.h), in backward all of a group for theirs, which may be one launch.
#include <utility>

#include "../../torch-ext/torch_binding.h"
#include "../dispatch/table.h"
#include "../group/backward.h"
#include "../group/forward.h"

using namespace lora_fused;

// Operands as GroupArgs has them. Gives y of each projection; t; the unscaled output of each that DoRA scales; the
// norms and the mag_norm_scales that were made.
Tensors lora_forward(const Tensor& x, Optionals operands, std::vector<double> scalings, std::optional<Tensor> seeds,
                     Numbers dropouts, Integers quantized, bool bf16x3) {
  const OnDevice device(x);
  GroupArgs args{std::move(operands), scalings, seeds, dropouts, quantized, bf16x3};
  args.check();
  const Norms norms(args, x.scalar_type());
  const Members members(args, 0, args.count());
  const MatrixView rows = matrix(x);
  std::vector<Cast> casts;
  const Adapters adapters = forward_adapters(rows, members, casts);
  cast_all(casts);
  Outputs out = project(rows, x, members, adapters, norms, /*with_scaled=*/true);
  Tensors found = std::move(out.ys);
  found.push_back(out.t);
  append(found, out.unscaled);
  append(found, norms.norms());
  append(found, norms.mag_norm_scales());
  return found;
}

// Gives dx, where it is needed, and the gradients in turn. Where no gradient of an A is needed x gives its shape alone.
Tensors lora_backward(Optionals dys, const Tensor& x, const Tensor& t, std::optional<Tensors> unscaled,
                      Optionals operands, std::vector<double> scalings, std::optional<Tensor> seeds, Numbers dropouts,
                      Integers quantized, bool bf16x3, bool need_dx, std::vector<int64_t> needs) {
  const OnDevice device(x);
  const GroupArgs args{std::move(operands), scalings, seeds, dropouts, quantized, bf16x3};
  args.check();
  const Members members(args, 0, args.count());
  const MatrixView rows = needs_any_a(needs, args.count()) ? matrix(x) : unread_matrix(x);
  std::vector<Cast> casts;
  Adapters adapters = Backward::adapters(rows, members, casts, need_dx);
  cast_all(casts);
  const Backward backward(members, rows, std::move(adapters),
                          {members, dys, unscaled.value_or(Tensors{}), needs, /*own_dys=*/false}, {needs, need_dx, t});
  const bool beside = backward.makes_dx_alone() &&
                      dispatch::run_beside(rows, {args.count(), /*mlp=*/false, members.any_masked(), bf16x3});
  Tensors grads;
  AdapterGrads products(rows, beside);
  backward.gradients(x, rows, beside, products, grads);
  return grads;
}
