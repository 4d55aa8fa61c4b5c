// AVX-512 (F, BW, VL, DQ, VNNI, BF16) in software, for machines with AVX2 alone: the intrinsics that csrc/ uses, as the manual
// defines them, mostly half by half. For tests alone.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#define __AVX512VNNI__ 1
#define ZAMBA2_REGISTER "m"  // no register holds 64 bytes
#define __m512bh __m512i      // where no register holds bf16, clang takes such a vector through fp32 and calls what older libgcc lacks

namespace software_avx512 {

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
template <class V, class W>
inline V cast(W w) { return load<V>(&w); }

// A vector's half: 0 the lower one.
template <class H, class V>
inline H half(const V& v, size_t which) { return load<H>(reinterpret_cast<const uint8_t*>(&v) + 32 * which); }
template <class V, class H>
inline V joined(H low, H high) {
  V v;
  store(&v, low);
  store(reinterpret_cast<uint8_t*>(&v) + 32, high);
  return v;
}
// f of the operands' halves.
template <class F, class... V>
inline __m512 floats(F f, const V&... v) { return joined<__m512>(f(half<__m256>(v, 0)...), f(half<__m256>(v, 1)...)); }
template <class F, class... V>
inline __m512i integers(F f, const V&... v) { return joined<__m512i>(f(half<__m256i>(v, 0)...), f(half<__m256i>(v, 1)...)); }

// The vector V whose element i, of type T, is f(i).
template <class V, class T, class F>
inline V each(F f) {
  T elements[sizeof(V) / sizeof(T)];
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i) elements[i] = f(i);
  return load<V>(elements);
}
template <class T, class V>
inline T element(const V& v, size_t i) { return load<T>(reinterpret_cast<const uint8_t*>(&v) + i * sizeof(T)); }

template <int how>
inline __mmask16 compared(__m512 a, __m512 b) {
  const auto mask = [&](size_t h) { return _mm256_movemask_ps(_mm256_cmp_ps(half<__m256>(a, h), half<__m256>(b, h), how)); };
  return static_cast<__mmask16>(mask(0) | mask(1) << 8);
}
template <class F>
inline float folded(__m512 a, F f) {  // halves onto halves
  const __m256 eight = f(half<__m256>(a, 0), half<__m256>(a, 1));
  const __m256 four = f(eight, _mm256_permute2f128_ps(eight, eight, 1)), two = f(four, _mm256_permute_ps(four, 0x4e));
  return _mm256_cvtss_f32(f(two, _mm256_permute_ps(two, 0xb1)));
}
inline __m512i chosen_words(__m512i other, __mmask16 mask, __m512i a) {
  return each<__m512i, int32_t>([&](size_t i) { return element<int32_t>(mask >> i & 1 ? a : other, i); });
}
inline __m512i chosen_halves(__m512i order, __m512i a) {
  return each<__m512i, uint16_t>([&](size_t i) { return element<uint16_t>(a, element<uint16_t>(order, i) & 31); });
}
template <int how>
inline __m512i shuffled(__m512i a, __m512i b) {
  return each<__m512i, uint64_t>([&](size_t i) { return element<uint64_t>(i < 4 ? a : b, (how >> i / 2 * 2 & 3) * 2 + i % 2); });
}
inline __m512i dot_bytes(__m512i sums, __m512i codes, __m512i activations) {
  return integers([](__m256i s, __m256i c, __m256i a) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(a, 8));
    return _mm256_add_epi32(s, _mm256_add_epi32(even, odd));
  }, sums, codes, activations);
}

inline __m128i to_bytes(__m512i a) {  // saturating
  return each<__m128i, int8_t>([&](size_t i) {
    const int32_t x = element<int32_t>(a, i);
    return static_cast<int8_t>(x < -128 ? -128 : x > 127 ? 127 : x);
  });
}
inline __m256i to_halves(__m512i a) { return each<__m256i, uint16_t>([&](size_t i) { return element<uint16_t>(a, 2 * i); }); }
inline __m512i from_bytes(__m128i a) { return joined<__m512i>(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))); }
inline __m512i from_halves(__m256i a) {
  return joined<__m512i>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
inline __m512 from_fp16(__m256i a) { return joined<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))); }

