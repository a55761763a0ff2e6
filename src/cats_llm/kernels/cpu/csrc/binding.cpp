// The operators as PyTorch sees them, over the stable ABI: one library serves every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "api.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Set once when the library is loaded; tests and benchmarks may change it.
std::atomic<const cats::Kernels*> in_use{[] {
  const cats::Kernels* best = nullptr;
  for (int i = 0; i < cats::kIsaCount; ++i)
    if (cats::kIsas[i].runs()) best = cats::kIsas[i].kernels;
  return best;
}()};

cats::Pool torch_pool() {
  return {int(torch::stable::get_num_threads()), [](int threads, void (*body)(void*), void* context) {
            torch::stable::parallel_for(0, threads, 1, [=](int64_t, int64_t) { body(context); });
          }};
}

cats::Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return cats::Dtype::f32;
    case ScalarType::BFloat16: return cats::Dtype::bf16;
    case ScalarType::Half: return cats::Dtype::f16;
    default: STD_TORCH_CHECK(false, "cats_llm: x must be float32, bfloat16 or float16");
  }
}

cats::Activation activation_of(const std::string& name) {
  if (name == "silu") return cats::Activation::silu;
  if (name == "gelu") return cats::Activation::gelu;
  if (name == "gelu_tanh") return cats::Activation::gelu_tanh;
  if (name == "relu") return cats::Activation::relu;
  STD_TORCH_CHECK(false, "cats_llm: unknown activation ", name);
}

// The distance between rows of a (rows, columns) matrix whose columns are adjacent.
int64_t row_stride(const Tensor& w, int64_t rows, int64_t columns, int row_dim, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(w.dim() == 2 && w.size(row_dim) == rows && w.size(1 - row_dim) == columns, "cats_llm: ", name,
                  " has the wrong shape");
  STD_TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.is_cpu(), "cats_llm: ", name,
                  " must have the dtype and device of x");
  STD_TORCH_CHECK(columns == 1 || w.stride(1 - row_dim) == 1, "cats_llm: ", name,
                  row_dim ? " must be stored neuron-major: w_down.t() with adjacent columns" : " must have adjacent columns");
  return rows == 1 ? columns : w.stride(row_dim);
}

// A vector of `size` elements as adjacent elements, or null. Keeps what it had to copy alive.
struct Vector {
  std::optional<Tensor> tensor;
  Vector(const std::optional<Tensor>& v, int64_t size, const Tensor& x, const char* name) {
    if (!v) return;
    STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == size, "cats_llm: ", name, " has the wrong shape");
    STD_TORCH_CHECK(v->scalar_type() == x.scalar_type() && v->is_cpu(), "cats_llm: ", name,
                    " must have the dtype and device of x");
    tensor = v->is_contiguous() ? *v : torch::stable::contiguous(*v);
  }
  const void* data() const { return tensor ? tensor->const_data_ptr() : nullptr; }
};

const char* at(const Tensor& t, int64_t element) {
  return static_cast<const char*>(t.const_data_ptr()) + element * int64_t(t.element_size());
}

// Calls body(x, y, n) for slices of at most kMaxTokens tokens.
template <class Body>
void for_slices(const Tensor& x, int64_t d, const Tensor& y, int64_t out, const Body& body) {
  const int64_t tokens = x.numel() / d;
  for (int64_t i = 0; i < tokens; i += cats::kMaxTokens)
    body(at(x, i * d), const_cast<char*>(at(y, i * out)), std::min<int64_t>(cats::kMaxTokens, tokens - i));
}

