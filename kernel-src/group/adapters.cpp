// A and B of a group as its products read them, see adapters.h.
#include "adapters.h"

#include "passes.h"

namespace lora_fused {

namespace {

// Matrices of one dtype in one buffer: an allocation costs as much as a launch does.
class Buffer {
 public:
  Buffer(const Tensor& like, int64_t total, ScalarType dtype) {
    if (total > 0) buffer_ = empty(like, {total}, dtype);
  }
  static int64_t padded(int64_t count) { return (count + 63) / 64 * 64; }

  MatrixView next(int64_t rows, int64_t cols) {
    const MatrixView view(*buffer_, rows, cols, cols, 1, used_);
    used_ += padded(rows * cols);
    return view;
  }

 private:
  MaybeTensor buffer_;
  int64_t used_ = 0;
};

}  // namespace

Adapters::Adapters(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_a, bool need_b,
                   Layout layout_of_b, int64_t counters)
    : splits(members.bf16x3() ? 3 : 1),
      merged(members.bf16x3() && !members.any_masked() && members.common_shrink_scaling(x.scalar_type()) &&
             members.common([&](size_t i) { return members.rank(i); })) {
  first.push_back(0);
  for (size_t i = 0; i < members.count(); ++i) first.push_back(first.back() + members.rank(i));
  if (members.bf16x3())
    split(x, members, casts, need_a);
  else
    convert(x, members, casts, need_a, need_b, layout_of_b, counters);
}

void Adapters::split(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_a) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "bf16x3: expected x in bfloat16");
  if (need_a && ranks() > 0) a = empty(x.base(), {columns(), x.size(1)}, dtype);
  for (size_t i = 0; i < members.count(); ++i) {
    if (!members.b(i)) {
      b.push_back(std::nullopt);
      continue;
    }
    b.push_back(MatrixView(empty(x.base(), {members.outputs(i), splits * rank(i)}, dtype)));
    STD_TORCH_CHECK(!members.masked(i) || !members.mag_norm_scale(i), "bf16x3: expected DoRA without dropout, member ",
                    i);
    const Tensor of_a = in_rows(*members.a(i)), of_b = in_rows(*members.b(i));
    for (int64_t at = 0; at < splits; ++at) {
      const bool lo = at == 1;
      if (need_a) casts.push_back({of_a, a->rows(first_column(i) + at * split_stride(i), rank(i)), false, lo});
      casts.push_back({of_b, b[i]->columns(at * rank(i), rank(i)), false, lo});
    }
  }
}

void Adapters::convert(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_a, bool need_b,
                       Layout layout_of_b, int64_t counters) {
  const ScalarType dtype = x.scalar_type();
  const auto copies_b = [&](size_t i) {
    return need_b && members.b(i) && (members.b(i)->scalar_type() != dtype || layout_of_b != kAsStored);
  };
  for (size_t i = 0; need_a && i < members.count(); ++i)
    if (ranks() > 0 && members.rank(i) == ranks() && members.a(i)->scalar_type() == dtype) a = *members.a(i);
  const bool copies_a = need_a && ranks() > 0 && !a;
  int64_t total = copies_a ? Buffer::padded(ranks() * x.size(1)) : 0;
  for (size_t i = 0; i < members.count(); ++i)
    if (copies_b(i)) total += Buffer::padded(members.b(i)->numel());
  Buffer buffer(x.base(), total, dtype);
  if (copies_a) {
    a = buffer.next(ranks(), x.size(1));
    for (size_t i = 0; i < members.count(); ++i)
      if (members.a(i)) casts.push_back({in_rows(*members.a(i)), a_of(i)});
  }
  for (size_t i = 0; i < members.count(); ++i) {
    b.push_back(members.b(i) ? MaybeMatrixView(*members.b(i)) : std::nullopt);
    if (!copies_b(i)) continue;
    const int64_t n = b[i]->size(0), r = b[i]->size(1);
    const bool transposed = layout_of_b == kTransposed;
    const MatrixView copy = transposed ? buffer.next(r, n) : buffer.next(n, r);
    casts.push_back({in_rows(*members.b(i)), copy, transposed});
    b[i] = transposed ? copy.transposed() : copy;
  }
  if (counters > 0 && total > 0) {
    zeros = MatrixView(empty(x.base(), {counters}, ScalarType::Float));
    casts.push_back({*zeros, *zeros, /*transposed=*/false, /*lo=*/true});  // float32 leaves out nothing of itself
  }
}

}  // namespace lora_fused