// bf16: denormals count as zero, ties go to even, NaN stays.
inline __m256 flushed(__m256 x) {
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), tiny = _mm256_cmp_ps(size, _mm256_set1_ps(1.17549435e-38f), _CMP_LT_OQ);
  return _mm256_blendv_ps(x, _mm256_and_ps(x, _mm256_set1_ps(-0.0f)), tiny);
}
inline __m512bh to_bf16(__m512 high, __m512 low) {
  return each<__m512bh, uint16_t>([&](size_t i) {
    const __m512& from = i < 16 ? low : high;
    const float x = element<float>(from, i % 16);
    const uint32_t bits = element<uint32_t>(from, i % 16);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    if ((bits >> 23 & 0xff) == 0) return static_cast<uint16_t>(bits >> 31 << 15);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  });
}
inline __m512 dot_bf16(__m512 sums, __m512bh a, __m512bh b) {
  return floats([](__m256 s, __m256 x, __m256 y) {
    const auto odd = [](__m256 v) { return flushed(_mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(-65536)))); };
    const auto even = [](__m256 v) { return flushed(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 16))); };
    return flushed(_mm256_fmadd_ps(even(x), even(y), flushed(_mm256_fmadd_ps(odd(x), odd(y), flushed(s)))));
  }, sums, a, b);
}

template <class V, class T, class M>
inline V loaded(M mask, const void* p) {  // touches nothing that the mask leaves out
  return each<V, T>([&](size_t i) { return mask >> i & 1 ? load<T>(static_cast<const uint8_t*>(p) + i * sizeof(T)) : T{}; });
}

}  // namespace software_avx512

#define ZAMBA2_BOTH(kind, f, ...) ::software_avx512::kind([](auto... x) { return f(x...); }, __VA_ARGS__)
#define _mm512_add_ps(a, b) ZAMBA2_BOTH(floats, _mm256_add_ps, a, b)
#define _mm512_sub_ps(a, b) ZAMBA2_BOTH(floats, _mm256_sub_ps, a, b)
#define _mm512_mul_ps(a, b) ZAMBA2_BOTH(floats, _mm256_mul_ps, a, b)
#define _mm512_div_ps(a, b) ZAMBA2_BOTH(floats, _mm256_div_ps, a, b)
#define _mm512_max_ps(a, b) ZAMBA2_BOTH(floats, _mm256_max_ps, a, b)
#define _mm512_min_ps(a, b) ZAMBA2_BOTH(floats, _mm256_min_ps, a, b)
#define _mm512_add_epi32(a, b) ZAMBA2_BOTH(integers, _mm256_add_epi32, a, b)
#define _mm512_sub_epi32(a, b) ZAMBA2_BOTH(integers, _mm256_sub_epi32, a, b)
#define _mm512_and_si512(a, b) ZAMBA2_BOTH(integers, _mm256_and_si256, a, b)
#define _mm512_andnot_si512(a, b) ZAMBA2_BOTH(integers, _mm256_andnot_si256, a, b)
#define _mm512_or_si512(a, b) ZAMBA2_BOTH(integers, _mm256_or_si256, a, b)
#define _mm512_unpackhi_epi32(a, b) ZAMBA2_BOTH(integers, _mm256_unpackhi_epi32, a, b)
#define _mm512_unpackhi_epi64(a, b) ZAMBA2_BOTH(integers, _mm256_unpackhi_epi64, a, b)
#define _mm512_unpacklo_epi32(a, b) ZAMBA2_BOTH(integers, _mm256_unpacklo_epi32, a, b)
#define _mm512_unpacklo_epi64(a, b) ZAMBA2_BOTH(integers, _mm256_unpacklo_epi64, a, b)
#define _mm512_fmadd_ps(a, b, c) ZAMBA2_BOTH(floats, _mm256_fmadd_ps, a, b, c)
#undef _mm512_slli_epi32
#define _mm512_slli_epi32(a, n) ::software_avx512::integers([&](__m256i x) { return _mm256_slli_epi32(x, n); }, a)
#undef _mm512_srli_epi16
#define _mm512_srli_epi16(a, n) ::software_avx512::integers([&](__m256i x) { return _mm256_srli_epi16(x, n); }, a)
#undef _mm512_srli_epi32
#define _mm512_srli_epi32(a, n) ::software_avx512::integers([&](__m256i x) { return _mm256_srli_epi32(x, n); }, a)
#define _mm512_abs_ps(a) ::software_avx512::floats([](__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }, a)
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(a, how) ::software_avx512::floats([](__m256 x) { return _mm256_round_ps(x, how); }, a)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, how) ::software_avx512::compared<how>(a, b)
#define _mm512_cvtps_epi32(a) \
  ::software_avx512::joined<__m512i>(_mm256_cvtps_epi32(::software_avx512::half<__m256>(a, 0)), _mm256_cvtps_epi32(::software_avx512::half<__m256>(a, 1)))
