// What is done with rows of weights: dot products with x, and sums of scaled rows into y.
#pragma once

#include <cstring>

#if defined(__clang__)
#define CATS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CATS_UNROLL _Pragma("GCC unroll 64")
#endif
#define CATS_ALWAYS_INLINE __attribute__((always_inline))

namespace cats {
namespace {

// Bytes by which prefetching runs ahead of the loads: about the memory latency times a core's bandwidth.
constexpr int64_t kAhead = 6144;

// Runs ahead of a row and, near its end, into the row that will be read next.
struct Prefetcher {
  const char *here, *there;
  int64_t split;

  template <class T>
  void start(const T* row, const T* next, int64_t d) {
    const int64_t bytes = d * int64_t(sizeof(T)), ahead = bytes < kAhead ? bytes : kAhead;
    here = reinterpret_cast<const char*>(row) + ahead;
    there = reinterpret_cast<const char*>(next) - (bytes - ahead);
    split = bytes - ahead;
  }

  // For a load of `bytes` bytes at `offset`.
  template <int bytes>
  inline CATS_ALWAYS_INLINE void fetch(int64_t offset) const {
    const char* p = (offset < split ? here : there) + offset;
    CATS_UNROLL
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(p + line);
  }
};

// Touches the first lines of each page of a row that will be read soon but that nothing predicts: its address translation
// and the hardware's own prefetching are then under way when the Prefetcher arrives.
template <class T>
void prefetch_pages(const T* row, int64_t d) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t offset = 0; offset < d * int64_t(sizeof(T)); offset += 4096) {
    __builtin_prefetch(p + offset);
    __builtin_prefetch(p + offset + 64);
  }
}

// How weights of type T meet x: as float32 vectors, unless the instruction set specialises it.
template <class T>
struct Dot {
  using X = float;
  static constexpr int width = Vec::lanes;
  static inline CATS_ALWAYS_INLINE Vec weights(const T* p) { return load(p); }
  static inline CATS_ALWAYS_INLINE Vec inputs(const float* p) { return load(p); }
  static inline CATS_ALWAYS_INLINE Vec madd(Vec w, Vec x, Vec acc) { return cats::madd(w, x, acc); }
  static void pack(const T* from, float* to) {
    for (int i = 0; i < kChunk; i += width) store(to + i, load(from + i));
  }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 products summed in float32: no conversion, half the instructions.
template <>
struct Dot<bf16> {
  using X = bf16;
  static constexpr int width = 32;
  static inline CATS_ALWAYS_INLINE __m512bh weights(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline CATS_ALWAYS_INLINE __m512bh inputs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline CATS_ALWAYS_INLINE Vec madd(__m512bh w, __m512bh x, Vec acc) { return {_mm512_dpbf16_ps(acc.v, w, x)}; }
  static void pack(const bf16* from, bf16* to) { std::memcpy(to, from, kChunk * sizeof(bf16)); }
};
#endif

// The last, partial chunk of each row, padded with zeros.
template <class T, int R>
struct Tail {
  T data[R][kChunk];
  const T* rows[R];
  Tail(const T* const* from, int64_t offset, int64_t count) {
    std::memset(data, 0, sizeof data);
    for (int r = 0; r < R; ++r) {
      std::memcpy(data[r], from[r] + offset, size_t(count) * sizeof(T));
      rows[r] = data[r];
    }
  }
};

// The dot products of R rows with N tokens, in the making.
template <class T, int R, int N>
struct Tile {
  using D = Dot<T>;
  static constexpr int steps = kChunk / D::width;
  // enough independent sums to hide the latency of an addition, few enough to stay in registers
  static constexpr int sums = R * N > 4 ? 1 : R * N > 1 ? 2 : steps < 4 ? steps : 4;
  Vec state[R][N][sums];

  void clear() {
    for (auto& row : state)
      for (auto& token : row)
        for (Vec& sum : token) sum = set(0.0f);
  }

  // Adds columns begin to end. `x` points at the first of the N tokens among `n` packed ones.
  template <bool fetch>
  void add(const T* const* rows, const Prefetcher* prefetch, const typename D::X* x, int64_t n, int64_t begin,
           int64_t end) {
    Vec acc[R][N][sums];  // in registers
    std::memcpy(acc, state, sizeof acc);
    const auto add_chunk = [&](const T* const* w, int64_t offset, const typename D::X* xc) CATS_ALWAYS_INLINE {
      CATS_UNROLL
      for (int s = 0; s < steps; ++s) {
        decltype(D::weights(w[0])) weights[R];
        CATS_UNROLL
        for (int r = 0; r < R; ++r) weights[r] = D::weights(w[r] + offset + s * D::width);
        CATS_UNROLL
        for (int i = 0; i < N; ++i) {
          const auto inputs = D::inputs(xc + i * kChunk + s * D::width);
          CATS_UNROLL
          for (int r = 0; r < R; ++r) acc[r][i][s % sums] = D::madd(weights[r], inputs, acc[r][i][s % sums]);
        }
      }
    };
    const int64_t whole = end - end % kChunk;
    for (int64_t c = begin; c < whole; c += kChunk) {
      CATS_UNROLL
      for (int r = 0; fetch && r < R; ++r) prefetch[r].template fetch<kChunk * sizeof(T)>(c * int64_t(sizeof(T)));
      add_chunk(rows, c, x + c * n);
    }
    if (whole < end) add_chunk(Tail<T, R>(rows, whole, end - whole).rows, 0, x + whole * n);
    std::memcpy(state, acc, sizeof acc);
  }

