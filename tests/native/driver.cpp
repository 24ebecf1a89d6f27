// Calls the library with random shapes, for sanitizers to watch: every buffer is as large as it has to be and
// no larger, at any address, beside a page that must not be touched or memory that AddressSanitizer guards.
//
// driver SEED ROUNDS CALLERS: that many rounds in each of so many threads. Aborts where an answer is wrong.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "moe_linear_attention.h"

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

int64_t bytes_of(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

int32_t a_dtype(Random& random) { return static_cast<int32_t>(between(random, FLOAT32, FLOAT16)); }

// Numbers of a dtype, each of them finite and of at most about `most`.
class Numbers : public Buffer {
 public:
  Numbers(Random& random, int32_t dtype, int64_t count, float most)
      : Buffer(random, bytes_of(dtype) * count), dtype_(dtype) {
    std::uniform_real_distribution<float> any(-most, most);
    for (int64_t i = 0; i < count; ++i) set(i, any(random));
  }

  // Those of 16 bits lose what floats have beyond, and fp16 what is too small or large for it.
  void set(int64_t index, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype_ == FLOAT16) {
      const uint32_t size = bits & 0x7fffffff, sign = bits >> 31 << 15;
      const uint32_t finite = size < 0x38800000 ? 0 : size >= 0x47800000 ? 0x7bff : (size - 0x38000000) >> 13;
      half = static_cast<uint16_t>(sign | (size > 0x7f800000 ? 0x7e00 : finite));
    }
    const void* from = dtype_ == FLOAT32 ? static_cast<const void*>(&x) : &half;
    std::memcpy(bytes() + index * bytes_of(dtype_), from, static_cast<size_t>(bytes_of(dtype_)));
  }

 private:
  int32_t dtype_;
};

int64_t low_blocks(int32_t format, int64_t cols) {
  return format == Q3 ? (cols + 31) / 32 : (cols + 15) / 16;
}

int64_t codes_bytes(int32_t format, int64_t rows, int64_t cols) {
  switch (format) {
    case NF4: return (rows * cols + 1) / 2;
    case MXFP4:
    case NVFP4: return rows * ((cols + 1) / 2);
    case INT8:
    case FP8: return rows * cols;
    case Q3: return rows * low_blocks(format, cols) * 12;
    case Q2: return rows * low_blocks(format, cols) * 4;
    default: return rows * cols * bytes_of(format - FP32);
  }
}

// FP8's blocks of any shape, and the dtype of their scales.
struct Blocks {
  int64_t rows, cols;
  int32_t dtype;

  Blocks(Random& random, int64_t matrix_rows, int64_t matrix_cols)
      : rows(a_side(random, matrix_rows)),
        cols(a_side(random, matrix_cols)),
        dtype(static_cast<int32_t>(between(random, FLOAT32, EXPONENT8))) {}

  int64_t count(int64_t matrix_rows, int64_t matrix_cols) const {
    return ((matrix_rows - 1) / rows + 1) * ((matrix_cols - 1) / cols + 1);
  }

 private:
  static int64_t a_side(Random& random, int64_t whole) {
    switch (between(random, 0, 4)) {
      case 0: return 1;
      case 1: return 128;
      case 2: return whole;
      case 3: return INT64_MAX;
      default: return between(random, 1, 200);
    }
  }
};

int64_t scale_bytes(int32_t format, int64_t rows, int64_t cols, const Blocks& blocks) {
  switch (format) {
    case NF4: return blocks_of(rows * cols);
    case INT8: return 2 * rows * blocks_of(cols);
    case Q3:
    case Q2: return rows * low_blocks(format, cols);
    case MXFP4: return rows * ((cols + 31) / 32);
    case NVFP4: return rows * ((cols + 15) / 16);
    case FP8: return blocks.count(rows, cols) * (blocks.dtype == EXPONENT8 ? 1 : bytes_of(blocks.dtype));
    default: return 0;
  }
}

int64_t nested_count(int32_t format, int64_t rows, int64_t cols, const Blocks& blocks) {
  if (format == Q3 || format == Q2) return rows;
  if (format == NVFP4) return (rows - 1) / blocks.rows + 1;
  return format == NF4 ? (blocks_of(rows * cols) + 255) / 256 : 0;
}

// A matrix of random codes, or of numbers.
struct Weights {
  Blocks blocks;
  Buffer q, scales, nested, offset;
  int32_t bias_dtype;
  Numbers bias;
  Matrix m;

  Weights(Random& random, int32_t format, int64_t rows, int64_t cols)
      : blocks(random, rows, cols),
        q(random, codes_bytes(format, rows, cols)),
        scales(random, scale_bytes(format, rows, cols, blocks)),
        nested(random, 4 * nested_count(format, rows, cols, blocks)),
        offset(random, 4),
        bias_dtype(a_dtype(random)),
        bias(random, bias_dtype, rows, 1.0f),
        m{format, bias_dtype, rows, cols, q.bytes(), scales.bytes(), nullptr, nullptr, nullptr, 0, 0, 0, 0} {
    q.fill(random);
    fill_scales(random);
    nested.fill_floats(random, 0.0f, 0.1f);
    offset.fill_floats(random, 0.1f, 0.2f);
    if (format >= FP32) {
      Numbers numbers(random, format - FP32, rows * cols, 0.5f);
      std::memcpy(q.bytes(), numbers.bytes(), static_cast<size_t>(codes_bytes(format, rows, cols)));
      m.scales = nullptr;
    }
    if (nested_count(format, rows, cols, blocks) > 0) m.nested = nested.floats();
    if (format == NF4) m.offset = offset.floats();
    if (format == FP8) m.block_rows = blocks.rows, m.block_cols = blocks.cols, m.scale_dtype = blocks.dtype;
    if (format == NVFP4) m.block_rows = blocks.rows, m.divides = random() % 2;
    if (random() % 2) m.bias = bias.bytes();
  }

