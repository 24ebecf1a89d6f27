// The steps of a router, for calls that contain one.
#pragma once

#include <cstdint>

#include "work.h"

// Prepares a token [m.cols] for a router's matrix.
void prepare_for_router(const Matrix& m, const float* token, const Prepared& out);

// Multiplies the rows of chunk `c`, of chunks_of(m, 1), with `tokens` prepared tokens. A token's scores y[t]
// [m.rows] do not depend on how many others there are.
void multiply_router(const Matrix& m, const Prepared* x, int64_t tokens, int64_t c, float* const* y);

// One token's choice, from its scores [count], which are overwritten; see moe_route.
void choose_experts(int32_t dtype, float* scores, int64_t count, int64_t top_k, bool normalized, void* logits,
                    float* weights, int64_t* ids);
