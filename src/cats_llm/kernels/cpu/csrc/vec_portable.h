// The Vec shim in plain C++. The other vec_*.h files define the same names for one instruction set each:
//   load, store (float, bf16, f16), set, + - * /, fma, min, max, select_lt, round, pow2, sum.
// All of it is in an anonymous namespace: translation units are compiled with different flags and must share no code.
#pragma once

#include <cstring>

#include "api.h"

namespace cats {
namespace {

constexpr int kDotRows = 2;  // rows of weights that share one pass over x when there are many tokens
constexpr int kAddVectors = 1;

struct Vec {
  static constexpr int lanes = 4;
  float v[lanes];
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | rest << 13);   // infinity, NaN
  const float magnitude = rest < 0x400 ? float(rest) * 0x1p-24f            // subnormal, zero
                                       : float_of((rest << 13) + 0x38000000);
  return float_of(sign | bits_of(magnitude));
}

inline void from_float(float x, float* out) { *out = x; }

inline void from_float(float x, bf16* out) {
  const uint32_t u = bits_of(x);
  out->bits = uint16_t(x != x ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline void from_float(float x, f16* out) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  uint32_t h;
  if (rest > 0x7f800000) h = 0x7e00;
  else if (rest >= 0x477ff000) h = 0x7c00;  // rounds to more than the largest f16
  else if (rest < 0x38800000) h = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);  // subnormal: the addition rounds
  else h = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  out->bits = uint16_t(sign | h);
}

template <class T>
inline Vec load(const T* p) {
  Vec r;
  for (int i = 0; i < Vec::lanes; ++i) r.v[i] = to_float(p[i]);
  return r;
}

template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < Vec::lanes; ++i) from_float(a.v[i], p + i);
}

template <class F>
inline Vec map(Vec a, Vec b, F f) {
  Vec r;
  for (int i = 0; i < Vec::lanes; ++i) r.v[i] = f(a.v[i], b.v[i]);
  return r;
}

inline Vec set(float x) { return {{x, x, x, x}}; }
inline Vec operator+(Vec a, Vec b) { return map(a, b, [](float x, float y) { return x + y; }); }
inline Vec operator-(Vec a, Vec b) { return map(a, b, [](float x, float y) { return x - y; }); }
inline Vec operator*(Vec a, Vec b) { return map(a, b, [](float x, float y) { return x * y; }); }
inline Vec operator/(Vec a, Vec b) { return map(a, b, [](float x, float y) { return x / y; }); }
inline Vec min(Vec a, Vec b) { return map(a, b, [](float x, float y) { return x < y ? x : y; }); }  // NaN in b is kept
inline Vec max(Vec a, Vec b) { return map(a, b, [](float x, float y) { return x > y ? x : y; }); }  // NaN in b is kept

// a * b + c, rounded once: the product is exact in double.
inline Vec fma(Vec a, Vec b, Vec c) {
  Vec r;
  for (int i = 0; i < Vec::lanes; ++i) r.v[i] = float(double(a.v[i]) * b.v[i] + c.v[i]);
  return r;
}

// a * b + c for sums, where it does not matter how often it is rounded.
inline Vec madd(Vec a, Vec b, Vec c) { return a * b + c; }

inline Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  Vec r;
  for (int i = 0; i < Vec::lanes; ++i) r.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return r;
}

// Nearest integer, for |a| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
inline Vec round(Vec a) { return (a + set(0x1.8p23f)) - set(0x1.8p23f); }

// 2^k for integers k in [-126, 127]; the value for NaN is arbitrary.
inline Vec pow2(Vec k) {
  Vec r;
  for (int i = 0; i < Vec::lanes; ++i)
    r.v[i] = float_of((bits_of(k.v[i] + 0x1.8p23f) - bits_of(0x1.8p23f) + 127) << 23);
  return r;
}

inline float sum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }

}  // namespace
}  // namespace cats
