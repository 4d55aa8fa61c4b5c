// Sixteen lanes for every instruction set: the kernels are written once in terms of these.
// Included once per instruction set, inside a namespace of its own (see isa_*.cpp); nothing here has external linkage.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)  // gcc's own headers leave registers undefined on purpose
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(ZAMBA2_NEON)
#include <arm_neon.h>
#endif

#define ZAMBA2_INLINE inline __attribute__((always_inline))
#define ZAMBA2_FLAT __attribute__((noinline, flatten))  // everything it calls becomes part of it, so that lanes stay in registers
#if !defined(ZAMBA2_REGISTER)
#define ZAMBA2_REGISTER "v"  // where asm finds 16 lanes of AVX-512 (tests have them in memory)
#endif

namespace zamba2::ZAMBA2_ISA {

#if !defined(ZAMBA2_NEON)  // what q8 codes, as load_q8 gives them, lie above their values
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
constexpr int kOffsetQ8 = 0;
#else
constexpr int kOffsetQ8 = 128;
#endif
#endif

// How many vectors of 16 sums a product keeps in registers at a time: about half of what there are.
#if defined(__AVX512F__)
constexpr int kSums = 8;
#elif defined(__AVX2__) || defined(ZAMBA2_NEON)
constexpr int kSums = 4;
#else
constexpr int kSums = 2;
#endif
// How far before its use a weight is fetched, in bytes of each of so many streams, and into which cache. Zen 5 wants it in the
// first level and therefore soon.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
constexpr size_t kAhead(int streams) { return 6144 / static_cast<size_t>(streams); }
#define ZAMBA2_FETCH_INTO _MM_HINT_T0
#else
constexpr size_t kAhead(int) { return 4096; }
#define ZAMBA2_FETCH_INTO _MM_HINT_T1
#endif
// Calls of so many rows spread codes to bytes once, that many blocks side by side: taking codes apart and loading activations costs much
// beside the products.
#if defined(__AVX512F__)
constexpr int kSpreadFrom = 32, kSpreadBlocks = 2;
#elif defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int kSpreadFrom = 8, kSpreadBlocks = 1;
#else
constexpr int kSpreadFrom = INT32_MAX, kSpreadBlocks = 1;
#endif

#if defined(__AVX512F__)

struct F16 {  // 16 floats
  __m512 v;
  static F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F16 set1(float x) { return {_mm512_set1_ps(x)}; }
  static F16 zero() { return {_mm512_setzero_ps()}; }
  static F16 load_fp16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static F16 load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_bf16(uint16_t* p) const {  // round to nearest, ties to even; NaN stays NaN
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
  friend F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
  friend F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
  friend F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend F16 pow2(F16 n) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))}; }
  friend F16 copysign(F16 a, F16 s) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_andnot_si512(sign, _mm512_castps_si512(a.v)), _mm512_and_si512(sign, _mm512_castps_si512(s.v))))};
  }
  friend F16 where_at_least(F16 x, F16 bound, F16 a) {  // a where x >= bound, else 0; NaN stays
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ), a.v)};
  }
  friend float sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
  friend float largest(F16 a) { return _mm512_reduce_max_ps(a.v); }
  void store_i8(int8_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))); }
};

struct I16 {  // 16 int32
  __m512i v;
  static I16 begin(int32_t x) { return {_mm512_set1_epi32(x)}; }
  I16 end() const { return *this; }
  F16 to_float() const { return {_mm512_cvtepi32_ps(v)}; }
};

struct Codes {  // 64 unsigned bytes: 16 rows of 4 consecutive inputs
  __m512i v;
  static Codes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  static Codes load_q8(const uint8_t* p) { return load(p); }
  void store(uint8_t* p) const { _mm512_storeu_si512(p, v); }
  Codes low() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
  Codes high() const { return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))}; }
};

// acc[row] += sum over 4 inputs of codes * activations; four: the 4 int8 activations as one word. Codes above 127 are allowed.
ZAMBA2_INLINE I16 dot(I16 acc, Codes codes, int32_t four) {
  return {_mm512_dpbusd_epi32(acc.v, codes.v, _mm512_set1_epi32(four))};
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), ZAMBA2_FETCH_INTO); }

// 32 bf16 weights of 16 rows, two inputs each: even and odd inputs as floats.
ZAMBA2_INLINE void load_pairs(const uint16_t* p, F16& even, F16& odd) {
  const __m512i v = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}

#elif defined(__AVX2__)