 private:
  // Any bytes where all of them are numbers; of powers of two mostly such that sums stay finite.
  void fill_scales(Random& random) {
    const int64_t bytes = scale_bytes(m.format, m.rows, m.cols, blocks);
    if (m.format == FP8 && blocks.dtype != EXPONENT8) {
      const int64_t count = blocks.count(m.rows, m.cols);
      Numbers numbers(random, blocks.dtype, count, 0.01f);
      std::memcpy(scales.bytes(), numbers.bytes(), static_cast<size_t>(bytes));
      return;
    }
    scales.fill(random);
    if (m.format == INT8)  // fp16 of at most 2, never infinite
      for (int64_t i = 1; i < bytes; i += 2) scales.bytes()[i] &= 0x3f;
    if ((m.format == MXFP4 || m.format == FP8) && random() % 4 != 0)
      for (int64_t i = 0; i < bytes; ++i)
        scales.bytes()[i] = static_cast<uint8_t>(112 + scales.bytes()[i] % 16);
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

int32_t a_format(Random& random) { return static_cast<int32_t>(between(random, NF4, FP16)); }

int32_t some_threads(Random& random) { return static_cast<int32_t>(between(random, 1, 8)); }

void same_bytes(Buffer& a, Buffer& b, int64_t bytes, const char* what) {
  require(std::memcmp(a.bytes(), b.bytes(), static_cast<size_t>(bytes)) == 0, what);
}

void use_linear(Random& random) {
  const bool wide = random() % 8 == 0;  // inputs beyond FIRST_CACHE and STRETCH
  const int64_t rows = wide ? between(random, 1, 5) : a_size(random);
  const int64_t cols = wide ? 64 * between(random, 65, 600) + (random() % 4 ? 0 : 1) : a_size(random);
  const int64_t tokens = random() % 10 == 0 ? 130 : between(random, 1, 9);
  Weights w(random, a_format(random), rows, cols);
  const int32_t dtype = a_dtype(random), activations = an_activation(random);
  const int64_t bytes = bytes_of(dtype) * tokens * rows;
  const float size = random() % 8 == 0 ? 2e-37f : 2.0f;  // or the scales' inverse is no float
  Numbers x(random, dtype, tokens * cols, size);
  Buffer y(random, bytes), again(random, bytes);
  if (random() % 8 == 0) x.set(0, NAN);
  for (Buffer* out : {&y, &again}) {
    const int32_t threads = out == &again ? 1 : some_threads(random);
    require(moe_linear(&w.m, x.bytes(), tokens, out->bytes(), dtype, activations, threads) == OK,
            "moe_linear failed");
  }
  same_bytes(y, again, bytes, "threads change moe_linear");
}

// One token of each of some sequences, whose key and value come behind earlier ones.
void use_attention(Random& random) {
  const int64_t kv_heads = between(random, 1, 3), heads = kv_heads * between(random, 1, 6);
  const int64_t width = 16 * between(random, 1, 5), hidden = a_size(random);
  const int32_t format = a_format(random), dtype = a_dtype(random), activations = an_activation(random);
  const int32_t gated = static_cast<int32_t>(random() % 2);
  Weights q(random, format, (1 + gated) * heads * width, hidden), k(random, format, kv_heads * width, hidden);
  Weights v(random, format, kv_heads * width, hidden), o(random, a_format(random), hidden, heads * width);
  const int64_t rotated = 2 * between(random, 0, width / 2);
  const int32_t shared = static_cast<int32_t>(random() % 2);
  const int64_t angles = shared ? rotated / 2 : rotated;
  const int64_t tokens = between(random, 1, 6);
  Numbers cos(random, dtype, tokens * angles, 1.0f), sin(random, dtype, tokens * angles, 1.0f);
  Numbers q_norm(random, dtype, width, 1.0f), k_norm(random, dtype, width, 1.0f);
  Numbers sinks(random, dtype, heads, 1.0f), x(random, dtype, tokens * hidden, 0.5f);
  const int64_t first = between(random, 0, 3) * between(random, 0, 99);
  const int64_t last = first + (random() % 4 == 0 ? between(random, 250, 800) : between(random, 0, 40));
  const int64_t stride = (last + 1) * width + (random() % 2 ? 0 : between(random, 1, 99));
  const int64_t room = (kv_heads - 1) * stride + (last + 1) * width;  // ends with the last head's last
  std::deque<Numbers> memory;                                         // whose elements stay where they are
  std::vector<Sequence> sequences;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int each = 0; each < 2; ++each) memory.emplace_back(random, dtype, room, 1.0f);
    const int64_t mine = between(random, first, last);
    const size_t place = memory.size() - 2;
    sequences.push_back({memory[place].bytes(), memory[place + 1].bytes(), stride, first, mine});
  }
  const int64_t bytes = bytes_of(dtype) * tokens * hidden;
  Buffer y(random, bytes), again(random, bytes);
  const int32_t rotation = static_cast<int32_t>(between(random, HALVES, NEIGHBOURS));
  Attention a{q.m,   k.m,     v.m,      o.m,     heads, kv_heads,
              width, rotated, rotation, shared,  0.2f,  1e-5f,
              dtype, nullptr, nullptr,  nullptr, gated, static_cast<int32_t>(random() % 2)};
  if (random() % 2) a.q_norm = q_norm.bytes();
  if (random() % 2) a.k_norm = k_norm.bytes();
  if (random() % 2) a.sinks = sinks.bytes();
  for (Buffer* out : {&y, &again}) {
    const int32_t threads = out == &again ? 1 : some_threads(random);
    require(moe_attention(&a, x.bytes(), cos.bytes(), sin.bytes(), sequences.data(), tokens, out->bytes(),
                          activations, threads) == OK,
            "moe_attention failed");
  }
  same_bytes(y, again, bytes, "threads or a second call change moe_attention");
}

