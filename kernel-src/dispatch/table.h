// The dispatch table: which kernel computes what from which size on, by architecture, and how work is cut.
//
// Every entry is what was measured to be faster, and names the measurement; what a kernel can compute at all is its
// launcher's `supports`. Unless an entry says otherwise it was measured on one H200 (132 multiprocessors), with the
// sizes of Llama-8B, and other GPUs keep it unmeasured. docs/performance.md has the tables that are quoted.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/kernels.h"
#include "architecture.h"

namespace lora_fused::dispatch {

// ---- products with an adapter's rank: t, dt, dA, dB

enum class SkinnyKernel { kLibrary, kSm80, kSm90 };

// Up to so many tokens a step waits for the host, and one launch for all skinny products of a group is worth more than
// the library's best product for each. scripts/check_skinny.py and profile_step.py: at 2048 tokens and C=14336 the sm80
// kernels take 33.6 µs for t, the library 20.7 and sm90's 21.5, and 8 launches a layer of 8 to 10 µs of host time replace
// 22 calls of 22 to 35. At 8192 tokens sm90's kernels cost 2 % of the GPU's time. From 2048 tokens on one launch by the
// sm80 kernels cost the GPU more than it saved the host; between 1024 and 2048, and for other ranks than 32, nothing was
// measured.
constexpr int64_t kSkinnySm80Tokens = 1024, kSkinnySm80Ranks = 64, kSkinnySm90Tokens = 2048;

// With a mask own kernels are faster at every size: they draw it in registers or in shared memory instead of writing
// D(x) (scripts/check_skinny.py, p=0.1, t of 8192 tokens, C=4096: sm90 33 µs, where a read and a write of x alone take
// 50). `alone`: a product that shares its launch with no other, for which the library is as good but on Hopper.
SkinnyKernel skinny_kernel(const Shrink& product, bool alone = false);
// `beside`: it runs beside a product, which hides its time.
SkinnyKernel skinny_kernel(const AdapterGrad& product, bool beside);

// Whether the sm80 kernels run where this operand is, and support it.
bool skinny_fits_sm80(const MatrixView& operand);

// Whether the backward makes B contiguous by columns: the sm80 kernels read it so, sm90's either way.
bool wants_b_transposed(const MatrixView& x);

// From so many tokens and elements of a group's dy on, one read of it for dt and dB is worth a launch more, on sm90.
// scripts/check_skinny.py: 14336+14336 at 2048 tokens 71.5 -> 53.7 µs, 4096 at 2048 tokens 15.4 -> 15.3, and the launch
// costs 6 to 10 µs of host time.
constexpr int64_t kDtDbTokens = 2048, kDtDbElements = int64_t(1) << 24;
bool dt_db_is_faster(const MatrixView& dy, int64_t elements);

// Whether dA and dB run beside dx [M, K], like `x`: in the multiprocessors that its last round of tiles leaves idle.
// scripts/check_adapter_grads.py, µs at 2048 and 8192 tokens: a gated MLP, whose down's run beside dx of gate and up too,
// 1155 -> 1106 and 4929 -> 4799; q, k and v with dropout 266 -> 236 and 899 -> 815, without 624 -> 604 at 8192 tokens, but
// 173 -> 175 at 2048, and with DoRA 232 -> 239; o with dropout 142 -> 155. Below 2048 tokens nothing was measured.
struct AdapterGradsOf {
  size_t members;
  bool mlp, masked, bf16x3;
};
constexpr int64_t kBesideTokens = 2048, kBesideTokensOfLinears = 4096;
bool run_beside(const MatrixView& x, const AdapterGradsOf& of);

// Of the sm80 kernels. Warps of a block of `shrink`: sixteen where blocks of eight would leave a GPU with less than two
// blocks a multiprocessor (t of down, K=14336, 2048 tokens: 98 -> 39 µs together with masks by bits).
constexpr int64_t kFewBlocks = 2 * 132;
inline bool shrink_takes_many_warps(int64_t blocks) { return blocks < kFewBlocks; }
// Row tiles of a block of `dropped_expand_add`: four share A in shared memory, but for few tokens. Not measured apart.
inline bool expand_takes_one_tile(int64_t blocks) { return blocks < kFewBlocks; }

// Of the sm90 kernels: blocks that share a tile, `most` of them, about as many in all as there are multiprocessors, of
// four steps each or more. 8192 tokens, C=4096: 22.8 µs with 128 blocks, 28.1 with 256, 32.2 with 512.
unsigned skinny_cluster(int all_tiles, int most_steps, int multiprocessors, unsigned most);

// ---- sums of products: y and dx

// The tiles of 256 rows that sm90's GEMM cuts out [m, n] into. A column of tiles is 128 or 256 wide: a narrow tile
// takes 0.6 of a wide one's time, which is faster where narrow ones fill multiprocessors that wide ones leave idle.
// `efficiency`: of wide tiles without remainder on all multiprocessors 1.
struct GemmTiling {
  int width;
  double efficiency;
  GemmTiling(int64_t m, int64_t n, int multiprocessors);
};

// Whether a sum of products [m, n] like `like` is faster as one launch of sm90's GEMM than as the library's products
// one after another, for at least two segments. scripts/check_gemm.py: at an efficiency of 0.81 and above in all 75
// cases, at 0.42 and below in 3 of 53; between them nothing was measured.
constexpr double kGemmEfficiency = 0.75;
bool gemm_is_faster(const MatrixView& like, int64_t m, int64_t n);

// Whether the sums [m, n] of a group, n columns in all, are faster as one launch with `shrinks` products t or dt of up to
// `ranks` ranks in it (sm90/gemm_group.cuh) than as a launch for these and one for each sum. scripts/check_gemm_group.py:
// q, k and v 160 -> 146 µs, down 355 -> 331, its dx 339 -> 330; but dx of q, k and v, with three dt, 148 -> 159. Ranks
// are those that it was made for.
constexpr int64_t kGemmGroupRanks = 128, kGemmGroupShrinks = 1;
bool gemm_group_is_faster(const MatrixView& like, int64_t m, int64_t n, int64_t shrinks, int64_t ranks);

// ---- DoRA's norms

// An error where a GPU has no kernel for norms.
void check_row_norm_fits(const RowNorm& norm);

// The norms of a group from one read of each weight (sm90/row_norm.cu) are a launch more: from so many elements in all
// on. scripts/check_row_norm.py, r=32: gate, up and down 192 -> 124 µs, 14336x4096 66 -> 54, 4096x4096 alone 27.7 ->
// 33.
constexpr int64_t kRowNormSm90Elements = int64_t(5) << 22;
// Fewer columns would not average out what hi and lo of A leave out. Not measured apart.
constexpr int64_t kRowNormSm90Columns = 512;
bool row_norm_fits_sm90(const RowNorm& norm);
inline bool row_norm_sm90_is_faster(int64_t elements) { return elements >= kRowNormSm90Elements; }
// Steps of a block of sm90's norm, at least. Not measured.
constexpr int kRowNormSm90Steps = 4;

// Elements of a weight in four bits that its norm has in floating point at a time: 32 MB of bfloat16, which stay in the
// cache of a large GPU between the two kernels. In pieces of whole tiles of rows. Not measured against other sizes.
constexpr int64_t kNormPieceElements = int64_t(1) << 24, kNormPieceRows = 128;

// Rows of an embedding up to which a float32 A enters its column norm as hi and lo: beyond, its rounding to bfloat16
// changes a norm by 1e-5 (RMS; 4e-4 at 9 rows).
constexpr int64_t kColumnNormSplitRows = 8192;

// ---- embeddings

// Up to so many small blocks a multiprocessor the forward takes small ones of a step each, else as many large ones as
// there are multiprocessors. The large ones were measured (docs/performance.md, embeddings), the limit between
// both was not.
constexpr int64_t kEmbeddingSmallBlocks = 3;
// Blocks that a backward's sums are split into. Not measured.
constexpr int64_t kEmbeddingBlocks = 320;
inline int embedding_splits(int64_t blocks, int64_t pieces, int64_t at_most) {
  return static_cast<int>(
      std::clamp<int64_t>(kEmbeddingBlocks / std::max<int64_t>(blocks, 1), 1, std::min(pieces, at_most)));
}

// ---- passes

// Blocks of a multiprocessor that the passes with DoRA's scale are cut for, once each: a thread then keeps its columns'
// scale, and few shares of the tokens are added. scripts/check_passes.py, 2048 and 8192 tokens, µs: the gated activation
// of 14336 columns 52 and 204 (72 and 350 where every thread reads the scale for one row), the pass over dy of 4096
// columns 13.5 and 48.4 (18.7 and 64.6 where a block owns columns). Of the activation's backward with the sums two and
// four blocks, which spill, were slower in a trial of the kernel alone.
constexpr int kScaleBlocks = 4, kScaleBackwardBlocks = 4, kGatedScaleBlocks = 4, kGatedScaleBackwardBlocks = 3;

}  // namespace lora_fused::dispatch
