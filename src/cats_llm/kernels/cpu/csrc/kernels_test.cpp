// The kernels without torch, against plain loops in double, on buffers that end where the data ends: run under
// AddressSanitizer and UndefinedBehaviorSanitizer, any stray access aborts. Also how other CPUs are tested, emulated.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "api.h"

using namespace cats;

namespace {

std::mt19937 random_bits(1);

int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

void run_on_threads(int threads, void (*body)(void*), void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, context);
  body(context);
  for (auto& t : others) t.join();
}

// Multiples of 1/8 in [-3/8, 3/8], which every dtype holds and whose dot products are exact.
struct Matrix {
  int64_t rows, columns, ld;
  std::vector<float> values;
  std::vector<char> bytes;  // exactly up to the last element
  size_t offset;

  Matrix(int64_t rows, int64_t columns, Dtype dtype)
      : rows(rows), columns(columns), ld(columns + integer(0, 3)), offset(size_t(integer(0, 3))) {
    const size_t size = dtype == Dtype::f32 ? 4 : 2;
    bytes.resize((offset + size_t((rows - 1) * ld + columns)) * size);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float v = float(integer(-3, 3)) / 8;
      values.push_back(v);
      char* to = bytes.data() + (offset + size_t(i / columns * ld + i % columns)) * size;
      if (dtype == Dtype::f32) std::memcpy(to, &v, 4);
      else {
        const uint16_t narrow = dtype == Dtype::bf16 ? to_bf16(v) : to_f16(v);
        std::memcpy(to, &narrow, 2);
      }
    }
    offset *= size;
  }

  static uint16_t to_bf16(float v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    return uint16_t(u >> 16);
  }

  static uint16_t to_f16(float v) {  // exact for the values above
    if (v == 0) return 0;
    int exponent;
    const float fraction = std::frexp(std::fabs(v), &exponent);
    return uint16_t((v < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | (int(fraction * 2048) & 0x3ff));
  }

  const void* data() const { return bytes.data() + offset; }
  double at(int64_t r, int64_t c) const { return double(values[size_t(r * columns + c)]); }
  double dot(int64_t r, const Matrix& x, int64_t i) const {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) sum += at(r, c) * x.at(i, c);
    return sum;
  }
};

double widened(const std::vector<char>& bytes, int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) {
    float v;
    std::memcpy(&v, bytes.data() + i * 4, 4);
    return double(v);
  }
  uint16_t u;
  std::memcpy(&u, bytes.data() + i * 2, 2);
  if (dtype == Dtype::bf16) {
    const uint32_t wide = uint32_t(u) << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return double(v);
  }
  const int exponent = u >> 10 & 31, fraction = u & 0x3ff;
  const double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return u & 0x8000 ? -magnitude : magnitude;
}

double epsilon(Dtype dtype) { return dtype == Dtype::f32 ? 1e-6 : dtype == Dtype::bf16 ? 1.0 / 256 : 1.0 / 2048; }

bool close(double got, double wanted, double scale, Dtype dtype) {
  if (std::fabs(got - wanted) <= epsilon(dtype) * std::fabs(wanted) + 4e-6 * scale + 1e-7) return true;
  std::printf("got %.9g, wanted %.9g\n", got, wanted);
  return false;
}

