// Which thread does what. Work is cut into blocks that depend on the shapes and the data, never on the number of threads,
// and each block's result has its own place, so the bits of y do not depend on who computed what. Threads take the next
// block when they are done with one, so they finish together however unevenly the active neurons are spread.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "api.h"

namespace cats {
namespace {

constexpr int64_t kThreadBytes = 64 << 10;  // less weight than this is not worth waking a thread
constexpr int64_t kBlockBytes = 256 << 10;  // weights a block of rows holds, about
constexpr int64_t kMaxPartials = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Calls body(block) for every block.
template <class Body>
void for_blocks(const Pool& pool, int64_t blocks, int64_t bytes, const Body& body) {
  struct Job {
    const Body& body;
    const int64_t blocks;
    std::atomic<int64_t> next{0};
    static void run(void* p) {
      auto& job = *static_cast<Job*>(p);
      for (int64_t b; (b = job.next.fetch_add(1, std::memory_order_relaxed)) < job.blocks;) job.body(b);
    }
  } job{body, blocks};
  const int64_t threads = std::min({int64_t(pool.threads), blocks, bytes / kThreadBytes});
  if (threads > 1) pool.run(int(threads), Job::run, &job);
  else Job::run(&job);
}

// Blocks of whole rows, `each` at a time.
struct RowBlocks {
  int64_t rows, each;
  RowBlocks(int64_t rows, int64_t row_bytes)
      : rows(rows), each(std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(row_bytes, 1), 8, 256)) {}
  int64_t count() const { return ceil_div(rows, each); }
  Range operator[](int64_t b) const { return {b * each, std::min(rows, (b + 1) * each)}; }
};

// Memory that one thread's calls share; it grows to what the largest call needs, and stays.
class Scratch {
 public:
  // Starts a call that will take at most `bytes` in `parts` pieces.
  void begin(int64_t bytes, int parts) {
    bytes += parts * kAlign;
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<char*>(::operator new(size_t(bytes), std::align_val_t(kAlign))));
      size_ = bytes;
    }
    used_ = 0;
  }

  template <class T>
  T* take(int64_t count) {
    char* p = data_.get() + used_;
    used_ += ceil_div(count * int64_t(sizeof(T)), kAlign) * kAlign;
    return reinterpret_cast<T*>(p);
  }

 private:
  static constexpr int64_t kAlign = 64;
  struct Delete {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(kAlign)); }
  };
  std::unique_ptr<char, Delete> data_;
  int64_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;

}  // namespace

void gated_mlp(const Mlp& m, const Kernels& kernels, const Pool& pool) {
  const Steps& steps = kernels.steps(m.dtype);
  const int64_t size = element_size(m.dtype), padded = chunks(m.d) * kChunk * m.n;
  const int64_t stride = padded + kChunk;  // of the partials: off a power of two, which would crowd one cache set
  // A partial costs a write and a read of y; a block must hold enough neurons to make that small.
  const int64_t neurons = 16 + 16 * m.n;
  const int64_t max_partials = std::min(kMaxPartials, ceil_div(m.f, neurons));

  scratch.begin(padded * int64_t(steps.packed_element) + m.f * m.n * 4 + m.f * 4 + max_partials * stride * 4, 4);
  char* packed = scratch.take<char>(padded * int64_t(steps.packed_element));
  float* a = scratch.take<float>(m.f * m.n);
  int32_t* active = scratch.take<int32_t>(m.f);
  float* partials = scratch.take<float>(max_partials * stride);
  steps.pack(m.x, m.n, m.d, packed);

  const RowBlocks rows(m.f, m.d * size);
  std::unique_ptr<int64_t[]> active_counts(new int64_t[size_t(rows.count())]);
  for_blocks(pool, rows.count(), m.f * m.d * size, [&](int64_t b) {
    active_counts[size_t(b)] = steps.gate(m, packed, rows[b], a, active + rows[b].begin);
  });
  int64_t count = 0;
  for (int64_t b = 0; b < rows.count(); ++b) {
    std::memmove(active + count, active + rows[b].begin, size_t(active_counts[size_t(b)]) * sizeof(int32_t));
    count += active_counts[size_t(b)];
  }

  const int64_t blocks = std::min(kMaxPartials, ceil_div(count, neurons));
  for_blocks(pool, blocks, 2 * count * m.d * size, [&](int64_t b) {
    const int64_t begin = count * b / blocks, end = count * (b + 1) / blocks;
    steps.up_down(m, packed, a, active + begin, end - begin, partials + b * stride);
  });

  const RowBlocks columns(chunks(m.d), blocks * m.n * kChunk * 4);
  for_blocks(pool, columns.count(), blocks * padded * 4,
             [&](int64_t b) { steps.reduce_partials(m, partials, blocks, stride, columns[b]); });
}

void linear(const Linear& m, const Kernels& kernels, const Pool& pool) {
  const Steps& steps = kernels.steps(m.dtype);
  const int64_t bytes = chunks(m.d) * kChunk * m.n * int64_t(steps.packed_element);
  scratch.begin(bytes, 1);
  char* packed = scratch.take<char>(bytes);
  steps.pack(m.x, m.n, m.d, packed);
  const RowBlocks rows(m.out, m.d * element_size(m.dtype));
  for_blocks(pool, rows.count(), m.out * m.d * element_size(m.dtype),
             [&](int64_t b) { steps.linear(m, packed, rows[b]); });
}

uint64_t read_checksum(const void* data, int64_t bytes, const Kernels& kernels, const Pool& pool) {
  std::atomic<uint64_t> total{0};
  constexpr int64_t each = kBlockBytes;
  for_blocks(pool, ceil_div(bytes, each), bytes, [&](int64_t b) {
    total ^= kernels.read_checksum(static_cast<const char*>(data) + b * each, std::min(each, bytes - b * each));
  });
  return total;
}

}  // namespace cats