struct F16 {
  __m256 v[2];
  static F16 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  static F16 set1(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static F16 zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static F16 load_fp16(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {{_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))}};
  }
  static __m256 widen(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static F16 load_bf16(const uint16_t* p) { return {{widen(p), widen(p + 8)}}; }
  void store(float* p) const { _mm256_storeu_ps(p, v[0]); _mm256_storeu_ps(p + 8, v[1]); }
  void store_bf16(uint16_t* p) const {
    for (int i = 0; i < 2; ++i) {
      const __m256i bits = _mm256_castps_si256(v[i]);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      __m256i r = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
      r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v[i], v[i], _CMP_UNORD_Q)));
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm256_castsi256_si128(packed));
    }
  }
#define ZAMBA2_LANES(name, expression) \
  F16 name { { } };                    \
  for (int i = 0; i < 2; ++i) name.v[i] = expression
  friend F16 operator+(F16 a, F16 b) { ZAMBA2_LANES(r, _mm256_add_ps(a.v[i], b.v[i])); return r; }
  friend F16 operator-(F16 a, F16 b) { ZAMBA2_LANES(r, _mm256_sub_ps(a.v[i], b.v[i])); return r; }
  friend F16 operator*(F16 a, F16 b) { ZAMBA2_LANES(r, _mm256_mul_ps(a.v[i], b.v[i])); return r; }
  friend F16 operator/(F16 a, F16 b) { ZAMBA2_LANES(r, _mm256_div_ps(a.v[i], b.v[i])); return r; }
  friend F16 fma(F16 a, F16 b, F16 c) { ZAMBA2_LANES(r, _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i])); return r; }
  friend F16 max(F16 a, F16 b) { ZAMBA2_LANES(r, _mm256_max_ps(a.v[i], b.v[i])); return r; }
  friend F16 min(F16 a, F16 b) { ZAMBA2_LANES(r, _mm256_min_ps(a.v[i], b.v[i])); return r; }
  friend F16 abs(F16 a) { ZAMBA2_LANES(r, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v[i])); return r; }
  friend F16 round(F16 a) { ZAMBA2_LANES(r, _mm256_round_ps(a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); return r; }
  friend F16 pow2(F16 n) {
    ZAMBA2_LANES(r, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v[i]), _mm256_set1_epi32(127)), 23)));
    return r;
  }
  friend F16 copysign(F16 a, F16 s) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    ZAMBA2_LANES(r, _mm256_or_ps(_mm256_andnot_ps(sign, a.v[i]), _mm256_and_ps(sign, s.v[i])));
    return r;
  }
  friend F16 where_at_least(F16 x, F16 bound, F16 a) {
    ZAMBA2_LANES(r, _mm256_and_ps(_mm256_cmp_ps(x.v[i], bound.v[i], _CMP_NLT_UQ), a.v[i]));
    return r;
  }
  friend float sum(F16 a) {
    const __m256 s = _mm256_add_ps(a.v[0], a.v[1]);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
  }
  friend float largest(F16 a) {
    const __m256 s = _mm256_max_ps(a.v[0], a.v[1]);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
  }
  void store_i8(int8_t* p) const {
    const __m256i a = _mm256_cvtps_epi32(v[0]), b = _mm256_cvtps_epi32(v[1]);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(words, words), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
  }
};

struct I16 {
  __m256i v[2];
  static I16 begin(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
  I16 end() const { return *this; }
  F16 to_float() const { return {{_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])}}; }
};

struct Codes {
  __m256i v[2];
  static Codes load(const uint8_t* p) {
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
  }
#if defined(__AVXVNNI__)
  static Codes load_q8(const uint8_t* p) { return load(p); }
#else
  static Codes load_q8(const uint8_t* p) {
    const Codes c = load(p);
    const __m256i sign = _mm256_set1_epi8(-128);
    return {{_mm256_xor_si256(c.v[0], sign), _mm256_xor_si256(c.v[1], sign)}};
  }
#endif
  void store(uint8_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v[1]);
  }
  Codes low() const { const __m256i m = _mm256_set1_epi8(15); return {{_mm256_and_si256(v[0], m), _mm256_and_si256(v[1], m)}}; }
  Codes high() const {
    const __m256i m = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(_mm256_srli_epi16(v[0], 4), m), _mm256_and_si256(_mm256_srli_epi16(v[1], 4), m)}};
  }
};

// Keeps a sum where the code adds to it: gcc computes all products first otherwise, and they do not fit into 16 registers.
ZAMBA2_INLINE void in_order(__m256i& sum) { asm volatile("" : "+x"(sum)); }