// The same with compressed keys and values.
void use_latent_attention(Random& random) {
  LatentAttention a{};
  a.heads = between(random, 1, 11), a.latent = 16 * between(random, 1, 20),
  a.rotated = 16 * between(random, 1, 4);
  a.plain = between(random, 1, 40), a.value = between(random, 1, 40);
  a.rotation = static_cast<int32_t>(between(random, HALVES, APART));
  a.shared = static_cast<int32_t>(random() % 2), a.dtype = a_dtype(random);
  a.scaling = 0.2f, a.q_epsilon = a.kv_epsilon = 1e-5f;
  const int64_t hidden = a_size(random), ranks = random() % 2 ? a_size(random) : 0,
                tokens = between(random, 1, 6);
  const int32_t format = a_format(random), activations = an_activation(random);
  Weights q_a(random, format, std::max<int64_t>(1, ranks), hidden);
  Weights q_b(random, ranks > 0 ? a_format(random) : format, a.heads * (a.plain + a.rotated),
              ranks > 0 ? ranks : hidden);
  Weights kv_a(random, format, a.latent + a.rotated, hidden);
  Weights kv_b(random, a_format(random), a.heads * (a.plain + a.value), a.latent);
  Weights o(random, a_format(random), hidden, a.heads * a.value);
  Numbers q_norm(random, a.dtype, std::max<int64_t>(1, ranks), 1.0f),
      kv_norm(random, a.dtype, a.latent, 1.0f);
  if (ranks > 0) a.q_a = q_a.m, a.q_norm = q_norm.bytes();
  a.q_b = q_b.m, a.kv_a = kv_a.m, a.kv_b = kv_b.m, a.o = o.m, a.kv_norm = kv_norm.bytes();
  a.kv_b.bias = nullptr;
  const int64_t angles = a.shared ? a.rotated / 2 : a.rotated;
  Buffer cos(random, 4 * tokens * angles), sin(random, 4 * tokens * angles);
  cos.fill_floats(random, -1.0f, 1.0f), sin.fill_floats(random, -1.0f, 1.0f);
  Numbers x(random, a.dtype, tokens * hidden, 0.5f);
  std::deque<Numbers> memory;
  std::vector<Sequence> sequences;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t first = between(random, 0, 3) * between(random, 0, 99);
    const int64_t seen = random() % 8 == 0 ? between(random, 4000, 5000) : between(random, 1, 400);
    memory.emplace_back(random, a.dtype, (first + seen) * a.latent, 1.0f);
    memory.emplace_back(random, a.dtype, (first + seen) * a.rotated, 1.0f);
    const size_t place = memory.size() - 2;
    sequences.push_back({memory[place].bytes(), memory[place + 1].bytes(), 0, first, first + seen - 1});
  }
  const int64_t bytes = bytes_of(a.dtype) * tokens * hidden;
  Buffer y(random, bytes), again(random, bytes);
  for (Buffer* out : {&y, &again}) {
    const int32_t threads = out == &again ? 1 : some_threads(random);
    require(moe_latent_attention(&a, x.bytes(), cos.floats(), sin.floats(), sequences.data(), tokens,
                                 out->bytes(), activations, threads) == OK,
            "moe_latent_attention failed");
  }
  same_bytes(y, again, bytes, "threads or a second call change moe_latent_attention");
}