#define _mm512_cvtepi32_ps(a) \
  ::software_avx512::joined<__m512>(_mm256_cvtepi32_ps(::software_avx512::half<__m256i>(a, 0)), _mm256_cvtepi32_ps(::software_avx512::half<__m256i>(a, 1)))
#define _mm512_reduce_add_ps(a) ::software_avx512::folded(a, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); })
#define _mm512_reduce_max_ps(a) ::software_avx512::folded(a, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); })
#define _mm512_set1_epi32(x) ::software_avx512::joined<__m512i>(_mm256_set1_epi32(x), _mm256_set1_epi32(x))
#define _mm512_set1_epi8(x) ::software_avx512::joined<__m512i>(_mm256_set1_epi8(x), _mm256_set1_epi8(x))
#define _mm512_set1_ps(x) ::software_avx512::joined<__m512>(_mm256_set1_ps(x), _mm256_set1_ps(x))
#define _mm512_setzero_ps() __m512{}
#define _mm512_setzero_si512() __m512i{}
#define _mm512_castps_si512 ::software_avx512::cast<__m512i>
#define _mm512_castsi512_ps ::software_avx512::cast<__m512>
#define _mm512_cvtepi32_epi16 ::software_avx512::to_halves
#define _mm512_cvtepu16_epi32 ::software_avx512::from_halves
#define _mm512_cvtne2ps_pbh ::software_avx512::to_bf16
#define _mm512_cvtph_ps ::software_avx512::from_fp16
#define _mm512_cvtsepi32_epi8 ::software_avx512::to_bytes
#define _mm512_dpbf16_ps ::software_avx512::dot_bf16
#define _mm512_dpbusd_epi32 ::software_avx512::dot_bytes
#define _mm512_load_si512 ::software_avx512::load<__m512i>
#define _mm512_loadu_ps ::software_avx512::load<__m512>
#define _mm512_loadu_si512 ::software_avx512::load<__m512i>
#define _mm512_mask_mov_epi32 ::software_avx512::chosen_words
#define _mm512_permutexvar_epi16 ::software_avx512::chosen_halves
#define _mm512_storeu_ps ::software_avx512::store<__m512>
#define _mm512_storeu_si512 ::software_avx512::store<__m512i>
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4(a, b, how) ::software_avx512::shuffled<how>(a, b)
#define _mm512_maskz_cvtepi32_ps(mask, a) _mm512_cvtepi32_ps(a)  // all ones: gcc alone wants the masks
#define _mm512_maskz_cvtepi8_epi32(mask, a) ::software_avx512::from_bytes(a)
#define _mm512_maskz_mov_ps(mask, a) \
  ::software_avx512::cast<__m512>(::software_avx512::chosen_words(__m512i{}, mask, ::software_avx512::cast<__m512i>(a)))
#define _mm256_maskz_loadu_epi16 ::software_avx512::loaded<__m256i, uint16_t>
#define _mm_maskz_loadu_epi8 ::software_avx512::loaded<__m128i, uint8_t>
