// The activations in float32, to a few units in the last place: they decide which neurons are computed.
#pragma once

namespace cats {
namespace {

// e^x = 2^k e^r with |r| <= ln(2) / 2; the series of e^r to degree 7 is exact to 1e-8.
inline Vec exp(Vec x) {
  x = min(set(89.0f), max(set(-104.0f), x));  // beyond: infinity and zero
  const Vec k = round(x * set(0x1.715476p0f));
  Vec r = fma(k, set(-0x1.62e4p-1f), x);  // ln(2) in two parts
  r = fma(k, set(-0x1.7f7d1cp-20f), r);
  Vec p = set(1.0f / 5040);
  p = fma(p, r, set(1.0f / 720));
  p = fma(p, r, set(1.0f / 120));
  p = fma(p, r, set(1.0f / 24));
  p = fma(p, r, set(1.0f / 6));
  p = fma(p, r, set(0.5f));
  p = fma(p, r, set(1.0f));
  p = fma(p, r, set(1.0f));
  const Vec half = round(k * set(0.5f));  // in two steps, since 2^k alone may overflow where e^x does not
  return p * pow2(half) * pow2(k - half);
}

inline Vec silu(Vec x) { return x / (set(1.0f) + exp(set(0.0f) - x)); }

// 0.5 x (1 + tanh(z)) = x / (1 + e^-2z), which does not cancel where tanh is near -1.
inline Vec gelu_tanh(Vec x) {
  constexpr float c = -1.5957691216057308f;  // -2 sqrt(2 / pi)
  return x / (set(1.0f) + exp(x * fma(set(c * 0.044715f), x * x, set(c))));
}

// x Phi(x). The tail Phi(-u) = e^(-u^2/2) p(q) / (1 + sqrt(2) u) / 2 with q = (u - 2 sqrt(2)) / (u + 2 sqrt(2)) keeps its
// relative accuracy, where (1 + erf(x / sqrt(2))) / 2 loses it. p: Chebyshev fit on u in [0, 15], error 5e-8; after
// Shepherd and Laframboise, Math. Comp. 36 (1981).
inline Vec gelu(Vec x) {
  const Vec zero = set(0.0f), minus = zero - x;
  const Vec u = min(set(15.0f), select_lt(x, zero, minus, x));
  const Vec q = (u - set(2.8284271f)) / (u + set(2.8284271f));
  Vec p = set(-0.000404151069f);
  p = fma(p, q, set(-0.001231239759f));
  p = fma(p, q, set(0.001321116812f));
  p = fma(p, q, set(0.008634896949f));
  p = fma(p, q, set(-0.008064144290f));
  p = fma(p, q, set(-0.054205831140f));
  p = fma(p, q, set(0.164056196809f));
  p = fma(p, q, set(-0.166031226516f));
  p = fma(p, q, set(-0.092764027417f));
  p = fma(p, q, set(1.276978373528f));
  const Vec h = set(0.5f) * u, s = h * u;
  const Vec lost = fma(h, u, zero - s);  // what rounding took from u^2 / 2
  const Vec e = exp(zero - s), tail = set(0.5f) * (e - e * lost) * p / fma(set(1.4142136f), u, set(1.0f));
  return x * select_lt(x, zero, tail, set(1.0f) - tail);
}

inline Vec relu(Vec x) { return select_lt(x, set(0.0f), set(0.0f), x); }  // keeps NaN

}  // namespace
}  // namespace cats
