// CUDA's devices and their memory, as PyTorch asks the runtime for them: the host's memory, counted for each
// device and bounded.
//
// EMULATED_CUDA_DEVICES: how many (1). EMULATED_CUDA_VRAM_MIB: the memory of each (24576).

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "runtime.h"

namespace {

constexpr int CAPABILITY_MAJOR = 9, CAPABILITY_MINOR = 0, PROCESSORS = 82;

struct Memory {
  size_t bytes = 0;
  int device = 0;  // -1: the host's
  bool mapped = false;
};

std::mutex guard;
std::map<char*, Memory> memories;
std::vector<size_t> used(64, 0);
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;

size_t number(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

int devices() { return static_cast<int>(number("EMULATED_CUDA_DEVICES", 1)); }
size_t vram() { return number("EMULATED_CUDA_VRAM_MIB", 24576) << 20; }

const Memory* memory_at(const void* pointer) {
  auto next = memories.upper_bound(const_cast<char*>(static_cast<const char*>(pointer)));
  if (next == memories.begin()) return nullptr;
  auto& [start, memory] = *std::prev(next);
  return pointer < start + memory.bytes ? &memory : nullptr;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  emulated::put(stream, [=] { std::memmove(to, from, bytes); });
  return cudaSuccess;
}

}  // namespace

cudaError_t emulated::fail(cudaError_t error) { return last = error; }

using emulated::fail;
using emulated::unsafe;

extern "C" {

// Devices

cudaError_t cudaGetDeviceCount(int* count) { return *count = devices(), cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  return std::snprintf(id, length, "0000:%02x:00.0", device + 1), cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int device) {
  if (device < 0 || device >= devices()) return fail(cudaErrorInvalidDevice);
  std::memset(found, 0, sizeof *found);
  std::strcpy(found->name, "Emulated GPU");
  found->uuid.bytes[0] = static_cast<char>(device + 1);
  found->totalGlobalMem = vram();
  found->sharedMemPerBlock = 48 << 10;
  found->sharedMemPerBlockOptin = 99 << 10;
  found->sharedMemPerMultiprocessor = 100 << 10;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 1536;
  for (int dim = 0; dim < 3; dim++) found->maxThreadsDim[dim] = dim < 2 ? 1024 : 64;
  for (int dim = 0; dim < 3; dim++) found->maxGridSize[dim] = dim ? 65535 : 2147483647;
  found->major = CAPABILITY_MAJOR;
  found->minor = CAPABILITY_MINOR;
  found->multiProcessorCount = PROCESSORS;
  found->l2CacheSize = 6 << 20;
  found->memoryBusWidth = 384;
  found->pciBusID = device + 1;
  found->asyncEngineCount = 2;
  found->unifiedAddressing = found->canMapHostMemory = found->concurrentKernels = 1;
  found->streamPrioritiesSupported = found->hostRegisterSupported = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp found;
  if (cudaError_t error = cudaGetDeviceProperties(&found, device)) return error;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = found.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = found.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = found.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = found.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = found.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(found.sharedMemPerBlock); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(found.sharedMemPerBlockOptin);
      break;
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

// Errors

cudaError_t cudaGetLastError() {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last; }

// Memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (cudaError_t error = unsafe()) return error;
  std::lock_guard lock(guard);
  if (bytes > vram() - used[current]) return fail(cudaErrorMemoryAllocation);
  void* found =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  memories[static_cast<char*>(found)] = {bytes, current, true};
  used[current] += bytes;
  *pointer = found;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (cudaError_t error = unsafe()) return error;
  std::lock_guard lock(guard);
  auto found = memories.find(static_cast<char*>(pointer));
  if (found == memories.end() || found->second.device < 0) return fail(cudaErrorInvalidValue);
  used[found->second.device] -= found->second.bytes;
  munmap(pointer, found->second.bytes);
  memories.erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  std::lock_guard lock(guard);
  *total = vram();
  *available = vram() - used[current];
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  if (cudaError_t error = unsafe()) return error;
  void* found =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  std::lock_guard lock(guard);
  memories[static_cast<char*>(found)] = {bytes, -1, true};
  *pointer = found;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  std::lock_guard lock(guard);
  auto found = memories.find(static_cast<char*>(pointer));
  if (found == memories.end()) return fail(cudaErrorInvalidValue);
  munmap(pointer, found->second.bytes);
  memories.erase(found);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  if (cudaError_t error = unsafe()) return error;
  std::lock_guard lock(guard);
  auto* start = static_cast<char*>(pointer);
  auto next = memories.lower_bound(start);
  if (memory_at(pointer) || (next != memories.end() && next->first < start + bytes))
    return fail(cudaErrorHostMemoryAlreadyRegistered);
  memories[start] = {bytes, -1, false};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* pointer) {
  std::lock_guard lock(guard);
  auto found = memories.find(static_cast<char*>(pointer));
  if (found == memories.end() || found->second.mapped) return fail(cudaErrorHostMemoryNotRegistered);
  memories.erase(found);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  std::lock_guard lock(guard);
  if (!memory_at(host)) return fail(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  std::lock_guard lock(guard);
  const Memory* memory = memory_at(pointer);
  std::memset(found, 0, sizeof *found);
  found->device = memory ? memory->device : -2;
  found->type = !memory              ? cudaMemoryTypeUnregistered
                : memory->device < 0 ? cudaMemoryTypeHost
                                     : cudaMemoryTypeDevice;
  if (memory) found->devicePointer = found->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (cudaError_t error = emulated::wait(nullptr)) return error;
  return copy(to, from, bytes, nullptr);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  emulated::put(stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

// Kernels: operators that no CPU stands in for

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  std::fprintf(stderr, "emulated CUDA: a kernel of the GPU's was launched\n");
  return fail(cudaErrorNotSupported);
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaLaunchKernelExC(nullptr, nullptr, nullptr);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  std::memset(found, 0, sizeof *found);
  found->ptxVersion = found->binaryVersion = 10 * CAPABILITY_MAJOR + CAPABILITY_MINOR;
  found->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
// The driver, which PyTorch asks for by its library's name, too: this one's.

int missing_in_driver() { return 801; }  // CUDA_ERROR_NOT_SUPPORTED
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
int cuMemHostGetDevicePointer_v2(void** device, void* host, unsigned flags) {
  return cudaHostGetDevicePointer(device, host, flags) == cudaSuccess ? 0 : 1;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *found = dlsym(RTLD_DEFAULT, name);
  if (!*found) *found = reinterpret_cast<void*>(missing_in_driver);
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"
