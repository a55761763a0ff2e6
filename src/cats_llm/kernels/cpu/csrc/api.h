// What the kernels are asked, in pointers and sizes. Everything else here is built on this header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cats {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

enum class Dtype { f32, bf16, f16 };
enum class Activation { silu, gelu, gelu_tanh, relu };

// Tokens that one pass over the weights serves; a caller with more calls again.
constexpr int kMaxTokens = 16;

// Elements that loops over d advance by. x and y are kept as [d / kChunk][tokens][kChunk], padded with zeros, so that
// inner loops have no tail and all tokens' values of one chunk lie together.
constexpr int64_t kChunk = 64;

constexpr int64_t chunks(int64_t d) { return (d + kChunk - 1) / kChunk; }

struct Range { int64_t begin, end; };

// Row j of every weight matrix belongs to neuron j; ld_* is the distance between rows, in elements.
struct Mlp {
  Dtype dtype;
  Activation activation;
  int64_t n, d, f;  // tokens (1 to kMaxTokens), hidden size, neurons
  const void* x;    // (n, d)
  const void *w_gate, *w_up, *w_down;  // (f, d)
  int64_t ld_gate, ld_up, ld_down;
  const float* threshold;
  int64_t threshold_stride;             // 0: one for all neurons; 1: one a neuron
  const void *b_gate, *b_up, *b_down;  // (f), (f), (d), or null
  void* y;                             // (n, d)
};

struct Linear {
  Dtype dtype;
  int64_t n, d, out;  // tokens (1 to kMaxTokens), inputs, outputs
  const void* x;      // (n, d)
  const void* w;      // (out, d)
  int64_t ld;
  const void* bias;  // (out) or null
  void* y;           // y[i * ld_y + o]
  int64_t ld_y;
};

// The steps of an operator for one weight dtype. `packed` is x as `pack` left it.
struct Steps {
  size_t packed_element;  // bytes
  void (*pack)(const void* x, int64_t n, int64_t d, void* packed);
  // a[j * n + i] = CATS_t(act(gate)) for neurons j in rows; lists the active ones (non-zero for any token), returns how many.
  int64_t (*gate)(const Mlp&, const void* packed, Range rows, float* a, int32_t* active);
  // partial = sum over the listed neurons of a * up * w_down, in the chunked layout of y.
  void (*up_down)(const Mlp&, const void* packed, const float* a, const int32_t* active, int64_t count, float* partial);
  // y = b_down + the partials in order, for the given chunks of d. Partials are `stride` floats apart.
  void (*reduce_partials)(const Mlp&, const float* partials, int64_t count, int64_t stride, Range chunks);
  void (*linear)(const Linear&, const void* packed, Range rows);
};

// One instruction set's version of everything.
struct Kernels {
  const char* name;
  Steps f32, bf16, f16;
  uint64_t (*read_checksum)(const void* data, int64_t bytes);  // touches every byte; the yardstick of the benchmarks
  const Steps& steps(Dtype dtype) const { return dtype == Dtype::f32 ? f32 : dtype == Dtype::bf16 ? bf16 : this->f16; }
};

// A thread pool: calls body(context) on at most `threads` threads, returns when all are done.
struct Pool {
  int threads;
  void (*run)(int threads, void (*body)(void*), void* context);
};

void gated_mlp(const Mlp&, const Kernels&, const Pool&);
void linear(const Linear&, const Kernels&, const Pool&);
uint64_t read_checksum(const void* data, int64_t bytes, const Kernels&, const Pool&);

// The instruction sets built into this library, slowest first; `runs` says whether this CPU has it.
struct Isa {
  const Kernels* kernels;
  bool (*runs)();
};
extern const Isa kIsas[];
extern const int kIsaCount;

}  // namespace cats