Tensor gated_mlp(const Tensor& any_x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                 const Tensor& any_threshold, std::string activation, const std::optional<Tensor>& b_gate,
                 const std::optional<Tensor>& b_up, const std::optional<Tensor>& b_down, double /*sparsity*/) {
  STD_TORCH_CHECK(any_x.is_cpu() && any_x.dim() >= 1, "cats_llm: x must be a CPU tensor of at least one dimension");
  const Tensor x = any_x.is_contiguous() ? any_x : torch::stable::contiguous(any_x);
  const Tensor threshold = any_threshold.is_contiguous() ? any_threshold : torch::stable::contiguous(any_threshold);
  cats::Mlp m{};
  m.dtype = dtype_of(x);
  m.activation = activation_of(activation);
  m.d = x.size(x.dim() - 1);
  m.f = w_gate.dim() ? w_gate.size(0) : 0;
  STD_TORCH_CHECK(m.d > 0 && m.f > 0 && m.f <= INT32_MAX, "cats_llm: sizes must be positive and fit 32 bits");
  m.ld_gate = row_stride(w_gate, m.f, m.d, 0, x, "w_gate");
  m.ld_up = row_stride(w_up, m.f, m.d, 0, x, "w_up");
  m.ld_down = row_stride(w_down, m.f, m.d, 1, x, "w_down");
  m.w_gate = w_gate.const_data_ptr();
  m.w_up = w_up.const_data_ptr();
  m.w_down = w_down.const_data_ptr();
  STD_TORCH_CHECK(threshold.scalar_type() == ScalarType::Float && threshold.is_cpu(),
                  "cats_llm: threshold must be float32 on the CPU");
  STD_TORCH_CHECK(threshold.dim() == 0 || (threshold.dim() == 1 && (threshold.size(0) == 1 || threshold.size(0) == m.f)),
                  "cats_llm: threshold must have the shape () or (f,)");
  m.threshold = static_cast<const float*>(threshold.const_data_ptr());
  m.threshold_stride = threshold.numel() > 1;
  const Vector gate_bias(b_gate, m.f, x, "b_gate"), up_bias(b_up, m.f, x, "b_up"), down_bias(b_down, m.d, x, "b_down");
  m.b_gate = gate_bias.data();
  m.b_up = up_bias.data();
  m.b_down = down_bias.data();

  Tensor y = torch::stable::empty_like(x);
  const cats::Kernels& kernels = *in_use.load();
  for_slices(x, m.d, y, m.d, [&](const void* from, void* to, int64_t n) {
    m.x = from;
    m.y = to;
    m.n = n;
    cats::gated_mlp(m, kernels, torch_pool());
  });
  return y;
}

Tensor linear(const Tensor& any_x, const Tensor& w, const std::optional<Tensor>& b) {
  STD_TORCH_CHECK(any_x.is_cpu() && any_x.dim() >= 1, "cats_llm: x must be a CPU tensor of at least one dimension");
  const Tensor x = any_x.is_contiguous() ? any_x : torch::stable::contiguous(any_x);
  cats::Linear m{};
  m.dtype = dtype_of(x);
  m.d = x.size(x.dim() - 1);
  m.out = w.dim() ? w.size(0) : 0;
  STD_TORCH_CHECK(m.d > 0 && m.out > 0, "cats_llm: sizes must be positive");
  m.w = w.const_data_ptr();
  m.ld = row_stride(w, m.out, m.d, 0, x, "w");
  m.ld_y = m.out;
  const Vector bias(b, m.out, x, "bias");
  m.bias = bias.data();

  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = m.out;
  Tensor y = torch::stable::new_empty(x, shape);
  const cats::Kernels& kernels = *in_use.load();
  for_slices(x, m.d, y, m.out, [&](const void* from, void* to, int64_t n) {
    m.x = from;
    m.y = to;
    m.n = n;
    cats::linear(m, kernels, torch_pool());
  });
  return y;
}

int64_t read_checksum(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "cats_llm: x must be a contiguous CPU tensor");
  const int64_t bytes = x.numel() * int64_t(x.element_size());
  return int64_t(cats::read_checksum(x.const_data_ptr(), bytes, *in_use.load(), torch_pool()));
}

}  // namespace

// The schemas are in kernels/operators.py.
STABLE_TORCH_LIBRARY_IMPL(cats_llm, CPU, m) {
  m.impl("gated_mlp", TORCH_BOX(&gated_mlp));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("read_checksum", TORCH_BOX(&read_checksum));
}

// What has no tensor in it is plain C, called through ctypes.
#define CATS_EXPORT extern "C" __attribute__((visibility("default")))

CATS_EXPORT const char* cats_cpu_isa() { return in_use.load()->name; }

// The name of the i-th instruction set that this CPU runs, slowest first; null past the last.
CATS_EXPORT const char* cats_cpu_isa_at(int i) {
  for (int k = 0; k < cats::kIsaCount; ++k)
    if (cats::kIsas[k].runs() && i-- == 0) return cats::kIsas[k].kernels->name;
  return nullptr;
}

// Returns whether the CPU runs it; if not, nothing changes.
CATS_EXPORT bool cats_cpu_set_isa(const char* name) {
  for (int k = 0; k < cats::kIsaCount; ++k)
    if (cats::kIsas[k].runs() && std::strcmp(cats::kIsas[k].kernels->name, name) == 0) {
      in_use = cats::kIsas[k].kernels;
      return true;
    }
  return false;
}
