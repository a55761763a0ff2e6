// The steps of both operators, for any weight dtype T over any Vec: what api.h promises of `Steps` and `Kernels`.
// An instruction set's translation unit includes its vec_*.h, then this file, then calls `make_kernels`.
#pragma once

#include "activation.h"
#include "rows.h"

namespace cats {
namespace {

// One token reads rows one at a time, as the single stream that the hardware prefetches best. Several tokens fetch x and y
// from the cache so often that rows must share them: kDotRows share x, kAddRows share y.
constexpr int kAddRows = 8;

template <class T>
const T* row(const void* w, int64_t ld, int64_t j) {
  return static_cast<const T*>(w) + j * ld;
}

// The value of a float32 after rounding to T.
template <class T>
Vec rounded(Vec a) {
  T narrow[Vec::lanes];
  store(narrow, a);
  return load(narrow);
}

// Element i of an array of T that may be null, which stands for zeros.
template <class T>
float element(const void* p, int64_t i) {
  if (!p) return 0.0f;
  T one[Vec::lanes] = {static_cast<const T*>(p)[i]};
  float wide[Vec::lanes];
  store(wide, load(one));
  return wide[0];
}

template <class T>
void pack(const void* x, int64_t n, int64_t d, void* packed) {
  auto to = static_cast<typename Dot<T>::X*>(packed);
  for (int64_t c = 0; c < d; c += kChunk)
    for (int64_t i = 0; i < n; ++i, to += kChunk) {
      const T* from = static_cast<const T*>(x) + i * d;
      if (c + kChunk <= d) Dot<T>::pack(from + c, to);
      else Dot<T>::pack(Tail<T, 1>(&from, c, d - c).data[0], to);
    }
}

// Calls visit(first row, sums) for tiles of R rows; sums[r, i] = row . x_i.
template <class T, int R, class Visit>
int64_t dot_row_tiles(const void* w, int64_t ld, Range range, const void* packed, int64_t n, int64_t d, Visit visit) {
  int64_t j = range.begin;
  for (; j + R <= range.end; j += R) {
    const T *rows[R], *next[R];
    for (int r = 0; r < R; ++r) {
      rows[r] = row<T>(w, ld, j + r);
      next[r] = j + R + r < range.end ? row<T>(w, ld, j + R + r) : rows[r];
    }
    float sums[R * kMaxTokens];
    dot<T, R>(rows, next, static_cast<const typename Dot<T>::X*>(packed), n, d, sums);
    for (int r = 0; r < R; ++r) visit(j + r, sums + r * kMaxTokens);
  }
  return j;
}

template <class T, class Visit>
void dot_rows(const void* w, int64_t ld, Range range, const void* packed, int64_t n, int64_t d, Visit visit) {
  if (n > 1) range.begin = dot_row_tiles<T, kDotRows>(w, ld, range, packed, n, d, visit);
  dot_row_tiles<T, 1>(w, ld, range, packed, n, d, visit);
}

// In place: act(gate rounded to T), as the definition has it.
template <class T, class Act>
void activate(float* a, int64_t count, Act act) {
  int64_t i = 0;
  for (; i + Vec::lanes <= count; i += Vec::lanes) store(a + i, act(rounded<T>(load(a + i))));
  if (i < count) {
    float last[Vec::lanes] = {};
    std::memcpy(last, a + i, size_t(count - i) * sizeof(float));
    store(last, act(rounded<T>(load(last))));
    std::memcpy(a + i, last, size_t(count - i) * sizeof(float));
  }
}

template <class T>
int64_t gate(const Mlp& m, const void* packed, Range rows, float* a, int32_t* active) {
  dot_rows<T>(m.w_gate, m.ld_gate, rows, packed, m.n, m.d, [&](int64_t j, const float* sums) {
    const float bias = element<T>(m.b_gate, j);
    for (int64_t i = 0; i < m.n; ++i) a[j * m.n + i] = sums[i] + bias;
  });
  float* first = a + rows.begin * m.n;
  const int64_t count = (rows.end - rows.begin) * m.n;
  switch (m.activation) {
    case Activation::silu: activate<T>(first, count, silu); break;
    case Activation::gelu: activate<T>(first, count, gelu); break;
    case Activation::gelu_tanh: activate<T>(first, count, gelu_tanh); break;
    case Activation::relu: activate<T>(first, count, relu); break;
  }
  int64_t active_count = 0;
  for (int64_t j = rows.begin; j < rows.end; ++j) {
    const float t = m.threshold[j * m.threshold_stride];
    bool any = false;
    for (float* v = a + j * m.n; v < a + (j + 1) * m.n; ++v) {
      if (__builtin_fabsf(*v) < t) *v = 0.0f;  // false for NaN, which is thus active and shows in y
      any |= *v != 0.0f;
    }
    active[active_count] = int32_t(j);
    active_count += any;
  }
  return active_count;
}

// Tiles of R neurons: their up dot products, then their rows of w_down.
template <class T, int R, int N>
int64_t up_down_tiles(const Mlp& m, const void* packed, const float* a, const int32_t* active, int64_t k, int64_t count,
                      float* partial) {
  for (; k + R <= count; k += R) {
    const T *up[R], *down[R], *next[R];
    for (int r = 0; r < R; ++r) {
      up[r] = row<T>(m.w_up, m.ld_up, active[k + r]);
      down[r] = row<T>(m.w_down, m.ld_down, active[k + r]);
      next[r] = k + R + r < count ? row<T>(m.w_up, m.ld_up, active[k + R + r]) : down[r];
    }
    for (int64_t later = k + 2 * R; later < k + 3 * R && later < count; ++later) {
      prefetch_pages(row<T>(m.w_up, m.ld_up, active[later]), m.d);
      prefetch_pages(row<T>(m.w_down, m.ld_down, active[later]), m.d);
    }
    float scale[R * kMaxTokens];
    constexpr int D = R < kDotRows ? R : kDotRows;
    for (int r = 0; r < R; r += D)
      dot<T, D>(up + r, down + r, static_cast<const typename Dot<T>::X*>(packed), m.n, m.d, scale + r * kMaxTokens);
    for (int r = 0; r < R; ++r) {
      const float bias = element<T>(m.b_up, active[k + r]);
      for (int64_t i = 0; i < m.n; ++i) {
        const float act = a[active[k + r] * m.n + i];
        float& s = scale[r * kMaxTokens + i];
        s = act == 0.0f ? 0.0f : act * (s + bias);  // a token that masks this neuron must not see its infinities
      }
    }
    add_rows<T, R, N>(down, next, scale, m.n, m.d, partial);
  }
  return k;
}

template <class T>
void up_down(const Mlp& m, const void* packed, const float* a, const int32_t* active, int64_t count, float* partial) {
  std::memset(partial, 0, size_t(chunks(m.d) * kChunk * m.n) * sizeof(float));
  if (m.n == 1) {
    up_down_tiles<T, 1, 1>(m, packed, a, active, 0, count, partial);
  } else {
    const int64_t done = up_down_tiles<T, kAddRows, 0>(m, packed, a, active, 0, count, partial);
    up_down_tiles<T, 1, 0>(m, packed, a, active, done, count, partial);
  }
}

template <class T>
void reduce_partials(const Mlp& m, const float* partials, int64_t count, int64_t stride, Range range) {
  for (int64_t c = range.begin; c < range.end; ++c) {
    const int64_t column = c * kChunk, width = m.d - column < kChunk ? m.d - column : kChunk;
    T bias[kChunk] = {};
    if (m.b_down) std::memcpy(bias, static_cast<const T*>(m.b_down) + column, size_t(width) * sizeof(T));
    for (int64_t i = 0; i < m.n; ++i) {
      const float* from = partials + (c * m.n + i) * kChunk;
      T y[kChunk];
      for (int64_t s = 0; s < kChunk; s += Vec::lanes) {
        Vec total = set(0.0f);
        for (int64_t b = 0; b < count; ++b) total = total + load(from + b * stride + s);
        store(y + s, total + load(bias + s));
      }
      std::memcpy(static_cast<T*>(m.y) + i * m.d + column, y, size_t(width) * sizeof(T));
    }
  }
}

template <class T>
void linear(const Linear& m, const void* packed, Range rows) {
  for (int64_t first = rows.begin; first < rows.end; first += kChunk) {
    const int64_t count = rows.end - first < kChunk ? rows.end - first : kChunk;
    float y[kMaxTokens][kChunk] = {};
    dot_rows<T>(m.w, m.ld, {first, first + count}, packed, m.n, m.d, [&](int64_t o, const float* sums) {
      const float bias = element<T>(m.bias, o);
      for (int64_t i = 0; i < m.n; ++i) y[i][o - first] = sums[i] + bias;
    });
    for (int64_t i = 0; i < m.n; ++i) {
      T narrow[kChunk];
      for (int64_t s = 0; s < kChunk; s += Vec::lanes) store(narrow + s, load(y[i] + s));
      std::memcpy(static_cast<T*>(m.y) + i * m.ld_y + first, narrow, size_t(count) * sizeof(T));
    }
  }
}

inline uint64_t read_checksum(const void* data, int64_t bytes) {
  constexpr int words = 64;
  const char* p = static_cast<const char*>(data);
  uint64_t acc[words] = {}, block[words];
  for (; bytes >= int64_t(sizeof block); bytes -= sizeof block, p += sizeof block) {
    std::memcpy(block, p, sizeof block);
    for (int w = 0; w < words; ++w) acc[w] ^= block[w];
  }
  for (; bytes > 0; --bytes, ++p) acc[0] ^= static_cast<unsigned char>(*p);
  for (int w = 1; w < words; ++w) acc[0] ^= acc[w];
  return acc[0];
}

template <class T>
constexpr Steps make_steps() {
  return {sizeof(typename Dot<T>::X), pack<T>, gate<T>, up_down<T>, reduce_partials<T>, linear<T>};
}

constexpr Kernels make_kernels(const char* name) {
  return {name, make_steps<float>(), make_steps<bf16>(), make_steps<f16>(), read_checksum};
}

}  // namespace
}  // namespace cats
