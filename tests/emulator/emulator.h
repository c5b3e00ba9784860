// An emulated GPU for tests on machines without one: the functions that cuda_runtime.h and ptx_host.h call.
//
// Each CUDA thread is a fiber with a stack of its own; blocks run one after another, in one thread of the operating
// system. Threads change places where they meet, and now and then at any wrapper of ptx_host.h. A seed decides which
// thread goes first and when asynchronous work (cp.async, TMA, wgmma) is done, within the limits that the waits set, so
// that a missing barrier or wait shows as a wrong result for some seed. Values in flight read as NaN. Rules of the
// instructions are checked as far as they can be: a violation, like a deadlock, ends the launch with
// cudaErrorLaunchFailure and a report.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct cudaLaunchConfig_t;
struct CUtensorMap;
enum cudaError_t : int;

namespace trak_fast {
namespace emulator {

cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);

// Ends the launch with this report.
[[noreturn]] void fail(const std::string& what);

// Lets other threads or the copy engine go on, now and then.
void pause();

// Return the block's dynamic shared memory, and the address that the device would have for a place in it.
char* shared_memory();
uint32_t shared_address(const void* p);
// Fails unless [p, p + bytes) lies in shared memory and p is aligned.
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what);

void meet_block();

void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_fence();
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);

void copy_async(void* shared, const void* global, int bytes, int valid);
void commit_copies();
void wait_copies(int groups);
void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int32_t x, int32_t y);

// All lanes of the warp meet here; the last one to arrive performs the instruction on all lanes' operands.
void meet_warp(const char* what, void* operands, void (*perform)(void* const* operands_of_lanes));

// All threads of a warpgroup execute the same sequence of these. `what` and `argument` must agree.
void meet_warpgroup(const char* what, uint64_t argument);
void wgmma(int n, bool bf16, float* d, const uint32_t* a, uint64_t b, int accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);
void set_registers(int count);

// Computes c (rows x columns) = a (rows x 16) b (16 x columns) in float, adding the exact products in order of k.
void multiply_16(int rows, int columns, const float* a, const float* b, float* c);
float bf16_or_fp16_to_float(bool bf16, uint32_t bits);

}  // namespace emulator
}  // namespace trak_fast

// For tests, also through ctypes: the seed of all draws, and the properties of the device.
extern "C" {
void emulator_set_seed(uint64_t seed);
void emulator_set_idle(int idle);  // if not 0, launches are only counted
void emulator_set_device(int count, int compute_capability, int multiprocessors);  // 90 for 9.0
// Returns how often an instruction ("mma", "wgmma", "tma", "cp.async", "block") was performed since the last call.
int64_t emulator_count(const char* what);
}