#if defined(__AVXVNNI__)

ZAMBA2_INLINE I16 dot(I16 acc, Codes codes, int32_t four) {
  const __m256i a = _mm256_set1_epi32(four);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    acc.v[i] = _mm256_dpbusd_avx_epi32(acc.v[i], codes.v[i], a);
    in_order(acc.v[i]);
  }
  return acc;
}

#else

// Byte products add up in pairs of 16 bits: 2 x 128 x 127 fits, so q8's codes are made signed and their signs moved to the activations.
ZAMBA2_INLINE I16 dot(I16 acc, Codes codes, int32_t four) {
  const __m256i a = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes.v[i]), _mm256_sign_epi8(a, codes.v[i]));
    acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_madd_epi16(pairs, ones));
    in_order(acc.v[i]);
  }
  return acc;
}

// A group's 8 products of q4's codes, at most 15, stay in 16 bits: 8 x 2 x 15 x 127. So does their sum with the start, -8 times the
// sum of the group's 32 activations, in one lane of two: what it is on the way does not matter, since 16 bits wrap around.
struct Sum4 {
  __m256i v[2];
  static Sum4 begin(int32_t start) { const __m256i s = _mm256_set1_epi32(start & 0xffff); return {{s, s}}; }
  I16 end() const {
    const __m256i ones = _mm256_set1_epi16(1);
    return {{_mm256_madd_epi16(v[0], ones), _mm256_madd_epi16(v[1], ones)}};
  }
};
ZAMBA2_INLINE Sum4 dot(Sum4 acc, Codes codes, int32_t four) {
  const __m256i a = _mm256_set1_epi32(four);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    acc.v[i] = _mm256_add_epi16(acc.v[i], _mm256_maddubs_epi16(codes.v[i], a));
    in_order(acc.v[i]);
  }
  return acc;
}
#define ZAMBA2_SUM4

#endif

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), ZAMBA2_FETCH_INTO); }

ZAMBA2_INLINE void load_pairs(const uint16_t* p, F16& even, F16& odd) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * i));
    even.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    odd.v[i] = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
  }
}

#elif defined(ZAMBA2_NEON)