  void finish(float* out) const {
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) {
        Vec total = state[r][i][0];
        for (int k = 1; k < sums; ++k) total = total + state[r][i][k];
        out[r * kMaxTokens + i] = sum(total);
      }
  }
};

constexpr int kTileTokens = 4;

// Columns that all tokens take before the next ones: these pieces of the rows then stay in the first-level cache.
constexpr int64_t kDotColumns = 1024;

// `dot` for n = whole tiles of tokens and `Rest` more.
template <class T, int R, int Rest>
void dot_tiles(const T* const* rows, const Prefetcher* prefetch, const typename Dot<T>::X* x, int64_t n, int64_t d,
               float* out) {
  Tile<T, R, kTileTokens> full[kMaxTokens / kTileTokens];
  Tile<T, R, Rest ? Rest : 1> rest;
  const int64_t tiles = n / kTileTokens, columns = n > kTileTokens ? kDotColumns : d;
  for (int64_t t = 0; t < tiles; ++t) full[t].clear();
  rest.clear();
  for (int64_t begin = 0; begin < d; begin += columns) {
    const int64_t end = d - begin < columns ? d : begin + columns;
    if (tiles) full[0].template add<true>(rows, prefetch, x, n, begin, end);
    for (int64_t t = 1; t < tiles; ++t)
      full[t].template add<false>(rows, prefetch, x + t * kTileTokens * kChunk, n, begin, end);
    const auto last = x + tiles * kTileTokens * kChunk;
    if (Rest && tiles) rest.template add<false>(rows, prefetch, last, n, begin, end);
    if (Rest && !tiles) rest.template add<true>(rows, prefetch, last, n, begin, end);
  }
  for (int64_t t = 0; t < tiles; ++t) full[t].finish(out + t * kTileTokens);
  if (Rest) rest.finish(out + tiles * kTileTokens);
}

// out[r, i] = rows[r] . x_i for R rows and all n tokens; rows of `out` are kMaxTokens long.
template <class T, int R>
void dot(const T* const* rows, const T* const* next, const typename Dot<T>::X* x, int64_t n, int64_t d, float* out) {
  Prefetcher prefetch[R];
  for (int r = 0; r < R; ++r) prefetch[r].start(rows[r], next[r], d);
  switch (n % kTileTokens) {
    case 0: dot_tiles<T, R, 0>(rows, prefetch, x, n, d, out); break;
    case 1: dot_tiles<T, R, 1>(rows, prefetch, x, n, d, out); break;
    case 2: dot_tiles<T, R, 2>(rows, prefetch, x, n, d, out); break;
    default: dot_tiles<T, R, 3>(rows, prefetch, x, n, d, out);
  }
}

// y_i += sum over r of scale[r, i] * rows[r]. N is the number of tokens where it is known, else 0.
template <class T, int R, int N>
void add_rows(const T* const* rows, const T* const* next, const float* scale, int64_t tokens, int64_t d,
              float* y) {
  const int64_t n = N ? N : tokens;
  const auto add_chunk = [&](const T* const* w, int64_t offset, float* yc) CATS_ALWAYS_INLINE {
    CATS_UNROLL
    for (int64_t s = 0; s < kChunk; s += kAddVectors * Vec::lanes) {
      Vec weights[R][kAddVectors];
      CATS_UNROLL
      for (int r = 0; r < R; ++r)
        CATS_UNROLL
        for (int v = 0; v < kAddVectors; ++v) weights[r][v] = load(w[r] + offset + s + v * Vec::lanes);
      for (int64_t i = 0; i < n; ++i) {
        float* yi = yc + i * kChunk + s;
        Vec total[kAddVectors];
        CATS_UNROLL
        for (int v = 0; v < kAddVectors; ++v) total[v] = load(yi + v * Vec::lanes);
        CATS_UNROLL
        for (int r = 0; r < R; ++r) {
          const Vec factor = set(scale[r * kMaxTokens + i]);
          CATS_UNROLL
          for (int v = 0; v < kAddVectors; ++v) total[v] = madd(factor, weights[r][v], total[v]);
        }
        CATS_UNROLL
        for (int v = 0; v < kAddVectors; ++v) store(yi + v * Vec::lanes, total[v]);
      }
    }
  };

  Prefetcher prefetch[R];
  for (int r = 0; r < R; ++r) prefetch[r].start(rows[r], next[r], d);
  const int64_t whole = d - d % kChunk;
  for (int64_t c = 0; c < whole; c += kChunk) {
    CATS_UNROLL
    for (int r = 0; r < R; ++r) prefetch[r].template fetch<kChunk * sizeof(T)>(c * int64_t(sizeof(T)));
    add_chunk(rows, c, y + c * n);
  }
  if (whole < d) add_chunk(Tail<T, R>(rows, whole, d - whole).rows, 0, y + whole * n);
}

}  // namespace
}  // namespace cats
