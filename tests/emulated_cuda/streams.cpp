// CUDA's streams, events and graphs, as PyTorch asks the runtime for them.
//
// Work is done when it is put on a stream, so that streams and events order nothing. What they mean for a
// capture is kept: which streams belong to it, that nothing is done while it lasts, that a wait, or an
// allocation by a thread that did not ask for it, ends it. A graph is the list of what was put on its
// streams.

#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "runtime.h"

namespace {

using emulated::fail;
using emulated::unsafe;
using emulated::Work;

struct Graph {
  std::vector<Work> works;
  unsigned long long id = 0;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  bool invalid = false;
  cudaStream_t origin = nullptr;
  std::vector<std::pair<char*, std::vector<char>>> kept;
  std::set<std::pair<char*, size_t>> known;  // what of it is kept

  void keep(char* start, size_t bytes) {
    if (known.emplace(start, bytes).second) kept.emplace_back(start, std::vector<char>(start, start + bytes));
  }

  void put_back() {  // last first: where they overlap, the first was kept before anything was overwritten
    for (auto at = kept.rbegin(); at != kept.rend(); ++at)
      std::memcpy(at->first, at->second.data(), at->second.size());
    kept.clear();
    known.clear();
  }
};

struct Stream {
  int priority = 0;
};

struct Event {
  std::chrono::steady_clock::time_point at;
  Graph* captured_in = nullptr;
};

std::recursive_mutex guard;
std::map<cudaStream_t, Graph*> captured;  // streams that belong to a capture
std::atomic<unsigned long long> next_id{1};
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

Graph* graph_of(cudaStream_t stream) {
  auto found = captured.find(stream);
  return found == captured.end() ? nullptr : found->second;
}

void invalidate_all() {
  for (auto& [stream, graph] : captured) graph->invalid = true;
}

}  // namespace

namespace emulated {

cudaError_t unsafe() {
  std::lock_guard lock(guard);
  if (captured.empty() || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  bool forbidden = false;
  for (auto& [stream, graph] : captured) {
    if (graph->mode != cudaStreamCaptureModeGlobal) continue;
    forbidden = graph->invalid = true;
  }
  return forbidden ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

bool is_captured(cudaStream_t stream) {
  std::lock_guard lock(guard);
  return graph_of(stream) != nullptr;
}

void put(cudaStream_t stream, Work work) {
  {
    std::lock_guard lock(guard);
    if (Graph* graph = graph_of(stream)) {
      graph->works.push_back(std::move(work));
      return;
    }
  }
  work();
}

void keep(cudaStream_t stream, void* memory, size_t bytes) {
  std::lock_guard lock(guard);
  if (Graph* graph = graph_of(stream)) graph->keep(static_cast<char*>(memory), bytes);
}

cudaError_t wait(cudaStream_t stream) {
  std::lock_guard lock(guard);
  Graph* graph = graph_of(stream);
  if (!graph) return unsafe();
  graph->invalid = true;
  return fail(cudaErrorStreamCaptureUnsupported);
}

}  // namespace emulated

extern "C" {

// Streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  *stream = reinterpret_cast<cudaStream_t>(new Stream{priority});
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<Stream*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream ? reinterpret_cast<Stream*>(stream)->priority : 0;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return emulated::wait(stream); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
// What waits for all streams spoils a capture in any thread and mode.
cudaError_t cudaDeviceSynchronize() {
  std::lock_guard lock(guard);
  if (captured.empty()) return cudaSuccess;
  invalidate_all();
  return fail(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event{});
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  std::lock_guard lock(guard);
  auto* event = reinterpret_cast<Event*>(handle);
  event->captured_in = graph_of(stream);
  event->at = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  std::lock_guard lock(guard);
  Graph* graph = reinterpret_cast<Event*>(handle)->captured_in;
  for (auto& [stream, capture] : captured)
    if (capture == graph) return emulated::wait(stream);
  return unsafe();
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  auto spent = reinterpret_cast<Event*>(end)->at - reinterpret_cast<Event*>(start)->at;
  *ms = std::chrono::duration<float, std::milli>(spent).count();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  std::lock_guard lock(guard);
  auto* event = reinterpret_cast<Event*>(handle);
  Graph* own = graph_of(stream);
  if (event->captured_in == own) return cudaSuccess;
  if (own) {  // a capture depends on what is outside of it
    own->invalid = true;
    return fail(cudaErrorStreamCaptureIsolation);
  }
  for (auto& [other, graph] : captured) {
    if (graph != event->captured_in) continue;
    captured[stream] = graph;
    break;
  }
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
  emulated::put(stream, [=] { call(stream, cudaSuccess, data); });
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  emulated::put(stream, [=] { call(data); });
  return cudaSuccess;
}

// Captures and graphs

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  std::lock_guard lock(guard);
  if (stream == nullptr) return fail(cudaErrorStreamCaptureUnsupported);
  if (graph_of(stream)) return fail(cudaErrorIllegalState);
  auto* graph = new Graph;
  graph->id = next_id++;
  graph->mode = mode;
  graph->origin = stream;
  captured[stream] = graph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* found) {
  std::lock_guard lock(guard);
  Graph* graph = graph_of(stream);
  *found = nullptr;
  if (!graph || graph->origin != stream) return fail(cudaErrorStreamCaptureUnmatched);
  graph->put_back();
  std::erase_if(captured, [=](auto& entry) { return entry.second == graph; });
  if (graph->invalid) {
    delete graph;
    return fail(cudaErrorStreamCaptureInvalidated);
  }
  *found = reinterpret_cast<cudaGraph_t>(graph);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  std::lock_guard lock(guard);
  Graph* graph = graph_of(stream);
  *status = !graph           ? cudaStreamCaptureStatusNone
            : graph->invalid ? cudaStreamCaptureStatusInvalidated
                             : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* found,
                                     const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  std::lock_guard lock(guard);
  cudaStreamIsCapturing(stream, status);
  Graph* graph = graph_of(stream);
  if (id) *id = graph ? graph->id : 0;
  if (found) *found = reinterpret_cast<cudaGraph_t>(graph);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->works.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new std::vector<Work>(reinterpret_cast<Graph*>(graph)->works));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  auto* works = reinterpret_cast<std::vector<Work>*>(graph);
  emulated::put(stream, [=] {
    for (auto& work : *works) work();
  });
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<std::vector<Work>*>(graph);
  return cudaSuccess;
}

}  // extern "C"
