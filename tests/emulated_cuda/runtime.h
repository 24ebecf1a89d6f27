// What the emulated runtime (devices.cpp, streams.cpp), loaded before CUDA's, whose place it takes, lends to
// itself and to the emulated operators.
#pragma once

#include <functional>

#include <cuda_runtime_api.h>

namespace emulated {

using Work = std::function<void()>;

// Whether what is put on this stream goes into a graph instead of being done.
bool is_captured(cudaStream_t stream);

// Does it at once, or lets the graph that the stream is captured into do it at each launch.
void put(cudaStream_t stream, Work work);

// What is captured is not done; to have numbers to go on with it is done all the same, and put back when the
// capture ends. This keeps what is about to be overwritten.
void keep(cudaStream_t stream, void* memory, size_t bytes);

// Leaves an error for cudaGetLastError.
cudaError_t fail(cudaError_t error);

// What a capture in global mode forbids to every thread that has not asked for less.
cudaError_t unsafe();

// A wait of the host for a stream: an error while that is captured, which invalidates the capture.
cudaError_t wait(cudaStream_t stream);

}  // namespace emulated