void use_delta_net(Random& random) {
  DeltaNet n{};
  n.key_heads = between(random, 1, 3), n.value_heads = n.key_heads * between(random, 1, 3);
  n.key_width = a_size(random) % 70 + 1, n.value_width = 16 * between(random, 1, 9);
  n.taps = between(random, 1, 6), n.dtype = a_dtype(random), n.epsilon = 1e-5f;
  const int64_t rows = between(random, 1, 6), hidden = a_size(random), values = n.value_heads * n.value_width;
  const int64_t channels = 2 * n.key_heads * n.key_width + values;
  const int32_t format = a_format(random), activations = an_activation(random);
  n.by_key_head = static_cast<int32_t>(random() % 2);
  Weights qkv(random, format, n.by_key_head ? channels + values : channels, hidden);
  Weights b(random, format, n.by_key_head ? 2 * n.value_heads : n.value_heads, hidden);
  Weights z(random, format, values, hidden), a(random, format, n.value_heads, hidden);
  Weights o(random, a_format(random), hidden, values);
  n.qkv = qkv.m, n.b = b.m, n.o = o.m;
  if (!n.by_key_head) n.z = z.m, n.a = a.m;
  Numbers convolution(random, n.dtype, channels * n.taps, 1.0f), bias(random, n.dtype, channels, 1.0f);
  Numbers a_log(random, n.dtype, n.value_heads, 1.0f), dt_bias(random, n.dtype, n.value_heads, 1.0f);
  Numbers norm(random, n.dtype, n.value_width, 1.0f), x(random, n.dtype, rows * hidden, 0.5f);
  n.convolution = convolution.bytes(), n.convolution_bias = random() % 2 ? bias.bytes() : nullptr;
  n.a_log = a_log.bytes(), n.dt_bias = dt_bias.bytes(), n.norm = norm.bytes();
  const int64_t input_bytes = bytes_of(n.dtype) * rows * channels * n.taps;
  const int64_t state_bytes = 4 * rows * values * n.key_width, bytes = bytes_of(n.dtype) * rows * hidden;
  Numbers inputs(random, n.dtype, rows * channels * n.taps, 1.0f);
  Buffer states(random, state_bytes), other_inputs(random, input_bytes), other_states(random, state_bytes);
  states.fill_floats(random, -1.0f, 1.0f);
  std::memcpy(other_inputs.bytes(), inputs.bytes(), static_cast<size_t>(input_bytes));
  std::memcpy(other_states.bytes(), states.bytes(), static_cast<size_t>(state_bytes));
  Buffer y(random, bytes), again(random, bytes);
  Buffer changes(random, 4 * rows * (channels + n.value_heads * (n.key_width + n.value_width + 1)));
  const bool later = random() % 2 == 0;
  require(moe_delta_net(&n, x.bytes(), inputs.bytes(), states.floats(), rows, y.bytes(),
                        later ? changes.floats() : nullptr, activations, some_threads(random)) == OK,
          "moe_delta_net failed");
  if (later)
    require(moe_change_states(&n, changes.floats(), rows, inputs.bytes(), states.floats(),
                              some_threads(random)) == OK,
            "moe_change_states failed");
  require(moe_delta_net(&n, x.bytes(), other_inputs.bytes(), other_states.floats(), rows, again.bytes(),
                        nullptr, activations, 1) == OK,
          "moe_delta_net failed");
  same_bytes(y, again, bytes, "threads change moe_delta_net");
  same_bytes(inputs, other_inputs, input_bytes, "threads change inputs of moe_delta_net");
  same_bytes(states, other_states, state_bytes, "threads change states of moe_delta_net");
}

void use_mamba2(Random& random) {
  Mamba2 m{};
  m.groups = between(random, 1, 3), m.heads = m.groups * between(random, 1, 3);
  m.width = a_size(random) % 40 + 1, m.states = 16 * between(random, 1, 9);
  m.taps = between(random, 1, 6), m.dtype = a_dtype(random), m.epsilon = 1e-5f;
  const int64_t rows = between(random, 1, 6), hidden = a_size(random), answers = m.heads * m.width;
  const int64_t channels = answers + 2 * m.groups * m.states;
  const int32_t activations = an_activation(random);
  Weights in(random, a_format(random), answers + channels + m.heads, hidden);
  Weights out(random, a_format(random), hidden, answers);
  m.in = in.m, m.out = out.m;
  Numbers convolution(random, m.dtype, channels * m.taps, 1.0f), bias(random, m.dtype, channels, 1.0f);
  Numbers a_log(random, m.dtype, m.heads, 1.0f), d(random, m.dtype, m.heads, 1.0f);
  Numbers dt_bias(random, m.dtype, m.heads, 1.0f), norm(random, m.dtype, answers, 1.0f);
  Numbers x(random, m.dtype, rows * hidden, 0.5f), inputs(random, m.dtype, rows * channels * m.taps, 1.0f);
  m.convolution = convolution.bytes(), m.convolution_bias = random() % 2 ? bias.bytes() : nullptr;
  m.a_log = a_log.bytes(), m.d = d.bytes(), m.dt_bias = dt_bias.bytes(), m.norm = norm.bytes();
  const int64_t input_bytes = bytes_of(m.dtype) * rows * channels * m.taps;
  const int64_t state_bytes = 4 * rows * answers * m.states, bytes = bytes_of(m.dtype) * rows * hidden;
  Buffer states(random, state_bytes), other_inputs(random, input_bytes), other_states(random, state_bytes);
  states.fill_floats(random, -1.0f, 1.0f);
  std::memcpy(other_inputs.bytes(), inputs.bytes(), static_cast<size_t>(input_bytes));
  std::memcpy(other_states.bytes(), states.bytes(), static_cast<size_t>(state_bytes));
  Buffer y(random, bytes), again(random, bytes);
  require(moe_mamba2(&m, x.bytes(), inputs.bytes(), states.floats(), rows, y.bytes(), activations,
                     some_threads(random)) == OK,
          "moe_mamba2 failed");
  require(moe_mamba2(&m, x.bytes(), other_inputs.bytes(), other_states.floats(), rows, again.bytes(),
                     activations, 1) == OK,
          "moe_mamba2 failed");
  same_bytes(y, again, bytes, "threads change moe_mamba2");
  same_bytes(inputs, other_inputs, input_bytes, "threads change inputs of moe_mamba2");
  same_bytes(states, other_states, state_bytes, "threads change states of moe_mamba2");
}