struct F16 {
  float32x4_t v[4];
#define ZAMBA2_LANES(expression) \
  F16 r;                         \
  for (int i = 0; i < 4; ++i) r.v[i] = expression; \
  return r
  static F16 load(const float* p) { ZAMBA2_LANES(vld1q_f32(p + 4 * i)); }
  static F16 set1(float x) { ZAMBA2_LANES(vdupq_n_f32(x)); }
  static F16 zero() { return set1(0.0f); }
  static F16 load_fp16(const uint16_t* p) { ZAMBA2_LANES(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
  static F16 load_bf16(const uint16_t* p) { ZAMBA2_LANES(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
  void store(float* p) const { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v[i]); }
  void store_bf16(uint16_t* p) const {
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t bits = vreinterpretq_u32_f32(v[i]), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      const uint16x4_t r = vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));  // the upper halves of the sums
      vst1_u16(p + 4 * i, vbsl_u16(vmovn_u32(vceqq_f32(v[i], v[i])), r, vdup_n_u16(0x7fc0)));
    }
  }
  friend F16 operator+(F16 a, F16 b) { ZAMBA2_LANES(vaddq_f32(a.v[i], b.v[i])); }
  friend F16 operator-(F16 a, F16 b) { ZAMBA2_LANES(vsubq_f32(a.v[i], b.v[i])); }
  friend F16 operator*(F16 a, F16 b) { ZAMBA2_LANES(vmulq_f32(a.v[i], b.v[i])); }
  friend F16 operator/(F16 a, F16 b) { ZAMBA2_LANES(vdivq_f32(a.v[i], b.v[i])); }
  friend F16 fma(F16 a, F16 b, F16 c) { ZAMBA2_LANES(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
  friend F16 max(F16 a, F16 b) { ZAMBA2_LANES(vmaxq_f32(a.v[i], b.v[i])); }
  friend F16 min(F16 a, F16 b) { ZAMBA2_LANES(vminq_f32(a.v[i], b.v[i])); }
  friend F16 abs(F16 a) { ZAMBA2_LANES(vabsq_f32(a.v[i])); }
  friend F16 round(F16 a) { ZAMBA2_LANES(vrndnq_f32(a.v[i])); }
  friend F16 pow2(F16 n) { ZAMBA2_LANES(vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23))); }
  friend F16 copysign(F16 a, F16 s) { ZAMBA2_LANES(vbslq_f32(vdupq_n_u32(0x80000000u), s.v[i], a.v[i])); }
  friend F16 where_at_least(F16 x, F16 bound, F16 a) {
    ZAMBA2_LANES(vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.v[i]), vcltq_f32(x.v[i], bound.v[i]))));
  }
  friend float sum(F16 a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
  friend float largest(F16 a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
  void store_i8(int8_t* p) const {
    int16x4_t r[4];
    for (int i = 0; i < 4; ++i) r[i] = vqmovn_s32(vcvtnq_s32_f32(v[i]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(vcombine_s16(r[0], r[1])), vqmovn_s16(vcombine_s16(r[2], r[3]))));
  }
#undef ZAMBA2_LANES
};

struct I16 {
  int32x4_t v[4];
  static I16 begin(int32_t x) { const int32x4_t r = vdupq_n_s32(x); return {{r, r, r, r}}; }
  I16 end() const { return *this; }
  F16 to_float() const { F16 r; for (int i = 0; i < 4; ++i) r.v[i] = vcvtq_f32_s32(v[i]); return r; }
};

// Only i8mm multiplies unsigned by signed bytes. Without it codes are signed: those of q8 lose their offset in load_q8.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kOffsetQ8 = 128;
#else
constexpr int kOffsetQ8 = 0;
#endif

struct Codes {
  uint8x16_t v[4];
  static Codes load(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
  static Codes load_q8(const uint8_t* p) {
    Codes r = load(p);
    if constexpr (kOffsetQ8 == 0) for (uint8x16_t& part : r.v) part = veorq_u8(part, vdupq_n_u8(128));
    return r;
  }
  void store(uint8_t* p) const { std::memcpy(p, v, 64); }
  Codes low() const { Codes r; for (int i = 0; i < 4; ++i) r.v[i] = vandq_u8(v[i], vdupq_n_u8(15)); return r; }
  Codes high() const { Codes r; for (int i = 0; i < 4; ++i) r.v[i] = vshrq_n_u8(v[i], 4); return r; }
};

ZAMBA2_INLINE I16 dot(I16 acc, Codes codes, int32_t four) {
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; ++i) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    acc.v[i] = vusdotq_s32(acc.v[i], codes.v[i], a);
#elif defined(__ARM_FEATURE_DOTPROD)
    acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(codes.v[i]), a);
#else
    const int8x16_t w = vreinterpretq_s8_u8(codes.v[i]);  // two products add up to 2 * 128 * 127 at most: 16 bits hold it
    acc.v[i] = vpadalq_s16(acc.v[i], vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a)));
#endif
  }
  return acc;
}

#if defined(__ARM_FEATURE_DOTPROD)
#define ZAMBA2_TILES
// 8 rows of weights by 4 of activations in long calls: 32 sums in as many registers as leave room for their totals. With i8mm one
// instruction multiplies two rows of each, 8 inputs long, so two of every four sums are of one row of weights and two of the next.
struct Tile {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  int32x4_t v[2][4];  // (2 x 2 rows of activations, 4 x 2 rows of weights)
  static Tile begin(const int32_t* starts) {
    Tile r;
    for (int x = 0; x < 2; ++x) {
      const int32x2_t two = vld1_s32(starts + 2 * x);
      for (int w = 0; w < 4; ++w) r.v[x][w] = vcombine_s32(two, two);
    }
    return r;
  }
  // 8 inputs. codes: as store_octet writes them; a: the first 4 of each row, and a + next: the others.
  void add(const uint8_t* codes, const int8_t* a, size_t next) {
    const int32x4_t left = vreinterpretq_s32_s8(vld1q_s8(a)), right = vreinterpretq_s32_s8(vld1q_s8(a + next));
    const int8x16_t rows[2] = {vreinterpretq_s8_s32(vzip1q_s32(left, right)), vreinterpretq_s8_s32(vzip2q_s32(left, right))};
    for (int w = 0; w < 4; ++w) {
      const uint8x16_t two = vld1q_u8(codes + 16 * w);
      for (int x = 0; x < 2; ++x) v[x][w] = vusmmlaq_s32(v[x][w], two, rows[x]);
    }
  }
  static constexpr size_t kHalf = 64;  // bytes of an octet of 8 rows
#else
  int32x4_t v[4][2];  // (4 rows of activations, 2 x 4 rows of weights)
  static Tile begin(const int32_t* starts) {
    Tile r;
    for (int x = 0; x < 4; ++x)
      for (int w = 0; w < 2; ++w) r.v[x][w] = vdupq_n_s32(starts[x]);
    return r;
  }
  void add(const uint8_t* codes, const int8_t* a, size_t next) {
    for (int word = 0; word < 2; ++word) {
      const int8x16_t rows = vld1q_s8(a + static_cast<size_t>(word) * next);
      for (int w = 0; w < 2; ++w) {
        const int8x16_t four = vreinterpretq_s8_u8(vld1q_u8(codes + 64 * word + 16 * w));
        v[0][w] = vdotq_laneq_s32(v[0][w], four, rows, 0);
        v[1][w] = vdotq_laneq_s32(v[1][w], four, rows, 1);
        v[2][w] = vdotq_laneq_s32(v[2][w], four, rows, 2);
        v[3][w] = vdotq_laneq_s32(v[3][w], four, rows, 3);
      }
    }
  }
  static constexpr size_t kHalf = 32;
#endif
};