// ReLU keeps the reference free of rounding: neurons are active or not exactly as they should be.
bool check_gated_mlp(const Kernels& kernels, Dtype dtype, int64_t n, int64_t d, int64_t f, int threads) {
  const size_t size = dtype == Dtype::f32 ? 4 : 2;
  Matrix gate(f, d, dtype), up(f, d, dtype), down(f, d, dtype), x(n, d, dtype);
  Matrix b_gate(1, f, dtype), b_up(1, f, dtype), b_down(1, d, dtype);
  std::vector<char> dense_x(size_t(n * d) * size);  // x has no gaps between its rows
  for (int64_t i = 0; i < n; ++i)
    std::memcpy(dense_x.data() + size_t(i * d) * size, static_cast<const char*>(x.data()) + size_t(i * x.ld) * size,
                size_t(d) * size);
  std::vector<float> threshold(integer(0, 1) ? size_t(f) : 1);
  for (float& t : threshold) t = float(integer(0, 4)) / 16 + 0.001f;
  std::vector<char> y(size_t(n * d) * size, char(0xff));
  const bool biased = integer(0, 1);
  const Mlp m{dtype, Activation::relu, n, d, f, dense_x.data(), gate.data(), up.data(), down.data(), gate.ld, up.ld,
              down.ld, threshold.data(), threshold.size() > 1, biased ? b_gate.data() : nullptr,
              biased ? b_up.data() : nullptr, biased ? b_down.data() : nullptr, y.data()};
  gated_mlp(m, kernels, {threads, run_on_threads});

  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> wanted(static_cast<size_t>(d)), scale(static_cast<size_t>(d));
    for (int64_t j = 0; j < f; ++j) {
      double a = gate.dot(j, x, i) + (biased ? b_gate.at(0, j) : 0);
      if (dtype != Dtype::f32 && a != 0) {  // round to the dtype
        int exponent;
        std::frexp(a, &exponent);
        const double unit = std::ldexp(1.0, exponent - (dtype == Dtype::bf16 ? 8 : 11));
        a = std::nearbyint(a / unit) * unit;
      }
      if (a < double(threshold[threshold.size() > 1 ? size_t(j) : 0])) continue;
      const double h = a * (up.dot(j, x, i) + (biased ? b_up.at(0, j) : 0));
      for (int64_t c = 0; c < d; ++c) {
        wanted[size_t(c)] += h * down.at(j, c);
        scale[size_t(c)] += std::fabs(h * down.at(j, c));
      }
    }
    for (int64_t c = 0; c < d; ++c) {
      const double bias = biased ? b_down.at(0, c) : 0;
      if (!close(widened(y, i * d + c, dtype), wanted[size_t(c)] + bias, scale[size_t(c)], dtype)) return false;
    }
  }
  return true;
}

bool check_linear(const Kernels& kernels, Dtype dtype, int64_t n, int64_t d, int64_t out, int threads) {
  const size_t size = dtype == Dtype::f32 ? 4 : 2;
  Matrix w(out, d, dtype), x(1, n * d, dtype), bias(1, out, dtype);
  std::vector<char> y(size_t(n * out) * size, char(0xff));
  linear({dtype, n, d, out, x.data(), w.data(), w.ld, bias.data(), y.data(), out}, kernels, {threads, run_on_threads});
  for (int64_t i = 0; i < n; ++i)
    for (int64_t o = 0; o < out; ++o) {
      double wanted = bias.at(0, o), scale = 0;
      for (int64_t c = 0; c < d; ++c) {
        wanted += w.at(o, c) * x.at(0, i * d + c);
        scale += std::fabs(w.at(o, c) * x.at(0, i * d + c));
      }
      if (!close(widened(y, i * out + o, dtype), wanted, scale, dtype)) return false;
    }
  return true;
}

// The other activations only have to touch nothing they should not.
void run_activations(const Kernels& kernels) {
  for (auto activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
    std::vector<float> w{-INFINITY, -100, -3, -0.f, 1e-40f, 2, 100, 3e38f, INFINITY, NAN}, one(1, 1), y(1), t(1, 0.5f);
    const int64_t f = int64_t(w.size());
    std::vector<float> ones(w.size(), 1.f);
    gated_mlp({Dtype::f32, activation, 1, 1, f, one.data(), w.data(), ones.data(), ones.data(), 1, 1, 1, t.data(), 0,
               nullptr, nullptr, nullptr, y.data()},
              kernels, {1, run_on_threads});
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  int passed = 0, failed = 0;
  for (int k = 0; k < kIsaCount; ++k) {
    if (!kIsas[k].runs()) continue;
    const Kernels& kernels = *kIsas[k].kernels;
    run_activations(kernels);
    for (int round = 0; round < rounds; ++round) {
      const auto dtype = Dtype(round % 3);
      const int64_t n = integer(1, kMaxTokens), d = round % 10 ? integer(1, 200) : integer(1000, 2200), f = integer(1, 150);
      const int threads = integer(1, 3);
      const bool ok = check_gated_mlp(kernels, dtype, n, d, f, threads) && check_linear(kernels, dtype, n, d, f, threads);
      ++(ok ? passed : failed);
      if (!ok) std::printf("%s: dtype %d n %d d %d f %d\n", kernels.name, int(dtype), int(n), int(d), int(f));
    }
    std::vector<char> data(1000, 1);
    for (int64_t size = 0; size <= 1000; ++size)
      read_checksum(data.data() + 1000 - size, size, kernels, {2, run_on_threads});
    std::printf("%s done\n", kernels.name);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
