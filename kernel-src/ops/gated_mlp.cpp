// A gated MLP y = down(f(gate(x))·up(x)) as one op a direction: the groups of lora_group.cpp with the
// activation between them.
//
//   h = f(gate)·up     (dgate, dup) = dh·(up·f'(gate), f(gate))     dh = down's dx
//
// Gate and up may be the halves of one projection. The activation and h are computed again in
// backward. DoRA's scale of gate and up is part of the activation's pass where they have no dropout: their y
// is never written, and `outputs` are unscaled. With dropout the forward gives outputs and unscaled outputs; the
// backward computes the first member's unscaled output again if the caller has not kept it. `up_to_h` leaves out down's
// product and gives h [M, I] in place of y: for LoRA, all that the backward needs exists before that product.
#include <optional>
#include <tuple>
#include <utility>

#include "../../torch-ext/torch_binding.h"
#include "../dispatch/table.h"
#include "../group/backward.h"
#include "../group/forward.h"
#include "../group/passes.h"

using namespace lora_fused;

namespace {

MatrixView half_of(const MatrixView& both, int64_t half) {
  const int64_t width = both.size(1) / 2;
  return both.columns(half * width, width);
}

MaybeTensor half_of_vector(const MaybeTensor& vector, int64_t half) {
  if (!vector) return std::nullopt;
  const int64_t width = vector->numel() / 2, one = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(vector->get(), 1, &width, &one, half * width, &handle));
  return Tensor(handle);
}

// h for those who ask about it before there is any: not to be read.
MatrixView shape_of_h(const Tensor& x, int64_t rows, int64_t width) { return {x, rows, width, width, 1, 0}; }

// Gate and up among the outputs [M, I] or [M, 2I] of the first group.
struct Halves {
  bool fused;
  int64_t gate_half;

  int64_t width(const Members& in) const { return fused ? in.outputs(0) / 2 : in.outputs(0); }

  std::tuple<MatrixView, MatrixView> of(const Tensors& outputs) const {
    if (!fused) return {outputs[0], outputs[1]};
    return {half_of(outputs[0], gate_half), half_of(outputs[0], 1 - gate_half)};
  }

  ScaleAroundBias scale(const Members& in, int64_t which) const {
    const size_t member = fused ? 0 : static_cast<size_t>(which);
    if (!in.scales_output(member)) return {};
    const ScaleAroundBias whole = in.scale_around_bias(member);
    if (!fused) return whole;
    return {half_of_vector(whole.scale, half(which)), half_of_vector(whole.bias, half(which))};
  }

  std::optional<ScaleOutputBackward> pass(const std::vector<std::optional<ScaleOutputBackward>>& passes,
                                          int64_t which) const {
    const auto& whole = passes[fused ? 0 : static_cast<size_t>(which)];
    if (!fused || !whole) return whole;
    const auto of_matrix = [&](const MaybeMatrixView& m) {
      return m ? MaybeMatrixView(half_of(*m, half(which))) : std::nullopt;
    };
    const auto of_vector = [&](const MaybeTensor& v) { return half_of_vector(v, half(which)); };
    return ScaleOutputBackward{half_of(whole->dy, half(which)),
                               of_matrix(whole->unscaled),
                               of_matrix(whole->dunscaled),
                               of_vector(whole->norm),
                               of_vector(whole->dmagnitude),
                               of_vector(whole->dbias),
                               {of_vector(whole->scale.scale), of_vector(whole->scale.bias)}};
  }

 private:
  int64_t half(int64_t which) const { return which == 0 ? gate_half : 1 - gate_half; }
};

}  // namespace

// Operands as GroupArgs has them, those of down last. Gives y; the outputs of the first group; its t and down's; the
// unscaled outputs of members of the first group whose outputs are scaled, and of down; the norms and mag_norm_scales
// that were made.
Tensors gated_forward(const Tensor& x, Optionals operands, std::vector<double> scalings, std::optional<Tensor> seeds,
                      Numbers dropouts, Integers quantized, bool bf16x3, int64_t activation, int64_t gate_half,
                      bool up_to_h) {
  const OnDevice device(x);
  GroupArgs args{std::move(operands), scalings, seeds, dropouts, quantized, bf16x3};
  args.check();
  check_activation(activation);
  const size_t inputs = args.count() - 1;
  const Norms norms(args, x.scalar_type());
  const Members in(args, 0, inputs), out(args, inputs, 1);
  STD_TORCH_CHECK(!up_to_h || !out.mag_norm_scale(0), "gated_forward: DoRA's backward needs the last product");
  const Halves halves{inputs == 1, gate_half};
  const MatrixView rows = matrix(x);
  std::vector<Cast> casts;
  const Adapters of_in = forward_adapters(rows, in, casts),
                 of_out = forward_adapters(shape_of_h(x, rows.size(0), halves.width(in)), out, casts, !up_to_h);
  cast_all(casts);
  Outputs first = project(rows, rows.tensor(), in, of_in, norms, /*with_scaled=*/false);
  const auto [gate, up] = halves.of(first.ys);
  const MatrixView h = fresh_like(gate);
  run_activation({gate, up, h, {}, {}, {}, activation, halves.scale(in, 0), halves.scale(in, 1)});
  Outputs last = up_to_h ? Outputs{{h.tensor()}, {}, shrink(h, out, of_out)}
                         : project(h, x, out, of_out, norms, /*with_scaled=*/true);
  Tensors found{last.ys[0]};
  append(found, first.ys);
  append(found, {first.t, last.t});
  size_t next_unscaled = 0;
  for (size_t i = 0; i < inputs; ++i) {
    if (!in.mag_norm_scale(i)) continue;
    if (in.masked(i)) found.push_back(first.unscaled[next_unscaled]);
    ++next_unscaled;
  }
  append(found, last.unscaled);
  append(found, norms.norms());
  append(found, norms.mag_norm_scales());
  return found;
}

