// What an instruction set offers: one table of functions, chosen once at run time. Shapes are row-major unless stated.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace zamba2 {

enum class Format : int { bf16 = 0, q8 = 1, q4 = 2 };

// Packed weights of a projection, rows x cols (twin of weights/formats.py). Blocks of 16 rows; within a block, groups of
// 32 inputs; zero-padded to both.
//   bf16: per group 16 pairs of inputs, per pair 16 rows x 2 values            (1024 bytes; one AMX tile)
//   q8:   per group 8 x (16 rows x 4 inputs), code + 128                       (512 bytes), then all scales
//   q4:   per group 4 x (16 rows x 4 inputs), low nibble inputs 4v.., high nibble inputs 16+4v.., code + 8  (256 bytes), then all scales
// Scales: fp16, 16 rows per group. A block's size is rounded up to 64 bytes.
struct Matrix {
  const uint8_t* data = nullptr;
  int rows = 0, cols = 0;
  Format format = Format::bf16;

  int blocks() const { return (rows + 15) / 16; }
  int groups() const { return (cols + 31) / 32; }
  size_t code_bytes() const { return static_cast<size_t>(groups()) * (format == Format::bf16 ? 1024 : format == Format::q8 ? 512 : 256); }
  size_t block_bytes() const { return (code_bytes() + (format == Format::bf16 ? 0 : static_cast<size_t>(groups()) * 32) + 63) / 64 * 64; }
  size_t bytes() const { return block_bytes() * static_cast<size_t>(blocks()); }
};

// Rows of activations as the kernels take them; padded to whole groups with zeros.
struct Activations {
  int rows = 0, cols = 0;
  std::vector<float> values;      // (rows, groups * 32)
  // The same as int8 per group of 32, in tiles of R = 8 rows (the last one: what is left of them), each tile's inputs in order:
  std::vector<int8_t> codes;      // per tile (groups, 8, R, 4)
  std::vector<float> scales;      // per tile (groups, R)
  std::vector<int32_t> starts;    // per tile (groups, R), what takes the weights' offset off: -offset times the sum of the codes
  std::vector<uint16_t> halves;   // bf16 tiles of 16 rows x 32 inputs, (rows / 16 rounded up to even, groups), for products of bf16
  int groups() const { return (cols + 31) / 32; }
  int stride() const { return groups() * 32; }
};

inline constexpr int kChunk = 64;    // tokens of one step of the scan in long calls
inline size_t chunk_scratch(int P, int N) { return kChunk * kChunk + static_cast<size_t>(kChunk) * (P + 1) + static_cast<size_t>(P) * N; }
inline constexpr int kMostPanelBlocks = 64;  // that multiply_many takes at once
inline constexpr int kMostRows = 8;  // rows that one pass over the weights serves

// Bare loops that bound the kernels (probe.inc).
struct Probes {
  uint64_t (*read)(const uint8_t* data, size_t bytes, int streams, size_t ahead);
  struct Loop {
    const char* kind;
    double (*run)(int64_t rounds, volatile float* sink);  // returns the operations done
  } loops[4];  // a null kind ends them
};

inline constexpr int kPage = 64;           // tokens whose keys and values lie together
inline constexpr int kMostQueries = 128;   // that attend_many takes at once
inline constexpr int kKeyBlock = 128;      // keys that it takes at once
inline constexpr int kPanel = 64;          // queries that it multiplies them with at once

// Number formats of keys and values (twin of KV_FORMATS in weights/formats.py). q8: int8 codes and one fp32 scale per head and
// token; scale = largest / 127, value = code * scale.
enum class KVFormat : int { bf16 = 0, q8 = 1 };

// Keys and values of one head of a sequence, in pages of kPage tokens: token t is row t % kPage of pages[t / kPage].
// Byte offsets of this head's parts within every page: keys and values, (kPage, d) each; scales, (kPage) fp32 each, for q8 only.
struct KeysValues {
  KVFormat format;
  const uint8_t* const* pages;
  size_t keys, values, key_scales, value_scales;
};

// One token's query of one head, (d); where its output goes, (d); and how many of the first keys it sees (at least 1).
struct Query {
  const float* q;
  float* y;
  int length;
};

inline size_t attend_scratch(int d) {  // floats that attend_many needs
  const size_t padded = static_cast<size_t>(d + 31) / 32 * 32;
  return 2 * (kKeyBlock + kMostQueries) * padded + kKeyBlock * kPanel + padded + 2 * (kMostQueries + kPanel + kKeyBlock);
}