// The same sums, scaled, of all groups so far.
struct TileTotal {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  float32x4_t v[2][4];
  static TileTotal load(const float* p, size_t stride) {  // 8 columns of 4 rows
    TileTotal r;
    for (int x = 0; x < 2; ++x)
      for (int four = 0; four < 2; ++four) {
        const float32x4_t one = vld1q_f32(p + static_cast<size_t>(2 * x) * stride + 4 * four), two = vld1q_f32(p + static_cast<size_t>(2 * x + 1) * stride + 4 * four);
        r.v[x][2 * four] = vzip1q_f32(one, two);
        r.v[x][2 * four + 1] = vzip2q_f32(one, two);
      }
    return r;
  }
  void store(float* p, size_t stride) const {
    for (int x = 0; x < 2; ++x)
      for (int four = 0; four < 2; ++four) {
        vst1q_f32(p + static_cast<size_t>(2 * x) * stride + 4 * four, vuzp1q_f32(v[x][2 * four], v[x][2 * four + 1]));
        vst1q_f32(p + static_cast<size_t>(2 * x + 1) * stride + 4 * four, vuzp2q_f32(v[x][2 * four], v[x][2 * four + 1]));
      }
  }
  void add(const Tile& sums, const float* scales, const float* a_scales) {
    float32x4_t rows[4];
    for (int four = 0; four < 2; ++four) {
      const float32x4_t own = vld1q_f32(scales + 4 * four);
      rows[2 * four] = vzip1q_f32(own, own);
      rows[2 * four + 1] = vzip2q_f32(own, own);
    }
    for (int x = 0; x < 2; ++x) {
      const float32x2_t two = vld1_f32(a_scales + 2 * x);
      const float32x4_t both = vcombine_f32(two, two);
      for (int w = 0; w < 4; ++w) v[x][w] = vfmaq_f32(v[x][w], vcvtq_f32_s32(sums.v[x][w]), vmulq_f32(rows[w], both));
    }
  }
#else
  float32x4_t v[4][2];
  static TileTotal load(const float* p, size_t stride) {
    TileTotal r;
    for (int x = 0; x < 4; ++x)
      for (int w = 0; w < 2; ++w) r.v[x][w] = vld1q_f32(p + static_cast<size_t>(x) * stride + 4 * w);
    return r;
  }
  void store(float* p, size_t stride) const {
    for (int x = 0; x < 4; ++x)
      for (int w = 0; w < 2; ++w) vst1q_f32(p + static_cast<size_t>(x) * stride + 4 * w, v[x][w]);
  }
  void add(const Tile& sums, const float* scales, const float* a_scales) {
    for (int w = 0; w < 2; ++w) {
      const float32x4_t rows = vld1q_f32(scales + 4 * w);
      for (int x = 0; x < 4; ++x) v[x][w] = vfmaq_f32(v[x][w], vcvtq_f32_s32(sums.v[x][w]), vmulq_n_f32(rows, a_scales[x]));
    }
  }
#endif
};
#endif

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

ZAMBA2_INLINE void load_pairs(const uint16_t* p, F16& even, F16& odd) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t v = vreinterpretq_u32_u16(vld1q_u16(p + 8 * i));
    even.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(v, 16));
    odd.v[i] = vreinterpretq_f32_u32(vandq_u32(v, vdupq_n_u32(0xffff0000u)));
  }
}

#else  // any machine: four lanes at a time, which compilers turn into its own instructions where it has some

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint32_t FourBits __attribute__((vector_size(16)));
typedef int16_t EightShorts __attribute__((vector_size(16)));

