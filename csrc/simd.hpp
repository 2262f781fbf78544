// Vectors of the instruction set that this file is compiled for, and the lanes that the kernels compute on.
//
// Two vectors hold 2 W consecutive elements, those at even and those at odd places: a bfloat16 is the high half of a
// float32, so one shift and one mask unpack a word of two, and no lane ever has to move.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace collage {
namespace {

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int LANES = 2 * W;
constexpr int padded(int count) { return (count + LANES - 1) / LANES * LANES; }  // to whole chunks
constexpr int place_of(int i) { return i / LANES * LANES + i % 2 * W + i % LANES / 2; }  // in buffers of lanes

// Lanes: one vector of W numbers. Arithmetic is the operators of the compiler's vectors.
typedef float F32 __attribute__((vector_size(4 * W)));
typedef uint32_t U32 __attribute__((vector_size(4 * W)));
typedef int32_t Mask __attribute__((vector_size(4 * W)));  // 0 or -1
typedef double F64 __attribute__((vector_size(4 * W)));   // of half as many numbers

typedef uint16_t U16 __attribute__((vector_size(2 * W)));
typedef int16_t I16 __attribute__((vector_size(2 * W)));
typedef uint8_t Bytes __attribute__((vector_size(2 * W)));
typedef int16_t Words __attribute__((vector_size(4 * W)));  // of 2 W consecutive elements

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void save(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline F32 sqrt(F32 x) {
#if defined(__AVX512BW__)
  return (F32)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (F32)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (F32)_mm_sqrt_ps((__m128)x);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (F32)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// The low halves of a's words under the high halves of b's.
inline U32 blend_high(U32 a, U32 b) {
#if defined(__AVX512BW__)
  return (U32)_mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U32)_mm256_blend_epi16((__m256i)a, (__m256i)b, 0xAA);
#else
  return (a & 0xFFFF) | (b & 0xFFFF0000);
#endif
}

inline bool all(Mask mask) {
#if defined(__AVX512BW__)
  return _mm512_movepi32_mask((__m512i)mask) == 0xFFFF;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) == 0xFF;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) == 0xF;
#else
  int32_t every = -1;
  for (int i = 0; i < W; ++i) every &= mask[i];
  return every;
#endif
}

inline bool some(Bytes x) {  // not 0
#if defined(__AVX512BW__)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#elif defined(__AVX2__)
  return !_mm_testz_si128((__m128i)x, (__m128i)x);
#else
  uint64_t word;
  static_assert(sizeof word == sizeof x);
  std::memcpy(&word, &x, sizeof word);
  return word != 0;
#endif
}

inline U32 min_signed(U32 a, U32 b) {
#if defined(__AVX512BW__)
  return (U32)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U32)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
  return (Mask)a < (Mask)b ? a : b;
#endif
}

inline U32 min_unsigned(U32 a, U32 b) {
#if defined(__AVX512BW__)
  return (U32)_mm512_min_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U32)_mm256_min_epu32((__m256i)a, (__m256i)b);
#else
  return a < b ? a : b;
#endif
}

// Of numbers. Where one is NaN, b.
inline F32 larger(F32 a, F32 b) {
#if defined(__AVX512BW__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline F32 smaller(F32 a, F32 b) {
#if defined(__AVX512BW__)
  return (F32)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// W words of 16 bits in memory, as lanes: with and without a sign, and back.
inline Mask wide_words(const void* p) {
#if defined(__AVX512BW__)
  return (Mask)_mm512_cvtepu16_epi32(load<__m256i>(p));
#else
  return (Mask)__builtin_convertvector(load<U16>(p), U32);
#endif
}

inline Mask signed_words(const void* p) {
#if defined(__AVX512BW__)
  return (Mask)_mm512_cvtepi16_epi32(load<__m256i>(p));
#else
  return __builtin_convertvector(load<I16>(p), Mask);
#endif
}

inline void save_words(void* p, U32 x) {
#if defined(__AVX512BW__)
  save(p, _mm512_cvtepi32_epi16((__m512i)x));
#else
  save(p, __builtin_convertvector(x, U16));
#endif
}

// To nearest even, of 0 <= x <= 2^24.
inline Mask nearest(F32 x) {
#if defined(__AVX512BW__)
  return (Mask)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (Mask)_mm256_cvtps_epi32((__m256)x);
#else
  return __builtin_convertvector(x < 0x1p23f ? (x + 0x1p23f) - 0x1p23f : x, Mask);
#endif
}

// float16 codes of W numbers, converted by the processor: exactly, or to nearest, whatever its modes.
#if defined(__F16C__) || defined(__AVX512F__)
#define COLLAGE_HALVES

inline F32 from_halves(U16 codes) {
#if defined(__AVX512BW__)
  return (F32)_mm512_cvtph_ps((__m256i)codes);
#else
  return (F32)_mm256_cvtph_ps((__m128i)codes);
#endif
}

inline U16 to_halves(F32 x) {
#if defined(__AVX512BW__)
  return (U16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}
#endif

// The lower (part 0) or upper (part 1) lanes in float64.
template <int part>
inline F64 wide(F32 x) {
#if defined(__AVX512BW__)
  return (F64)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, part));
#elif defined(__AVX2__)
  return (F64)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, part));
#else
  F64 y{};
  for (int i = 0; i < W / 2; ++i) y[i] = x[part * (W / 2) + i];
  return y;
#endif
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline F32 splat(float x) { return F32{} + x; }
inline Mask finite(F32 x) { return x - x == F32{}; }

inline bool all_finite(F32 x) {
#if defined(__AVX512BW__)  // the compiler makes a vector of a mask, and a mask of that
  return _mm512_cmp_ps_mask((__m512)(x - x), _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xFFFF;
#else
  return all(finite(x));
#endif
}

inline F32 keep(Mask m, F32 x) { return (F32)((Mask)x & m); }  // +0 elsewhere
inline F32 magnitude(F32 x) { return (F32)((U32)x & 0x7FFFFFFF); }
inline F32 converted(Mask x) { return __builtin_convertvector(x, F32); }
inline Mask larger(Mask a, Mask b) { return a > b ? a : b; }
inline U32 larger(U32 a, U32 b) { return a > b ? a : b; }
inline Mask larger(Mask a, int b) { return larger(a, Mask{} + b); }
inline Mask smaller(Mask a, int b) { return a < b ? a : Mask{} + b; }


constexpr float power(int exponent) { return exponent < 0 ? power(exponent + 1) / 2 : exponent ? power(exponent - 1) * 2 : 1; }

}  // namespace
}  // namespace collage
