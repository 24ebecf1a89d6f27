// The steps of a router, for calls that contain one.
#pragma once

#include <cstdint>

#include "work.h"

// Multiplies the rows of chunk `c`, of chunks_of(m, 1), with `tokens` tokens, each prepared as if it were
// alone. A token's scores y[t] [m.rows] do not depend on how many others there are.
void multiply_router(const Matrix& m, const Prepared* x, int64_t tokens, int64_t c, float* const* y);

bool valid(const Router& router);

// One token's choice, from its logits as floats [experts], which are overwritten, as is `spare` [experts];
// see Router.
void choose_experts(const Router& router, float* scores, float* spare, float* weights, int64_t* ids);