ZAMBA2_INLINE FourBits bits(Four a) { return reinterpret_cast<FourBits>(a); }
ZAMBA2_INLINE Four floats(FourBits a) { return reinterpret_cast<Four>(a); }
template <class Mask> ZAMBA2_INLINE Four select(Mask mask, Four a, Four b) {
  const FourBits m = reinterpret_cast<FourBits>(mask);
  return floats((m & bits(a)) | (~m & bits(b)));
}
ZAMBA2_INLINE Four same4(float x) { return Four{x, x, x, x}; }
ZAMBA2_INLINE FourBits same4(uint32_t x) { return FourBits{x, x, x, x}; }
ZAMBA2_INLINE FourBits widen(const uint16_t* p) { return FourBits{p[0], p[1], p[2], p[3]}; }
ZAMBA2_INLINE Four larger(Four a, Four b) { return select(a > b, a, b); }
ZAMBA2_INLINE Four smaller(Four a, Four b) { return select(a < b, a, b); }
ZAMBA2_INLINE Four with_sign(Four a, Four s) { return floats((bits(a) & same4(0x7fffffffu)) | (bits(s) & same4(0x80000000u))); }
ZAMBA2_INLINE Four nearest(Four a) {  // half to even; adding 2^23 leaves no room for a fraction, and numbers of that size have none
  const Four size = floats(bits(a) & same4(0x7fffffffu)), whole = (size + same4(8388608.0f)) - same4(8388608.0f);
  return select(size < same4(8388608.0f), with_sign(whole, a), a);
}

struct F16 {
  Four v[4];
#define ZAMBA2_EACH(expression) \
  F16 r;                        \
  for (int i = 0; i < 4; ++i) r.v[i] = expression; \
  return r
  static F16 load(const float* p) { F16 r; std::memcpy(r.v, p, sizeof r.v); return r; }
  static F16 set1(float x) { ZAMBA2_EACH(same4(x)); }
  static F16 zero() { return set1(0.0f); }
  static Four half(const uint16_t* p) {
    const FourBits h = widen(p), sign = (h & same4(0x8000u)) << 16, size = h & same4(0x7fffu);
    const Four small = __builtin_convertvector(reinterpret_cast<FourInts>(size), Four) * same4(0x1p-24f);  // never denormal: those may count as zero
    const FourBits bias = same4(112u << 23), unfinite = reinterpret_cast<FourBits>(size >= same4(0x7c00u));
    const FourBits large = (size << 13) + bias + (unfinite & bias);
    return floats(bits(select(size < same4(0x400u), small, floats(large))) | sign);
  }
  static F16 load_fp16(const uint16_t* p) { ZAMBA2_EACH(half(p + 4 * i)); }
  static F16 load_bf16(const uint16_t* p) { ZAMBA2_EACH(floats(widen(p + 4 * i) << 16)); }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void store_bf16(uint16_t* p) const {
    for (int i = 0; i < 4; ++i) {
      const FourBits own = bits(v[i]), odd = (own >> 16) & same4(1u);
      const Four r = select(v[i] == v[i], floats((own + same4(0x7fffu) + odd) >> 16), floats(same4(0x7fc0u)));
      for (int j = 0; j < 4; ++j) p[4 * i + j] = static_cast<uint16_t>(bits(r)[j]);
    }
  }
  friend F16 operator+(F16 a, F16 b) { ZAMBA2_EACH(a.v[i] + b.v[i]); }
  friend F16 operator-(F16 a, F16 b) { ZAMBA2_EACH(a.v[i] - b.v[i]); }
  friend F16 operator*(F16 a, F16 b) { ZAMBA2_EACH(a.v[i] * b.v[i]); }
  friend F16 operator/(F16 a, F16 b) { ZAMBA2_EACH(a.v[i] / b.v[i]); }
  friend F16 fma(F16 a, F16 b, F16 c) { ZAMBA2_EACH(a.v[i] * b.v[i] + c.v[i]); }
  friend F16 max(F16 a, F16 b) { ZAMBA2_EACH(larger(a.v[i], b.v[i])); }
  friend F16 min(F16 a, F16 b) { ZAMBA2_EACH(smaller(a.v[i], b.v[i])); }
  friend F16 abs(F16 a) { ZAMBA2_EACH(floats(bits(a.v[i]) & same4(0x7fffffffu))); }
  friend F16 round(F16 a) { ZAMBA2_EACH(nearest(a.v[i])); }
  friend F16 pow2(F16 n) {
    ZAMBA2_EACH(floats((reinterpret_cast<FourBits>(__builtin_convertvector(select(n.v[i] == n.v[i], n.v[i], Four{}), FourInts)) + same4(127u)) << 23));
  }
  friend F16 copysign(F16 a, F16 s) { ZAMBA2_EACH(with_sign(a.v[i], s.v[i])); }
  friend F16 where_at_least(F16 x, F16 bound, F16 a) { ZAMBA2_EACH(select(x.v[i] < bound.v[i], Four{}, a.v[i])); }
  friend float sum(F16 a) {
    const Four s = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
    return (s[0] + s[2]) + (s[1] + s[3]);
  }
  friend float largest(F16 a) {
    const Four s = larger(larger(a.v[0], a.v[1]), larger(a.v[2], a.v[3]));
    const float left = s[0] > s[1] ? s[0] : s[1], right = s[2] > s[3] ? s[2] : s[3];
    return left > right ? left : right;
  }
  void store_i8(int8_t* p) const {  // saturates, as vector units do: near the least numbers there are, 127 / peak is infinite
    for (int i = 0; i < 4; ++i) {
      const Four some = select(v[i] == v[i], larger(same4(-128.0f), smaller(same4(127.0f), v[i])), Four{});
      const FourInts r = __builtin_convertvector(nearest(some), FourInts);
      for (int j = 0; j < 4; ++j) p[4 * i + j] = static_cast<int8_t>(r[j]);
    }
  }
};