void use_mlp(Random& random) {
  const int64_t width = a_size(random), hidden = a_size(random);
  const int64_t tokens = random() % 8 == 0 ? between(random, 30, 90) : between(random, 1, 9);
  const int32_t format = a_format(random);
  Weights gate(random, format, hidden, width), up(random, format, hidden, width);
  Weights down(random, a_format(random), width, hidden), share(random, a_format(random), 1, width);
  Mlp m{gate.m, up.m, down.m, static_cast<int32_t>(between(random, IDENTITY, GELU_TANH)), a_dtype(random)};
  Numbers x(random, m.dtype, tokens * width, 0.5f);
  const Matrix* opens = random() % 2 ? &share.m : nullptr;
  const int64_t bytes = bytes_of(m.dtype) * tokens * width;
  Buffer y(random, bytes), again(random, bytes);
  const int32_t activations = an_activation(random);
  for (Buffer* out : {&y, &again})
    require(moe_mlp(&m, opens, x.bytes(), tokens, out->bytes(), activations,
                    out == &y ? some_threads(random) : 1) == OK,
            "moe_mlp failed");
  same_bytes(y, again, bytes, "threads change moe_mlp");
}

void use_norms(Random& random) {
  const int64_t width = a_size(random);
  const int64_t tokens = random() % 4 == 0 ? between(random, 200, 900) : between(random, 0, 5);
  const int32_t dtype = a_dtype(random);
  const int64_t bytes = bytes_of(dtype) * tokens * width;
  Numbers x(random, dtype, tokens * width, 2.0f), weight(random, dtype, width, 1.0f);
  Numbers gate(random, dtype, tokens * width, 9.0f);
  const int32_t shifted = static_cast<int32_t>(random() % 2);
  Buffer gated(random, bytes), again(random, bytes), y(random, bytes);
  for (Buffer* out : {&gated, &again})
    require(moe_gated_norm(x.bytes(), gate.bytes(), weight.bytes(), 1e-5f, tokens, width, dtype, out->bytes(),
                           out == &gated ? some_threads(random) : 1) == OK,
            "moe_gated_norm failed");
  same_bytes(gated, again, bytes, "threads change moe_gated_norm");
  const int64_t groups = width % 2 == 0 ? 2 : 1;
  for (Buffer* out : {&gated, &again})
    require(moe_open_and_norm(x.bytes(), gate.bytes(), weight.bytes(), 1e-5f, tokens, groups, width, dtype,
                              dtype, out->bytes(), out == &gated ? some_threads(random) : 1) == OK,
            "moe_open_and_norm failed");
  same_bytes(gated, again, bytes, "threads change moe_open_and_norm");
  Numbers scanned(random, FLOAT32, tokens * width, 2.0f);
  Buffer alone(random, 4 * tokens * width);
  for (Buffer* out : {&alone, static_cast<Buffer*>(&scanned)})
    require(moe_open_and_norm(scanned.bytes(), gate.bytes(), weight.bytes(), 1e-5f, tokens, groups, width,
                              dtype, FLOAT32, out->bytes(), out == &alone ? some_threads(random) : 1) == OK,
            "moe_open_and_norm of fp32 failed");
  same_bytes(alone, scanned, 4 * tokens * width,
             "threads change moe_open_and_norm, or it is another in place");
  for (Buffer* out : {&y, static_cast<Buffer*>(&x)})
    require(moe_norm(x.bytes(), weight.bytes(), shifted, 1e-5f, tokens, width, dtype, out->bytes(),
                     out == &y ? some_threads(random) : 1) == OK,
            "moe_norm failed");
  same_bytes(x, y, bytes, "threads change moe_norm, or it is another in place");
}

