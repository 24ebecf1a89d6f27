// Calls the library with random shapes, for sanitizers to watch: every buffer is as large as it has to be and no
// larger, at any address, beside a page that must not be touched or memory that AddressSanitizer guards.
//
// driver SEED ROUNDS CALLERS: that many rounds in each of so many threads. Aborts where an answer is wrong.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "moe_native.h"

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "driver: %s\n", what);
  std::abort();
}

using Random = std::mt19937;

int64_t between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// Memory of exactly `bytes`, on the heap or against a page without access.
class Buffer {
 public:
  Buffer(Random& random, int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    const int64_t kind = between(random, 0, 2);
    if (kind == 0) {
      data_ = new uint8_t[bytes_];
      return;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inside = (bytes_ + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    void* all = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(all != MAP_FAILED, "no memory");
    map_ = static_cast<uint8_t*>(all);
    for (uint8_t* fence : {map_, map_ + page + inside})
      require(mprotect(fence, page, PROT_NONE) == 0, "no fence");
    data_ = map_ + page + (kind == 1 ? inside - bytes_ : 0);
  }

  Buffer(const Buffer&) = delete;

  ~Buffer() {
    if (map_ != nullptr)
      munmap(map_, mapped_);
    else
      delete[] data_;
  }

  uint8_t* bytes() { return data_; }
  float* floats() { return reinterpret_cast<float*>(data_); }

  void fill(Random& random) {
    for (size_t i = 0; i < bytes_; ++i) data_[i] = static_cast<uint8_t>(random());
  }

  void fill_floats(Random& random, float low, float high) {
    std::uniform_real_distribution<float> any(low, high);
    for (size_t i = 0; i < bytes_ / 4; ++i) floats()[i] = any(random);
  }

 private:
  size_t bytes_, mapped_ = 0;
  uint8_t *data_ = nullptr, *map_ = nullptr;
};

int64_t blocks_of(int64_t numbers) { return (numbers + 63) / 64; }

// A matrix of random codes.
struct Weights {
  Buffer q, scales, nested, offset, bias;
  Matrix m;

  Weights(Random& random, int32_t format, int64_t rows, int64_t cols)
      : q(random, format == NF4 ? (rows * cols + 1) / 2 : rows * cols),
        scales(random, format == NF4 ? blocks_of(rows * cols) : 2 * rows * blocks_of(cols)),
        nested(random, 4 * ((blocks_of(rows * cols) + 255) / 256)),
        offset(random, 4),
        bias(random, 4 * rows),
        m{format, 0, rows, cols, q.bytes(), scales.bytes(), nullptr, nullptr, nullptr} {
    q.fill(random);
    scales.fill(random);
    if (format == INT8)  // fp16 of at most 2, never infinite
      for (int64_t i = 1; i < 2 * rows * blocks_of(cols); i += 2) scales.bytes()[i] &= 0x3f;
    nested.fill_floats(random, 0.0f, 0.1f);
    offset.fill_floats(random, 0.1f, 0.2f);
    bias.fill_floats(random, -1.0f, 1.0f);
    if (format == NF4) m.nested = nested.floats(), m.offset = offset.floats();
    if (random() % 2) m.bias = bias.floats();
  }
};

int64_t a_size(Random& random) {
  switch (between(random, 0, 3)) {
    case 0: return between(random, 1, 9);
    case 1: return 64 * between(random, 1, 9);
    case 2: return 64 * between(random, 1, 5) + between(random, -1, 1);
    default: return between(random, 1, 400);
  }
}

int32_t an_activation(Random& random) { return static_cast<int32_t>(between(random, FLOATS, BFLOAT16S)); }

void use_linear(Random& random) {
  const int64_t rows = a_size(random), cols = a_size(random);
  const int64_t tokens = random() % 10 == 0 ? 130 : between(random, 1, 9);
  Weights w(random, static_cast<int32_t>(between(random, NF4, INT8)), rows, cols);
  Buffer x(random, 4 * tokens * cols), y(random, 4 * tokens * rows), again(random, 4 * tokens * rows);
  const float size = random() % 8 == 0 ? 2e-37f : 2.0f;  // or the scales' inverse is no float
  x.fill_floats(random, -size, size);
  if (random() % 8 == 0) x.floats()[0] = NAN;
  const int32_t activations = an_activation(random), threads = static_cast<int32_t>(between(random, 1, 8));
  require(moe_linear(&w.m, x.floats(), tokens, y.floats(), FLOAT32, activations, threads) == OK, "moe_linear failed");
  require(moe_linear(&w.m, x.floats(), tokens, again.floats(), FLOAT32, activations, 1) == OK, "moe_linear failed");
  const size_t bytes = static_cast<size_t>(4 * tokens * rows);
  require(std::memcmp(y.bytes(), again.bytes(), bytes) == 0, "threads change moe_linear");
}

void use_experts(Random& random) {
  const int64_t width = a_size(random), hidden = a_size(random) % 200 + 1;
  const int64_t count = between(random, 1, 6), tokens = random() % 8 == 0 ? 90 : between(random, 1, 12);
  const int64_t top_k = between(random, 1, count);
  const int32_t format = static_cast<int32_t>(between(random, NF4, INT8));
  Gate gate{static_cast<int32_t>(between(random, PLAIN, INTERLEAVED)), 0, 1.702f, 7.0f};
  const int32_t last = gate.arrangement == PLAIN ? GELU_TANH : CLAMPED_SILU;
  gate.function = static_cast<int32_t>(between(random, IDENTITY, last));
  std::vector<std::unique_ptr<Weights>> weights;
  std::vector<Expert> experts;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t rows_up = gate.arrangement == PLAIN ? hidden : 2 * hidden;
    weights.push_back(std::make_unique<Weights>(random, format, rows_up, width));
    weights.push_back(std::make_unique<Weights>(random, format, width, hidden));
    experts.push_back({weights[weights.size() - 2]->m, weights.back()->m});
  }
  std::vector<const Expert*> pointers;
  std::vector<int64_t> starts{0}, rows, places;
  for (int64_t e = 0; e < count; ++e) {
    pointers.push_back(&experts[static_cast<size_t>(e)]);
    for (int64_t t = 0; t < tokens; ++t) {  // token t has experts t, t + 1, ... in turn
      const int64_t rank = (e - t % count + count) % count;
      if (rank >= top_k) continue;
      rows.push_back(t);
      places.push_back(t * top_k + rank);
    }
    starts.push_back(static_cast<int64_t>(rows.size()));
  }
  Buffer x(random, 4 * tokens * width);
  Buffer combined(random, 4 * tokens * width), again(random, 4 * tokens * width);
  Buffer outputs(random, 4 * tokens * top_k * width), shares(random, 4 * tokens * top_k);
  x.fill_floats(random, -1.0f, 1.0f);
  shares.fill_floats(random, 0.0f, 1.0f);
  const int32_t activations = an_activation(random);
  for (Buffer* out : {&combined, &again}) {
    const int32_t threads = out == &again ? 1 : static_cast<int32_t>(between(random, 1, 8));
    require(moe_experts(pointers.data(), count, starts.data(), rows.data(), places.data(), &gate, x.floats(),
                        tokens, outputs.floats(), shares.floats(), top_k, out->floats(), FLOAT32,
                        activations, threads) == OK,
            "moe_experts failed");
  }
  require(std::memcmp(combined.bytes(), again.bytes(), static_cast<size_t>(4 * tokens * width)) == 0,
          "threads change moe_experts");
}

void use_the_rest(Random& random) {
  const int64_t numbers = a_size(random) * between(random, 1, 50);
  const int32_t dtype = static_cast<int32_t>(between(random, FLOAT32, FLOAT16));
  const int32_t threads = static_cast<int32_t>(between(random, 1, 8));
  Buffer weights(random, numbers * (dtype == FLOAT32 ? 4 : 2));
  Buffer q(random, (numbers + 1) / 2), absmax(random, 4 * blocks_of(numbers));
  weights.fill(random);
  require(moe_nf4_encode(weights.bytes(), dtype, numbers, q.bytes(), absmax.floats(), threads) == OK,
          "moe_nf4_encode failed");
  Buffer scales(random, 4 * numbers), codes(random, numbers), nested(random, 4 * ((numbers + 255) / 256));
  Buffer steps(random, 4 * 255);
  scales.fill(random);
  steps.fill_floats(random, -1.1f, 1.1f);
  std::sort(steps.floats(), steps.floats() + 255);
  require(moe_scales_encode(scales.floats(), numbers, 0.5f, steps.floats(), codes.bytes(), nested.floats(),
                            threads) == OK,
          "moe_scales_encode failed");
  const int64_t bytes = between(random, 0, 3000);
  Buffer read(random, bytes);
  read.fill(random);
  uint64_t total = 0, expected = 0;
  require(moe_read(read.bytes(), bytes, &total, threads) == OK, "moe_read failed");
  for (int64_t i = 0; i < bytes; ++i) expected += static_cast<uint64_t>(read.bytes()[i]) << 8 * (i % 8);
  require(total == expected, "moe_read is wrong");
}

void rounds(unsigned seed, int count) {
  Random random(seed);
  for (int round = 0; round < count; ++round) {
    use_linear(random);
    use_experts(random);
    use_the_rest(random);
  }
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 4, "driver SEED ROUNDS CALLERS");
  const unsigned seed = static_cast<unsigned>(std::atoi(argv[1]));
  float map[256];
  for (int i = 0; i < 256; ++i) map[i] = static_cast<float>(i - 127) / 128;
  require(moe_set_map(map) == OK, "no map");
  const int32_t best = moe_best_isa();
  for (int32_t isa = 0; isa <= best; ++isa) {
    require(moe_set_isa(isa) == OK && moe_isa() == isa, "no instruction set");
    std::vector<std::thread> callers;
    for (int c = 0; c < std::atoi(argv[3]); ++c)
      callers.emplace_back(rounds, seed + 1000 * static_cast<unsigned>(c), std::atoi(argv[2]));
    for (std::thread& caller : callers) caller.join();
    std::printf("instruction set %d: done\n", isa);
  }
  return 0;
}