struct I16 {
  FourInts v[4];
  static I16 begin(int32_t x) { I16 r; for (FourInts& four : r.v) four = FourInts{x, x, x, x}; return r; }
  I16 end() const { return *this; }
  F16 to_float() const { F16 r; for (int i = 0; i < 4; ++i) r.v[i] = __builtin_convertvector(v[i], Four); return r; }
};

struct Codes {
  FourBits v[4];
  static Codes load(const uint8_t* p) { Codes r; std::memcpy(r.v, p, 64); return r; }
  static Codes load_q8(const uint8_t* p) { return load(p); }
  void store(uint8_t* p) const { std::memcpy(p, v, 64); }
  Codes low() const { Codes r; for (int i = 0; i < 4; ++i) r.v[i] = v[i] & same4(0x0f0f0f0fu); return r; }
  Codes high() const { Codes r; for (int i = 0; i < 4; ++i) r.v[i] = (v[i] >> 4) & same4(0x0f0f0f0fu); return r; }
};

// The sum of the two products in each lane's 32 bits.
ZAMBA2_INLINE FourInts pairs(EightShorts a, EightShorts b) {
#if defined(__SSE2__)
  return __builtin_ia32_pmaddwd128(a, b);
#else
  const EightShorts products = a * b;  // of a code and an int8: at most 255 * 128
  return (reinterpret_cast<FourInts>(reinterpret_cast<FourBits>(products) << 16) >> 16) + (reinterpret_cast<FourInts>(products) >> 16);
#endif
}

ZAMBA2_INLINE I16 dot(I16 acc, Codes codes, int32_t four) {
  int8_t own[4];
  std::memcpy(own, &four, 4);
  const int16_t a[4] = {own[0], own[1], own[2], own[3]};
  const EightShorts even{a[0], a[2], a[0], a[2], a[0], a[2], a[0], a[2]}, odd{a[1], a[3], a[1], a[3], a[1], a[3], a[1], a[3]};
  for (int i = 0; i < 4; ++i) {
    const FourBits w = codes.v[i], byte = same4(0x00ff00ffu);
    acc.v[i] += pairs(reinterpret_cast<EightShorts>(w & byte), even) + pairs(reinterpret_cast<EightShorts>((w >> 8) & byte), odd);
  }
  return acc;
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

ZAMBA2_INLINE void load_pairs(const uint16_t* p, F16& even, F16& odd) {
  FourBits both[4];
  std::memcpy(both, p, sizeof both);
  for (int i = 0; i < 4; ++i) even.v[i] = floats(both[i] << 16), odd.v[i] = floats(both[i] & same4(0xffff0000u));
}

#endif

#if !defined(ZAMBA2_SUM4)
using Sum4 = I16;
#endif

// Two times four inputs of 16 rows, side by side.
ZAMBA2_INLINE void store_octet(Codes first, Codes second, uint8_t* p) {
#if defined(__ARM_FEATURE_MATMUL_INT8)  // 8 of one row, then 8 of the next
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t left = vreinterpretq_u32_u8(first.v[i]), right = vreinterpretq_u32_u8(second.v[i]);
    vst1q_u8(p + 32 * i, vreinterpretq_u8_u32(vzip1q_u32(left, right)));
    vst1q_u8(p + 32 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(left, right)));
  }