void use_route(Random& random) {
  const int64_t width = a_size(random), experts = a_size(random);
  const int32_t dtype = a_dtype(random);
  Weights router(random, a_format(random), experts, width);
  const int64_t several = between(random, 1, 9);
  Numbers token(random, dtype, several * width, 0.5f);
  const int64_t top_k = between(random, 1, std::min<int64_t>(experts, 9));
  Buffer logits(random, bytes_of(dtype) * several * experts);
  Router r{&router.m,
           top_k,
           static_cast<int32_t>(random() % 2),
           1.5f,
           a_dtype(random),
           dtype,
           SOFTMAX,
           0,
           nullptr,
           0,
           0,
           0};
  r.scoring = static_cast<int32_t>(between(random, SOFTMAX, SIGMOID)), r.correction_dtype = a_dtype(random);
  Numbers correction(random, r.correction_dtype, experts, 0.3f);
  const bool corrected = random() % 2;
  if (corrected) r.correction = correction.bytes();
  const int64_t size = between(random, 1, 4);
  if (experts % size == 0 && experts / size <= 256 && random() % 2) {
    r.groups = experts / size, r.best = between(random, 1, std::min<int64_t>(2, size));
    r.top_groups = between(random, (top_k + size - 1) / size, r.groups);
  }
  std::vector<float> shares(static_cast<size_t>(several * top_k));
  std::vector<int64_t> chosen(static_cast<size_t>(several * top_k));
  if (random() % 4 == 0) token.set(0, NAN);
  require(moe_route(&r, token.bytes(), several, dtype, random() % 2 ? logits.bytes() : nullptr, shares.data(),
                    chosen.data(), some_threads(random)) == OK,
          "moe_route failed");
  for (int64_t i = 0; i < several * top_k; ++i) {
    const auto mine = chosen.begin() + i / top_k * top_k;
    require(chosen[i] >= 0 && chosen[i] < experts, "moe_route chose none that there is");
    require(std::count(mine, mine + top_k, chosen[i]) == 1, "moe_route chose one twice");
    const bool ordered = corrected || i % top_k == 0 || !(shares[i] > shares[i - 1]);
    require(ordered, "moe_route has another order");
  }
}

// Numbers [sequences, heads, tokens, width] with gaps between tokens, and heads in front of tokens or behind.
Strided laid_out(Random& random, int64_t heads, int64_t tokens, int64_t width) {
  const int64_t apart = width + (random() % 2 ? 0 : 16);
  if (random() % 2) return {nullptr, heads * tokens * apart, apart, heads * apart};
  return {nullptr, heads * tokens * apart, tokens * apart, apart};
}

void use_prompt(Random& random) {
  PromptAttention p{};
  p.dtype = a_dtype(random), p.scaling = 0.2f;
  p.sequences = between(random, 1, 2), p.kv_heads = between(random, 1, 2);
  p.heads = p.kv_heads * between(random, 1, 3);
  p.queries = random() % 4 == 0 ? between(random, 100, 300) : between(random, 1, 20);
  p.keys = between(random, 1, 200), p.width = 16 * between(random, 1, 6);
  p.value_width = 16 * between(random, 1, 6);
  p.q = laid_out(random, p.heads, p.queries, p.width), p.k = laid_out(random, p.kv_heads, p.keys, p.width);
  p.v = laid_out(random, p.kv_heads, p.keys, p.value_width);
  Numbers q(random, p.dtype, p.sequences * p.q.row, 2.0f), k(random, p.dtype, p.sequences * p.k.row, 2.0f);
  Numbers v(random, p.dtype, p.sequences * p.v.row, 2.0f);
  p.q.numbers = q.bytes(), p.k.numbers = k.bytes(), p.v.numbers = v.bytes();
  const int64_t rows = p.sequences * p.queries;
  std::vector<uint8_t> mask(static_cast<size_t>(rows * p.keys));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = between(random, 0, static_cast<int>(p.keys)), last = between(random, 0, 200);
    for (int64_t i = first; i < std::min(last, p.keys); ++i) mask[r * p.keys + i] = 1;
  }
  std::vector<int32_t> seen(static_cast<size_t>(2 * rows));
  require(moe_seen(mask.data(), rows, p.keys, seen.data()) == OK, "moe_seen failed");
  Buffer sinks(random, 4 * p.heads);
  sinks.fill_floats(random, -3.0f, 3.0f);
  p.seen = seen.data(), p.sinks = random() % 2 ? sinks.floats() : nullptr;
  const int64_t bytes = bytes_of(p.dtype) * rows * p.heads * p.value_width;
  Buffer y(random, bytes), again(random, bytes);
  for (Buffer* out : {&y, &again}) {
    p.y = out->bytes();
    require(moe_prompt_attention(&p, out == &y ? some_threads(random) : 1) == OK,
            "moe_prompt_attention failed");
  }
  same_bytes(y, again, bytes, "threads change moe_prompt_attention");
}