struct Kernels {
  const char* name;
  const Probes* probes;
  bool matrix_units;   // whether multiply_many goes through matrix units, of bf16, whatever the weights' format
  bool bf16_products;  // whether vectors or units multiply pairs of bf16: multiply_many with bf16 weights and attend_many do then
  bool halves(Format weights) const { return matrix_units || (bf16_products && weights == Format::bf16); }  // what multiply_many takes
  // int8 codes per group of 32: scale = largest / 127, ties to even. x: (cols), padded with zeros; row of `rows` in its tile.
  void (*quantize)(const float* x, int cols, Format weights, int row, int rows, int8_t* codes, float* scales, int32_t* starts);
  // y[m][r] = W x_(row + m) for rows r of blocks [first, last) and the tile of x that begins at row. Each m's arithmetic is its own.
  void (*multiply)(const Matrix& w, int first, int last, const Activations& x, int row, float* y, size_t stride);
  // The same for many rows, which are rounded to bf16 where it takes x.halves; panel: room for the blocks in bf16, aligned to 64, if matrix
  // units multiply weights of another format.
  void (*multiply_many)(const Matrix& w, int first, int last, const Activations& x, float* y, size_t stride, uint16_t* panel);
  void (*to_bf16)(const float* x, int n, uint16_t* y);
  void (*to_tiles)(const float* x, int cols, int row, uint16_t* tiles);  // one row of activations into their tiles
  void (*from_bf16)(const uint16_t* x, int n, float* y);
  bool (*finite)(const float* x, size_t n);  // whether every value is
  float (*sum_of_squares)(const float* x, int n);
  void (*scale_by)(const float* x, const float* weight, float scale, int n, float* y);  // y = x * scale * weight
  void (*add_scaled)(const float* x, float scale, int n, float* y);                     // y += x * scale
  // y = x * silu(z), then RMSNorm per group of n / groups, times weight. y may be x.
  void (*gated_norm)(const float* x, const float* z, const float* weight, int n, int groups, float eps, float* y);
  void (*geglu)(const float* projected, const float* adapted, int n, float* y);  // (2n), (2n) -> (n)
  // Causal convolution over T tokens and SiLU. x: (T, stride), first column first; state: (taps - 1, n), oldest first,
  // updated; weight: (taps, n), newest input last; y: (T, n) for columns [first, last).
  void (*convolve)(const float* x, size_t stride, int length, const float* weight, const float* bias, int taps, int n, int first, int last,
                   float* state, float* y);
  // One token of one head: S = decay S + dt x B^T; y = S C + D x. S: (P, N).
  void (*step)(const float* x, float dt, float decay, const float* B, const float* C, float D, int P, int N, float* S, float* y);
  // A chunk of Q (at most 64) tokens of one head; scratch: chunk_scratch(P, N) floats. x: (Q, x_stride); dt: (Q, dt_stride); scores: (Q, Q) = C B^T; B, C: (Q, bc_stride); y: (Q, y_stride).
  void (*chunk)(int Q, const float* x, size_t x_stride, const float* dt, size_t dt_stride, float A, float D, const float* scores,
                const float* B, const float* C, size_t bc_stride, int P, int N, float* S, float* y, size_t y_stride, float* scratch);
  // scores[i][j] = C_i . B_j for j <= i.
  void (*chunk_scores)(int Q, const float* B, const float* C, size_t bc_stride, int N, float* scores);
  // int8 codes of one head vector: scale = largest / 127, ties to even. A value that is not finite gives a NaN scale.
  void (*to_q8)(const float* x, int d, int8_t* codes, float* scale);
  // Attention of up to kMostRows queries over the keys and values of one head, online softmax in fp32: y = softmax(scale q k^T) v.
  // Each query's arithmetic is its own, whatever comes with it. For calls of few tokens: reads keys and values once per query.
  void (*attend)(const Query* queries, int count, const KeysValues& kv, int d, float scale);
  // The same for up to kMostQueries queries at once, through matrix products. scratch: attend_scratch(d) floats, aligned to 64.
  // With bf16_products, q and the exponentials of the scores are rounded to bf16.
  void (*attend_many)(const Query* queries, int count, const KeysValues& kv, int d, float scale, float* scratch);
};

extern const Kernels* const kScalar;
#if defined(__x86_64__)
extern const Kernels* const kAvx2;
extern const Kernels* const kAvxVnni;
extern const Kernels* const kAvx512;
extern const Kernels* const kAvx512Bf16;
extern const Kernels* const kAmx;
#elif defined(__aarch64__)
extern const Kernels* const kNeon;
extern const Kernels* const kNeonDotprod;
extern const Kernels* const kNeonI8mm;
#endif

// The best table this machine can run, or the one that ZAMBA2_ISA names. Throws std::runtime_error for one it cannot.
const Kernels& kernels();
const Kernels* find_kernels(const char* name);    // nullptr for one that this machine and build do not have
std::vector<const Kernels*> available_kernels();  // the best last

}  // namespace zamba2
