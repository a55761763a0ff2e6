// The Vec shim (see vec_portable.h) for AArch64.
#pragma once

#include <arm_neon.h>

#include "api.h"

namespace cats {
namespace {

constexpr int kDotRows = 4;  // 4 x 4 accumulators and their operands fit 32 registers
constexpr int kAddVectors = 2;

struct Vec {
  static constexpr int lanes = 4;
  float32x4_t v;
};

inline Vec load(const float* p) { return {vld1q_f32(p)}; }

inline Vec load(const bf16* p) {
  const uint16x4_t h = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vreinterpretq_f32_u32(vshll_n_u16(h, 16))};
}

inline Vec load(const f16* p) {
  const uint16x4_t h = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vcvt_f32_f16(vreinterpret_f16_u16(h))};
}

inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }

inline void store(bf16* p, Vec a) {
  const uint32x4_t u = vreinterpretq_u32_f32(a.v), high = vshrq_n_u32(u, 16);
  const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
  const uint32x4_t even = vshrq_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
  const uint32x4_t number = vceqq_f32(a.v, a.v);
  const uint32x4_t r = vbslq_u32(number, even, vorrq_u32(high, vdupq_n_u32(0x40)));
  vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(r));
}

inline void store(f16* p, Vec a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}

inline Vec set(float x) { return {vdupq_n_f32(x)}; }
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec madd(Vec a, Vec b, Vec c) { return fma(a, b, c); }
inline Vec select_lt(Vec a, Vec b, Vec yes, Vec no) { return {vbslq_f32(vcltq_f32(a.v, b.v), yes.v, no.v)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }

inline Vec pow2(Vec k) {
  const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(k.v), vdupq_n_s32(127));
  return {vreinterpretq_f32_s32(vshlq_n_s32(biased, 23))};
}

inline float sum(Vec a) { return vaddvq_f32(a.v); }

}  // namespace
}  // namespace cats
