// Convolutions along tokens, each in a call of its own.
#include <algorithm>
#include <new>

#include "linear_attention.h"
#include "moe_linear_attention.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace {

constexpr int64_t CHANNELS = 256;  // channels per chunk of work
constexpr int64_t SPAN = 64;       // tokens per chunk of work
constexpr int64_t STRIDE =
    CHANNELS + 16;  // floats from one token's inputs to the next's, for different sets of L1

struct ConvolveCall {
  const Convolution* c;
  int64_t chunks;  // chunks per row
  float* floats;   // [threads, size()]

  static int64_t size(const Convolution& c) { return CHANNELS + room_to_convolve(CHANNELS, c.taps); }

  static void work(void* context, int, int64_t chunk, int thread) {
    const ConvolveCall& call = *static_cast<ConvolveCall*>(context);
    const Convolution& c = *call.c;
    const int64_t row = chunk / call.chunks, first = chunk % call.chunks * CHANNELS, taps = c.taps;
    const int64_t count = std::min(CHANNELS, c.channels - first), place = row * c.channels + first;
    float *x = call.floats + thread * size(c), *room = x + CHANNELS;
    kernels().widen(c.dtype, at(c.dtype, c.x, place), count, x);
    const void* bias = c.bias == nullptr ? nullptr : at(c.dtype, c.bias, first);
    convolve_channels(c.dtype, x, at(c.dtype, c.state, place * taps), at(c.dtype, c.weight, first * taps),
                      bias, count, taps, c.silu != 0, room, x, nullptr);
    kernels().narrow(c.dtype, x, count, at(c.dtype, c.y, place));
  }
};

// Some channels of some tokens of a sequence, in order and in floats, through a convolution. Each chunk of
// work reads the inputs in front of its first token again.
struct SequencesCall {
  const SequenceConvolution* c;
  int64_t blocks, spans;  // chunks per row: of channels, and of tokens in each
  float* floats;          // [threads, size()]

  static int64_t size(const SequenceConvolution& c) {
    return (SPAN + 2 * c.taps) * STRIDE + std::max(CHANNELS, SPAN + c.taps);
  }

  static void work(void* context, int, int64_t chunk, int thread) {
    const SequencesCall& call = *static_cast<SequencesCall*>(context);
    const SequenceConvolution& c = *call.c;
    const int64_t row = chunk / (call.blocks * call.spans), block = chunk / call.spans % call.blocks;
    const int64_t first = chunk % call.spans * SPAN, count = std::min(SPAN, c.tokens - first);
    const int64_t channel = block * CHANNELS, width = std::min(CHANNELS, c.channels - channel);
    float* weights = call.floats + thread * size(c);
    float *added = weights + c.taps * STRIDE, *inputs = added + STRIDE;
    float* room = inputs + (c.taps - 1 + SPAN) * STRIDE;
    call.read_weights(channel, width, room, weights, added);
    const int64_t earlier = std::min(first, c.taps - 1);
    float* present = inputs + (c.taps - 1) * STRIDE;
    std::fill(inputs, present - earlier * STRIDE, 0.0f);
    call.read_inputs(row, channel, width, first - earlier, count + earlier, room, present - earlier * STRIDE);
    kernels().convolve(weights, added, STRIDE, c.taps, count, width, inputs);
    const Gate gate{PLAIN, SILU, 0.0f, 0.0f};
    for (int64_t t = 0; t < count; ++t) {
      float* sums = inputs + t * STRIDE;
      if (c.silu != 0) {
        round_to(c.dtype, width, room, sums);
        kernels().gate(gate, sums, width, sums);
      }
      const int64_t place = (row * c.tokens + first + t) * c.channels + channel;
      kernels().narrow(c.dtype, sums, width, at(c.dtype, c.y, place));
    }
  }

  // Weights [taps, STRIDE], and biases or zeros.
  void read_weights(int64_t channel, int64_t width, float* room, float* weights, float* added) const {
    for (int64_t i = 0; i < width; ++i) {
      kernels().widen(c->dtype, at(c->dtype, c->weight, (channel + i) * c->taps), c->taps, room);
      for (int64_t tap = 0; tap < c->taps; ++tap) weights[tap * STRIDE + i] = room[tap];
    }
    std::fill(added, added + width, 0.0f);
    if (c->bias != nullptr) kernels().widen(c->dtype, at(c->dtype, c->bias, channel), width, added);
  }

  // Inputs [count, STRIDE] from token `first` on. `room` holds as many floats as CHANNELS or `count`.
  void read_inputs(int64_t row, int64_t channel, int64_t width, int64_t first, int64_t count, float* room,
                   float* inputs) const {
    const int64_t start = row * c->row_stride + channel * c->channel_stride + first * c->token_stride;
    if (c->channel_stride == 1) {
      for (int64_t t = 0; t < count; ++t)
        kernels().widen(c->dtype, at(c->dtype, c->x, start + t * c->token_stride), width,
                        inputs + t * STRIDE);
      return;
    }
    for (int64_t i = 0; i < width; ++i) {
      kernels().widen(c->dtype, at(c->dtype, c->x, start + i * c->channel_stride), count, room);
      for (int64_t t = 0; t < count; ++t) inputs[t * STRIDE + i] = room[t];
    }
  }
};

bool valid(const Convolution& c) {
  if (!valid_dtype(c.dtype) || c.rows < 1 || c.channels < 1 || c.taps < 1) return false;
  return c.x != nullptr && c.state != nullptr && c.weight != nullptr && c.y != nullptr;
}

bool valid(const SequenceConvolution& c) {
  if (!valid_dtype(c.dtype) || c.rows < 1 || c.channels < 1 || c.tokens < 1 || c.taps < 1) return false;
  if (c.channel_stride != 1 && c.token_stride != 1) return false;
  return c.x != nullptr && c.weight != nullptr && c.y != nullptr;
}

}  // namespace

int32_t moe_convolve(const Convolution* convolution, int32_t threads) try {
  if (convolution == nullptr || threads < 1 || !valid(*convolution)) return BAD_ARGUMENT;
  const Convolution& c = *convolution;
  const int64_t of_row = (c.channels + CHANNELS - 1) / CHANNELS, chunks = c.rows * of_row;
  threads = threads_for(4 * c.rows * c.channels * c.taps, 1, std::min(threads, MAX_THREADS));
  scratch.begin();
  ConvolveCall call{&c, of_row, scratch.take<float>(threads * ConvolveCall::size(c))};
  run_phases(threads, 1, &chunks, ConvolveCall::work, &call);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

int32_t moe_convolve_sequences(const SequenceConvolution* convolution, int32_t threads) try {
  if (convolution == nullptr || threads < 1 || !valid(*convolution)) return BAD_ARGUMENT;
  const SequenceConvolution& c = *convolution;
  const int64_t blocks = (c.channels + CHANNELS - 1) / CHANNELS, spans = (c.tokens + SPAN - 1) / SPAN;
  const int64_t chunks = c.rows * blocks * spans;
  threads = threads_for(4 * c.rows * c.channels * c.tokens, 1, std::min(threads, MAX_THREADS));
  scratch.begin();
  SequencesCall call{&c, blocks, spans, scratch.take<float>(threads * SequencesCall::size(c))};
  run_phases(threads, 1, &chunks, SequencesCall::work, &call);
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