// Some tokens of some sequences, whose q, k and v are slices of one array or lie apart.
void use_delta_rule(Random& random) {
  const int32_t dtype = a_dtype(random);
  DeltaRule r{};
  r.rows = between(random, 1, 3), r.key_heads = between(random, 1, 3);
  r.value_heads = r.key_heads * between(random, 1, 3);
  r.key_width = a_size(random) % 70 + 1, r.value_width = 16 * between(random, 1, 9);
  r.tokens = random() % 4 == 0 ? between(random, 30, 70) : between(random, 1, 6);
  r.dtype = dtype, r.normalized = static_cast<int32_t>(random() % 2);
  const int64_t keys = r.key_heads * r.key_width, values = r.value_heads * r.value_width;
  const bool together = random() % 2;
  const int64_t gap = random() % 2 ? 0 : between(random, 1, 20);
  r.key_stride = (together ? 2 * keys + values : keys) + gap;
  r.value_stride = together ? r.key_stride : values + (random() % 2 ? 0 : between(random, 1, 20));
  const int64_t tokens = r.rows * r.tokens, heads = tokens * r.value_heads;
  const int64_t keys_size = (tokens - 1) * r.key_stride + (together ? 2 * keys + values : keys);
  const int64_t values_size = (tokens - 1) * r.value_stride + values;
  Numbers q(random, dtype, keys_size, 0.3f), k(random, dtype, keys_size, 0.3f);
  Numbers v(random, dtype, values_size, 2.0f), beta(random, dtype, heads, 1.0f);
  const int64_t bytes = bytes_of(dtype) * tokens * values, of_state = r.key_width * r.value_width;
  const int64_t state_bytes = 4 * r.rows * r.value_heads * of_state;
  Buffer decay(random, 4 * heads), state(random, state_bytes), other(random, state_bytes);
  decay.fill_floats(random, random() % 4 == 0 ? -300.0f : -3.0f, 0.0f);
  state.fill_floats(random, -1.0f, 1.0f);
  std::memcpy(other.bytes(), state.bytes(), static_cast<size_t>(state_bytes));
  Buffer y(random, bytes), again(random, bytes);
  r.q = q.bytes(), r.beta = beta.bytes(), r.decay = decay.floats();
  r.k = together ? q.bytes() + bytes_of(dtype) * keys : k.bytes();
  r.v = together ? q.bytes() + bytes_of(dtype) * 2 * keys : v.bytes();
  for (Buffer* out : {&y, &again}) {
    r.state = (out == &y ? state : other).floats(), r.y = out->bytes();
    require(moe_delta_rule(&r, out == &y ? some_threads(random) : 1) == OK, "moe_delta_rule failed");
  }
  same_bytes(y, again, bytes, "threads change moe_delta_rule");
  same_bytes(state, other, state_bytes, "threads change a state of moe_delta_rule");
}

// Some tokens of some sequences, whose x, b, c and dt are slices of one array or lie apart.
void use_mamba2_scan(Random& random) {
  const int32_t dtype = a_dtype(random);
  Mamba2Scan s{};
  s.rows = between(random, 1, 3), s.groups = between(random, 1, 3);
  s.heads = s.groups * between(random, 1, 6);
  s.width = a_size(random) % 40 + 1, s.states = 16 * between(random, 1, 9);
  s.tokens = random() % 4 == 0 ? between(random, 30, 70) : between(random, 1, 6);
  s.dtype = dtype, s.softplus = static_cast<int32_t>(random() % 2), s.least = 0.01f, s.most = 2.0f;
  const int64_t xs = s.heads * s.width, bs = s.groups * s.states, all = xs + 2 * bs + s.heads;
  const bool together = random() % 2;
  s.x_stride = together ? all : xs + between(random, 0, 9);
  s.b_stride = together ? all : bs + between(random, 0, 9);
  s.dt_stride = together ? all : s.heads;
  const int64_t tokens = s.rows * s.tokens;
  Numbers x(random, dtype, (tokens - 1) * s.x_stride + (together ? all : xs), 1.0f);
  Numbers b(random, dtype, (tokens - 1) * s.b_stride + bs, 1.0f);
  Numbers c(random, dtype, (tokens - 1) * s.b_stride + bs, 1.0f), dt(random, dtype, tokens * s.heads, 2.0f);
  Numbers bias(random, dtype, s.heads, 1.0f);
  const int64_t bytes = 4 * tokens * xs, state_bytes = 4 * s.rows * xs * s.states;
  Buffer a(random, 4 * s.heads), d(random, 4 * s.heads), state(random, state_bytes),
      other(random, state_bytes);
  a.fill_floats(random, random() % 4 == 0 ? -300.0f : -3.0f, 0.0f);
  d.fill_floats(random, -1.0f, 1.0f);
  state.fill_floats(random, -1.0f, 1.0f);
  std::memcpy(other.bytes(), state.bytes(), static_cast<size_t>(state_bytes));
  Buffer y(random, bytes), again(random, bytes);
  const int64_t number = bytes_of(dtype);
  s.x = x.bytes(), s.b = together ? x.bytes() + number * xs : b.bytes();
  s.c = together ? x.bytes() + number * (xs + bs) : c.bytes();
  s.dt = together ? x.bytes() + number * (xs + 2 * bs) : dt.bytes();
  s.dt_bias = random() % 2 ? bias.bytes() : nullptr;
  s.a = a.floats(), s.d = random() % 2 ? d.floats() : nullptr;
  for (Buffer* out : {&y, &again}) {
    s.state = (out == &y ? state : other).floats(), s.y = out->floats();
    require(moe_mamba2_scan(&s, out == &y ? some_threads(random) : 1) == OK, "moe_mamba2_scan failed");
  }
  same_bytes(y, again, bytes, "threads change moe_mamba2_scan");
  same_bytes(state, other, state_bytes, "threads change a state of moe_mamba2_scan");
}