// `kept`: the outputs of the first group, its t and down's, and the unscaled outputs, as the forward gives them. Gives
// dx, where it is needed, and the gradients in turn. Where no gradient of an A of the first group is needed, and no
// unscaled output is made again, x gives its shape alone.
Tensors gated_backward(const Tensor& dy, const Tensor& x, Tensors kept, Optionals operands,
                       std::vector<double> scalings, std::optional<Tensor> seeds, Numbers dropouts, Integers quantized,
                       bool bf16x3, int64_t activation, int64_t gate_half, bool need_dx, std::vector<int64_t> needs) {
  const OnDevice device(x);
  const GroupArgs args{std::move(operands), scalings, seeds, dropouts, quantized, bf16x3};
  args.check();
  check_activation(activation);
  const size_t inputs = args.count() - 1;
  const Members in(args, 0, inputs), out(args, inputs, 1);
  STD_TORCH_CHECK(kept.size() >= inputs + 2, "kept: ", kept.size(), " tensors, expected at least ", inputs + 2);
  const Tensors outputs(kept.begin(), kept.begin() + inputs), unscaled(kept.begin() + inputs + 2, kept.end());
  const Tensor &t = kept[inputs], &last_t = kept[inputs + 1];
  const Halves halves{inputs == 1, gate_half};
  const auto [gate, up] = halves.of(outputs);
  Tensors grads, last_grads, d_outputs;
  for (const Tensor& output : outputs) d_outputs.push_back(fresh_like(output));
  const auto [dgate, dup] = halves.of(d_outputs);
  const MatrixView rows = needs_any_a(needs, inputs) ? matrix(x) : unread_matrix(x);
  MaybeMatrixView h = fresh_like(gate), dh = halves.fused ? MatrixView(fresh_like(gate)) : dgate;
  const Tensors last_unscaled = out.mag_norm_scale(0) ? Tensors{unscaled.back()} : Tensors{};
  std::vector<Cast> casts;
  Adapters of_in = Backward::adapters(rows, in, casts, need_dx),
           of_out = Backward::adapters(*h, out, casts, /*need_dx=*/true);
  cast_all(casts);
  std::optional<Backward> last(std::in_place, out, *h, std::move(of_out),
                               OutputGrads(out, {dy}, last_unscaled, needs, /*own_dys=*/false),
                               Backward::Given{needs, /*need_dx=*/true, last_t});
  last->input(*dh);
  const auto first_outputs = [&] {
    Tensors first_unscaled;
    auto next = unscaled.end() - (out.mag_norm_scale(0) ? 1 : 0);
    for (size_t i = inputs; i-- > 0;) {
      if (!in.mag_norm_scale(i)) continue;
      const auto masked_one = [&] { return next == unscaled.begin() ? project_dropped(matrix(x), in, i, t) : *--next; };
      first_unscaled.insert(first_unscaled.begin(), in.masked(i) ? masked_one() : outputs[i]);
    }
    const Optionals first_dys(d_outputs.begin(), d_outputs.end());
    return OutputGrads(in, first_dys, first_unscaled, needs, /*own_dys=*/true);
  };
  std::optional<OutputGrads> of_outputs;
  {
    GatedActivation work{gate, up, *h, *dh, dgate, dup, activation, halves.scale(in, 0), halves.scale(in, 1)};
    if (!in.any_masked()) {  // gate and up are their own unscaled outputs
      const auto passes = std::exchange((of_outputs = first_outputs())->passes, {});
      work.gate_pass = halves.pass(passes, 0), work.up_pass = halves.pass(passes, 1);
    }
    run_activation(work);
  }
  const bool masked = in.any_masked() || out.any_masked();
  const bool beside = need_dx && dispatch::run_beside(rows, {args.count(), /*mlp=*/true, masked, bf16x3});
  AdapterGrads products(rows, beside);
  last->parameters(*h, last_grads, products);
  if (!beside) {
    products.run();
    last.reset(), h.reset(), dh.reset();
  }
  // What is made again lives as long as the pass over dy that reads it.
  const Backward first(in, rows, std::move(of_in), of_outputs ? std::move(*of_outputs) : first_outputs(),
                       {needs, need_dx, t});
  first.gradients(x, rows, beside, products, grads);
  append(grads, last_grads);
  return grads;
}