#else
  first.store(p);
  second.store(p + 64);
#endif
}

// Has a value computed here, not where it is used.
#if defined(__AVX512F__)
ZAMBA2_INLINE void keep(F16 x) { asm volatile("" : : ZAMBA2_REGISTER(x.v)); }
#else
ZAMBA2_INLINE void keep(F16) {}
#endif

#if defined(__AVX512BF16__)
constexpr bool kBf16Products = true;
struct Pairs {  // 16 pairs of bf16
  __m512bh v;
  static Pairs load(const void* p) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))}; }
  static Pairs set1(uint32_t x) { return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(x)))}; }
};
ZAMBA2_INLINE F16 fma(Pairs a, Pairs b, F16 c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }  // c + the pairs' products, two a lane
#else
constexpr bool kBf16Products = false;
#endif

// e^x within 2 ulp; 0 below -87, where fp32 would be denormal. Cephes' polynomial for the remainder after powers of two.
ZAMBA2_INLINE F16 exp(F16 x) {
  const F16 low = F16::set1(-87.0f);
  const F16 clipped = max(low, min(F16::set1(88.0f), x));  // in this order NaN stays NaN
  const F16 n = round(clipped * F16::set1(1.44269504088896341f));
  F16 r = fma(n, F16::set1(-0.693359375f), clipped);
  r = fma(n, F16::set1(2.12194440e-4f), r);
  F16 p = F16::set1(1.9875691500e-4f);
  p = fma(p, r, F16::set1(1.3981999507e-3f));
  p = fma(p, r, F16::set1(8.3334519073e-3f));
  p = fma(p, r, F16::set1(4.1665795894e-2f));
  p = fma(p, r, F16::set1(1.6666665459e-1f));
  p = fma(p, r, F16::set1(5.0000001201e-1f));
  p = fma(p * r, r, r + F16::set1(1.0f));
  return where_at_least(x, low, p * pow2(n));
}

// 1 - erf(x) for x >= 0 is exp(-x^2) times a polynomial (Abramowitz and Stegun 7.1.26, error below 1.5e-7).
ZAMBA2_INLINE F16 erf(F16 x) {
  const F16 a = abs(x);
  const F16 t = F16::set1(1.0f) / fma(F16::set1(0.3275911f), a, F16::set1(1.0f));
  F16 p = F16::set1(1.061405429f);
  p = fma(p, t, F16::set1(-1.453152027f));
  p = fma(p, t, F16::set1(1.421413741f));
  p = fma(p, t, F16::set1(-0.284496736f));
  p = fma(p, t, F16::set1(0.254829592f));
  return copysign(F16::set1(1.0f) - p * t * exp(F16::zero() - a * a), x);
}

// The first n (at most 16) lanes from memory, zeros behind them; and back.
ZAMBA2_INLINE F16 load_some(const float* p, int n) {
  if (n >= 16) return F16::load(p);
  float lanes[16] = {};
  std::memcpy(lanes, p, sizeof(float) * static_cast<size_t>(n));
  return F16::load(lanes);
}
ZAMBA2_INLINE void store_some(F16 x, float* p, int n) {
  if (n >= 16) return x.store(p);
  float lanes[16];
  x.store(lanes);
  std::memcpy(p, lanes, sizeof(float) * static_cast<size_t>(n));
}
ZAMBA2_INLINE F16 load_some_bf16(const uint16_t* p, int n) {
  if (n >= 16) return F16::load_bf16(p);
  uint16_t lanes[16] = {};
  std::memcpy(lanes, p, sizeof(uint16_t) * static_cast<size_t>(n));
  return F16::load_bf16(lanes);
}
ZAMBA2_INLINE void store_some_bf16(F16 x, uint16_t* p, int n) {
  if (n >= 16) return x.store_bf16(p);
  uint16_t lanes[16];
  x.store_bf16(lanes);
  std::memcpy(p, lanes, sizeof(uint16_t) * static_cast<size_t>(n));
}

ZAMBA2_INLINE F16 sigmoid(F16 x) { return F16::set1(1.0f) / (F16::set1(1.0f) + exp(F16::zero() - x)); }

}  // namespace zamba2::ZAMBA2_ISA