void use_convolution(Random& random) {
  const int32_t dtype = a_dtype(random);
  const int64_t rows = between(random, 1, 3), channels = a_size(random), taps = between(random, 1, 6);
  Numbers x(random, dtype, rows * channels, 2.0f), inputs(random, dtype, rows * channels * taps, 2.0f);
  Numbers weight(random, dtype, channels * taps, 1.0f), bias(random, dtype, channels, 1.0f);
  const int64_t bytes = bytes_of(dtype) * rows * channels;
  Buffer last(random, bytes * taps), moved(random, bytes), moved_again(random, bytes);
  std::memcpy(last.bytes(), inputs.bytes(), static_cast<size_t>(bytes * taps));
  Convolution c{x.bytes(), nullptr, weight.bytes(), random() % 2 ? bias.bytes() : nullptr, nullptr, rows,
                channels,  taps,    dtype,          static_cast<int32_t>(random() % 2)};
  for (Buffer* out : {&moved, &moved_again}) {
    c.state = out == &moved ? static_cast<Buffer&>(inputs).bytes() : last.bytes(), c.y = out->bytes();
    require(moe_convolve(&c, out == &moved ? some_threads(random) : 1) == OK, "moe_convolve failed");
  }
  same_bytes(moved, moved_again, bytes, "threads change moe_convolve");
  same_bytes(inputs, last, bytes * taps, "threads change a state of moe_convolve");
}

// Whole sequences, whose numbers lie in either order and may have gaps between them.
void use_convolution_of_sequences(Random& random) {
  SequenceConvolution c{};
  c.dtype = a_dtype(random), c.silu = static_cast<int32_t>(random() % 2);
  c.rows = between(random, 1, 3), c.channels = a_size(random);
  c.tokens = random() % 2 ? between(random, 1, 9) : between(random, 60, 200);
  c.taps = random() % 8 == 0 ? between(random, 60, 80) : between(random, 1, 6);
  const bool by_token = random() % 2;
  const int64_t inner = by_token ? c.channels : c.tokens, outer = by_token ? c.tokens : c.channels;
  const int64_t apart = inner + (random() % 2 ? 0 : between(random, 1, 20));
  c.channel_stride = by_token ? 1 : apart, c.token_stride = by_token ? apart : 1;
  c.row_stride = outer * apart + (random() % 2 ? 0 : between(random, 1, 99));
  const int64_t size = (c.rows - 1) * c.row_stride + (outer - 1) * apart + inner;
  Numbers x(random, c.dtype, size, 2.0f), weight(random, c.dtype, c.channels * c.taps, 1.0f);
  Numbers bias(random, c.dtype, c.channels, 1.0f);
  c.x = x.bytes(), c.weight = weight.bytes(), c.bias = random() % 2 ? bias.bytes() : nullptr;
  const int64_t bytes = bytes_of(c.dtype) * c.rows * c.tokens * c.channels;
  Buffer y(random, bytes), again(random, bytes);
  for (Buffer* out : {&y, &again}) {
    c.y = out->bytes();
    require(moe_convolve_sequences(&c, out == &y ? some_threads(random) : 1) == OK,
            "moe_convolve_sequences failed");
  }
  same_bytes(y, again, bytes, "threads change moe_convolve_sequences");
}

void use_experts(Random& random) {
  const int64_t width = a_size(random), hidden = a_size(random) % 200 + 1;
  const int64_t count = between(random, 1, 6), tokens = random() % 8 == 0 ? 90 : between(random, 1, 12);
  const int64_t top_k = between(random, 1, count);
  const int32_t format = a_format(random), dtype = a_dtype(random);
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
  const int64_t bytes = bytes_of(dtype) * tokens * width;
  Numbers x(random, dtype, tokens * width, 1.0f);
  Buffer combined(random, bytes), again(random, bytes);
  Buffer outputs(random, 4 * tokens * top_k * width), shares(random, 4 * tokens * top_k);
  shares.fill_floats(random, 0.0f, 1.0f);
  const int32_t activations = an_activation(random);
  for (Buffer* out : {&combined, &again}) {
    const int32_t threads = out == &again ? 1 : some_threads(random);
    require(moe_experts(pointers.data(), count, starts.data(), rows.data(), places.data(), &gate, x.bytes(),
                        tokens, outputs.floats(), shares.floats(), top_k, out->bytes(), dtype, activations,
                        threads) == OK,
            "moe_experts failed");
  }
  same_bytes(combined, again, bytes, "threads change moe_experts");
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
  const int32_t format = random() % 2 ? Q3 : Q2;
  const int64_t rows = between(random, 1, 4), cols = (numbers + rows - 1) / rows;
  Buffer matrix(random, rows * cols * bytes_of(dtype)), low(random, codes_bytes(format, rows, cols));
  Buffer low_scales(random, rows * low_blocks(format, cols)), row_scales(random, 4 * rows);
  matrix.fill(random);  // any numbers, and none
  require(moe_low_encode(matrix.bytes(), dtype, rows, cols, format, low.bytes(), low_scales.bytes(),
                         row_scales.floats(), threads) == OK,
          "moe_low_encode failed");
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
    use_attention(random);
    use_latent_attention(random);
    use_delta_net(random);
    use_mamba2(random);
    use_mlp(random);
    use_prompt(random);
    use_norms(random);
    use_route(random);
    use_delta_rule(random);
    use_mamba2_scan(random);
    use_convolution(random);
    use_convolution_of_sequences(random);
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
