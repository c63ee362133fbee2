// Products with an adapter's rank: by own kernels, several in one launch, or by the library.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "../common/kernels.h"
#include "adapters.h"

namespace lora_fused {

// How the backward wants B.
Adapters::Layout layout_of_b(const MatrixView& x);

// Whether the generic skinny kernels support these operands.
bool is_skinny(std::initializer_list<const MatrixView*> operands);

// out = scaling · x aᵀ by itself.
void multiply_shrink(const MatrixView& out, const MatrixView& x, const MatrixView& a, double scaling);

// Skinny products of one kind, Shrink or AdapterGrad, that `run` launches together.
template <typename Product>
class SkinnyBatch {
 public:
  // `beside`: `run` gets a product to run beside.
  explicit SkinnyBatch(bool beside = false) : beside_(beside) {}

  // False where the library's product is to be taken instead.
  bool add(const Product& product);
  void run(SideStream* side = nullptr);

 private:
  bool beside_;
  std::vector<Product> sm80_, sm90_;
};

// dt and dB of a group's members from one read of each dy, where that is faster.
class FusedDtDb {
 public:
  explicit FusedDtDb(const std::vector<MaybeMatrixView>& dys);

  // dB [N, R] in `dtype`, which `run` fills together with dt = scaling·dy b; none where other products are to be taken.
  MaybeTensor add(const MatrixView& dy, const MatrixView& b, const MatrixView& t, const MatrixView& dt, double scaling,
                  ScalarType dtype, const std::optional<SplitLayout>& split = std::nullopt, double db_scaling = 1.0);
  void run() const;

 private:
  bool is_faster_ = false;
  std::vector<DtDb> products_;
};

}  // namespace lora_fused
