// Tests of the emulator itself. They compare instructions with plain loops, break rules that must be reported, and run
// kernels without one of their barriers or waits, which must give a wrong result or a report for some order of threads.
//
// Usage: self_test lists the cases; self_test CASE runs one, and says on failure what was expected.
#include <cmath>
#include <cstdio>
#include <iostream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/ptx.cuh"

using namespace trak_fast;

namespace {

constexpr int kSeeds = 40;

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error(what);
}

// Returns the report of a launch; empty if it did not fail.
template <class Launch>
std::string report_of(Launch launch_it) {
  try {
    launch_it();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

template <class Launch>
void expect_report(Launch launch_it, const std::string& part) {
  const std::string report = report_of(launch_it);
  expect(report.find(part) != std::string::npos, "expected '" + part + "', got '" + report + "'");
}

// Returns how many of the seeds gave a wrong result or a report.
template <class Run>
int failures(Run run) {
  int count = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulator_set_seed(static_cast<uint64_t>(seed));
    bool right = false;
    count += report_of([&] { right = run(); }).empty() && right ? 0 : 1;
  }
  return count;
}

// Expects that the correct kernel, run(false_type), passes for every seed and the faulty one, run(true_type), does not.
template <class Run>
void expect_detected(Run run) {
  expect(failures([&] { return run(std::false_type()); }) == 0, "the correct kernel failed");
  const int found = failures([&] { return run(std::true_type()); });
  std::cout << "detected for " << found << " of " << kSeeds << " seeds\n";
  expect(found > 0, "the faulty kernel passed for all seeds");
}

std::vector<uint16_t> random_bf16(size_t n, bool bf16 = true) {
  static std::mt19937 generator(1);
  std::vector<uint16_t> x(n);
  for (uint16_t& e : x) {
    const uint32_t r = generator();
    // Small exponents, so that sums of products are exact in float: any order gives the same bits.
    e = static_cast<uint16_t>((r & 0x8000) |
                              (bf16 ? (126 + r % 3) << 7 | (r >> 16 & 0x70) : (14 + r % 3) << 10 | (r >> 16 & 0x3C0)));
  }
  return x;
}

double value(uint16_t x, bool bf16 = true) {
  const int exponent = bf16 ? x >> 7 & 255 : x >> 10 & 31, bits = bf16 ? 7 : 10;
  const double magnitude = std::ldexp((1 << bits) + (x & ((1 << bits) - 1)), exponent - (bf16 ? 127 : 15) - bits);
  return (x & 0x8000) != 0 ? -magnitude : magnitude;
}

// mma.sync and its helpers -------------------------------------------------------------------------------------------

template <bool bf16>
void mma_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto pair = [](const uint16_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 16; };
  const uint32_t registers[4] = {pair(a + g * 16 + 2 * t), pair(a + (g + 8) * 16 + 2 * t), pair(a + g * 16 + 2 * t + 8),
                                 pair(a + (g + 8) * 16 + 2 * t + 8)};
  float sums[4] = {1, 1, 1, 1};
  ptx::mma_m16n8k16<bf16>(sums, registers, pair(b + g * 16 + 2 * t), pair(b + g * 16 + 2 * t + 8));
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

template <bool bf16>
void test_mma() {
  const auto a = random_bf16(16 * 16, bf16), b = random_bf16(8 * 16, bf16);  // b: 8 columns of 16
  std::vector<float> d(16 * 8);
  launch(mma_kernel<bf16>, 1, 32, 0, nullptr, a.data(), b.data(), d.data());
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) {
      double sum = 1;
      for (int k = 0; k < 16; ++k) sum += value(a[r * 16 + k], bf16) * value(b[c * 16 + k], bf16);
      expect(d[r * 8 + c] == sum, "element " + std::to_string(r) + ", " + std::to_string(c));
    }
  }
}

void ldmatrix_kernel(const uint16_t* from, uint32_t* to, uint32_t* transposed) {
  char* shared = ptx::dynamic_shared();
  for (int i = 0; i < 8; ++i) reinterpret_cast<uint16_t*>(shared)[threadIdx.x * 8 + i] = from[threadIdx.x * 8 + i];
  ptx::block_barrier();
  uint32_t d[4];
  ptx::ldmatrix_x4(d, shared + threadIdx.x * 16);
  for (int i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = d[i];
  transposed[threadIdx.x] = ptx::movmatrix_trans(d[2]);
}

void test_ldmatrix_and_movmatrix() {
  std::vector<uint16_t> from(256);
  for (int i = 0; i < 256; ++i) from[i] = static_cast<uint16_t>(i * 257);
  std::vector<uint32_t> to(128), transposed(32);
  launch(ldmatrix_kernel, 1, 32, 512, nullptr, from.data(), to.data(), transposed.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const uint16_t* p = &from[m * 64 + row * 8 + column];
      expect(to[lane * 4 + m] == (p[0] | static_cast<uint32_t>(p[1]) << 16), "ldmatrix");
    }
    const uint16_t* matrix = &from[2 * 64];
    const uint32_t wanted = matrix[column * 8 + row] | static_cast<uint32_t>(matrix[(column + 1) * 8 + row]) << 16;
    expect(transposed[lane] == wanted, "movmatrix");
  }
}

void test_bits() {
  expect(ptx::permute_bytes(0x33221100, 0x77665544, 0x7250) == 0x77225500, "bytes in order of the selector");
  expect(ptx::permute_bytes(0x80FF7F01, 0, 0xBA98) == 0xFFFF0000, "sign bytes");
  expect(ptx::and_xor(0xF0F0F0F0, 0x3C3C3C3C, 0xFFFF0000) == 0xCFCF3030, "and_xor");
  float low, high;
  ptx::halves_to_floats(low, high, 0x8001BC00);
  expect(low == -1 && high == -0x1p-24F, "halves_to_floats");
}

// TMA, mbarrier, wgmma -----------------------------------------------------------------------------------------------

CUtensorMap tensor_map(const uint16_t* data, uint64_t columns, uint64_t rows, uint64_t stride, uint32_t box_rows) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  TRAK_FAST_CHECK(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  CUtensorMap map;
  const uint64_t sizes[] = {columns, rows}, strides[] = {stride * 2};
  const uint32_t box[] = {64, box_rows}, ones[] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<uint16_t*>(data), sizes, strides, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  expect(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses");
  return map;
}

void box_kernel(const CUtensorMap map, int rows, int x, int y, uint16_t* out) {
  char* shared = ptx::dynamic_shared();
  auto* barrier = reinterpret_cast<uint64_t*>(shared + rows * 128);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, static_cast<uint32_t>(rows * 128));
    ptx::tma_load(shared, &map, barrier, x, y);
    ptx::mbarrier_wait(barrier, 0);
    for (int i = 0; i < rows * 64; ++i) out[i] = reinterpret_cast<uint16_t*>(shared)[i];
  }
}

void test_tma_swizzles_and_fills_with_zeros() {
  constexpr int columns = 100, rows = 13, box_rows = 16;
  alignas(16) static uint16_t data[rows * 104];
  for (int i = 0; i < rows * 104; ++i) data[i] = static_cast<uint16_t>(i + 1);
  const CUtensorMap map = tensor_map(data, columns, rows, 104, box_rows);
  for (const auto& [x, y] : {std::pair{0, 0}, {64, 0}, {-8, 3}, {-104, 0}, {88, -5}, {200, 2}, {0, 13}}) {
    std::vector<uint16_t> out(box_rows * 64);
    launch(box_kernel, 1, 32, box_rows * 128 + 8, nullptr, map, box_rows, x, y, out.data());
    for (int r = 0; r < box_rows; ++r) {
      for (int c = 0; c < 64; ++c) {
        const bool inside = x + c >= 0 && x + c < columns && y + r >= 0 && y + r < rows;
        const int place = r * 64 + (c / 8 ^ r % 8) * 8 + c % 8;
        expect(out[place] == (inside ? data[(y + r) * 104 + x + c] : 0),
               "box at " + std::to_string(x) + ", " + std::to_string(y));
      }
    }
  }
  std::vector<uint16_t> out(box_rows * 64);
  for (const int x : {-100, 1, 90}) {
    expect_report([&] { launch(box_kernel, 1, 32, box_rows * 128 + 8, nullptr, map, box_rows, x, 0, out.data()); },
                  "illegal instruction");
  }
}

// One warpgroup multiplies a (64 x 64, in registers) by b (64 x n, through TMA) in four steps.
enum class Fault { none, no_mbarrier_wait, no_wgmma_wait, early_rewrite, no_fence, no_init_fence, short_expect };

template <int n, bool bf16, Fault fault>
void wgmma_kernel(const CUtensorMap map, const uint16_t* a, float* d) {
  char* shared = ptx::dynamic_shared();
  auto* barrier = reinterpret_cast<uint64_t*>(shared + n * 128);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    if (fault != Fault::no_init_fence) ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, fault == Fault::short_expect ? n * 64 : n * 128);
    ptx::tma_load(shared, &map, barrier, 0, 0);
  }
  ptx::block_barrier();
  const int lane = static_cast<int>(threadIdx.x % 32), g = static_cast<int>(threadIdx.x / 32 * 16) + lane / 4;
  const auto pair = [](const uint16_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 16; };
  if (fault != Fault::no_mbarrier_wait) ptx::mbarrier_wait(barrier, 0);
  float sums[n / 2];
  uint32_t registers[2][4];
  for (int s = 0; s < 4; ++s) {
    auto& r = registers[fault == Fault::early_rewrite ? 0 : s % 2];
    for (int i = 0; i < 4; ++i) r[i] = pair(a + (g + i % 2 * 8) * 64 + 16 * s + lane % 4 * 2 + i / 2 * 8);
    if (fault != Fault::no_fence || s == 0) ptx::wgmma_fence();
    ptx::wgmma_m64k16<n, bf16>(sums, r, ptx::swizzled_descriptor(shared + 32 * s), s > 0);
    ptx::wgmma_commit();
    if (fault != Fault::no_fence) ptx::wgmma_wait<1>();
  }
  if (fault != Fault::no_wgmma_wait) ptx::wgmma_wait<0>();
  for (int i = 0; i < n / 2; ++i) d[(g + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  if (fault == Fault::no_wgmma_wait) ptx::wgmma_wait<0>();
}

template <int n, bool bf16 = true, Fault fault = Fault::none>
bool run_wgmma() {
  const auto a = random_bf16(64 * 64, bf16);
  static std::vector<uint16_t> b;
  b = random_bf16(n * 64, bf16);  // n rows of 64
  std::vector<float> d(64 * n);
  const CUtensorMap map = tensor_map(b.data(), 64, n, 64, n);
  launch(wgmma_kernel<n, bf16, fault>, 1, 128, n * 128 + 8, nullptr, map, a.data(), d.data());
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < n; ++c) {
      double sum = 0;
      for (int k = 0; k < 64; ++k) sum += value(a[r * 64 + k], bf16) * value(b[c * 64 + k], bf16);
      if (d[r * n + c] != sum) return false;
    }
  }
  return true;
}

template <int n>
void test_wgmma() {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    emulator_set_seed(seed);
    expect(run_wgmma<n, true>() && run_wgmma<n, false>(), "wrong product");
  }
}

template <Fault fault>
void expect_wgmma_fault() {
  expect_detected([](auto missing) { return run_wgmma<16, true, decltype(missing)::value ? fault : Fault::none>(); });
}

// Two stages that one thread fills and another empties.
template <bool faulty>
void ring_kernel(const CUtensorMap map, int boxes, uint32_t* out) {
  char* shared = ptx::dynamic_shared();
  auto* full = reinterpret_cast<uint64_t*>(shared + 2 * 1024);
  uint64_t* empty = full + 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, 32);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::block_barrier();
  uint32_t sum = 0;
  for (int i = 0; i < boxes; ++i) {
    const int stage = i % 2;
    const uint32_t parity = static_cast<uint32_t>(i / 2 % 2);
    if (threadIdx.x == 32) {
      if (!faulty) ptx::mbarrier_wait(empty + stage, parity ^ 1);
      ptx::mbarrier_arrive_expect(full + stage, 1024);
      ptx::tma_load(shared + stage * 1024, &map, full + stage, 0, 8 * i);
    } else if (threadIdx.x < 32) {
      ptx::mbarrier_wait(full + stage, parity);
      for (int e = 0; e < 16; ++e) sum += reinterpret_cast<uint16_t*>(shared + stage * 1024)[16 * threadIdx.x + e];
      ptx::mbarrier_arrive(empty + stage);
    }
  }
  if (threadIdx.x < 32) out[threadIdx.x] = sum;
}

template <bool faulty>
bool run_ring() {
  constexpr int boxes = 7;
  static const auto data = random_bf16(boxes * 512);
  uint32_t out[32], wanted = 0, sum = 0;
  launch(ring_kernel<faulty>, 1, 64, 2 * 1024 + 32, nullptr, tensor_map(data.data(), 64, boxes * 8, 64, 8), boxes, out);
  for (const uint16_t e : data) wanted += e;
  for (const uint32_t e : out) sum += e;
  return sum == wanted;
}

void phases_kernel(int* phases) {
  auto* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 3);
  ptx::block_barrier();
  ptx::mbarrier_wait(barrier, 1);  // the phase before the first counts as complete
  ptx::block_barrier();
  for (int phase = 0; phase < 4; ++phase) {
    if (threadIdx.x < 3) {
      ++phases[threadIdx.x];
      ptx::mbarrier_arrive(barrier);
    }
    ptx::mbarrier_wait(barrier, static_cast<uint32_t>(phase % 2));
    for (int i = 0; i < 3; ++i) {
      if (phases[i] < phase + 1) phases[3] = 1;  // someone went on too early
    }
    ptx::block_barrier();
  }
}

void test_mbarrier_phases() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulator_set_seed(seed);
    int phases[4] = {};
    launch(phases_kernel, 1, 32, 8, nullptr, phases);
    expect(phases[0] == 4 && phases[1] == 4 && phases[2] == 4 && phases[3] == 0, "phases");
  }
}

// cp.async and barriers ----------------------------------------------------------------------------------------------

enum class Copy { right, no_wait, no_barrier, no_second_barrier };

// Each thread copies a piece, in each round by copies of another size, and reads another thread's piece, three times
// through the same memory.
template <Copy fault>
void copy_kernel(const uint32_t* from, uint32_t* to) {
  auto* shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  const unsigned me = threadIdx.x, next = (me + 37) % blockDim.x;
  for (int round = 0; round < 3; ++round, from += 4 * blockDim.x, to += 4 * blockDim.x) {
    if (round == 0) {
      ptx::cp_async_16(shared + 4 * me, from + 4 * me, 12);
    } else if (round == 1) {
      ptx::cp_async_narrow<8>(shared + 4 * me, from + 4 * me, 8);
      ptx::cp_async_narrow<8>(shared + 4 * me + 2, from + 4 * me + 2, 4);
    } else {
      for (unsigned i = 0; i < 4; ++i) ptx::cp_async_narrow<4>(shared + 4 * me + i, from + 4 * me + i, i < 3 ? 4 : 0);
    }
    ptx::cp_async_commit();
    if (fault != Copy::no_wait) ptx::cp_async_wait<0>();
    if (fault != Copy::no_barrier) ptx::block_barrier();
    for (unsigned i = 0; i < 4; ++i) to[4 * me + i] = shared[4 * next + i];
    if (fault != Copy::no_second_barrier) ptx::block_barrier();
  }
}

template <Copy fault>
bool run_copy() {
  constexpr int threads = 96;
  alignas(16) static uint32_t from[3 * 4 * threads];
  uint32_t to[3 * 4 * threads];
  for (int i = 0; i < 3 * 4 * threads; ++i) from[i] = static_cast<uint32_t>(i) + 1;
  launch(copy_kernel<fault>, 1, threads, 16 * threads, nullptr, from, to);
  for (int i = 0; i < 3 * 4 * threads; ++i) {
    const int round = i / (4 * threads), piece = (i / 4 % threads + 37) % threads;
    if (to[i] != (i % 4 == 3 ? 0 : from[(round * threads + piece) * 4 + i % 4])) return false;
  }
  return true;
}

template <Copy fault>
void expect_copy_fault() {
  expect_detected([](auto missing) { return run_copy<decltype(missing)::value ? fault : Copy::right>(); });
}

// Reports ------------------------------------------------------------------------------------------------------------

template <class Body>
void body_kernel(Body body) {
  body();
}
template <class Body>
void expect_kernel_report(int threads, const std::string& part, Body body) {
  expect_report([&] { launch(body_kernel<Body>, 1, threads, 1024, nullptr, body); }, part);
}

void test_reports() {
  expect_kernel_report(64, "deadlock: 0-31 has ended; 32-63 waits at bar.sync", [] {
    if (threadIdx.x >= 32) ptx::block_barrier();
  });
  expect_kernel_report(32, "where its warp is at", [] {
    uint32_t d[4];
    if (threadIdx.x < 16) ptx::ldmatrix_x4(d, ptx::dynamic_shared());
    ptx::movmatrix_trans(0);
  });
  expect_kernel_report(32, "ldmatrix at a misaligned address", [] {
    uint32_t d[4];
    ptx::ldmatrix_x4(d, ptx::dynamic_shared() + 8);
  });
  expect_kernel_report(32, "cp.async outside of shared memory, at byte 1016 of 1024",
                       [] { ptx::cp_async_16(ptx::dynamic_shared() + 1016, nullptr, 0); });
  expect_kernel_report(32, "cp.async from a misaligned address", [] {
    alignas(8) static const char from[12] = {};
    ptx::cp_async_narrow<8>(ptx::dynamic_shared(), from + 4, 8);
  });
  expect_kernel_report(32, "mbarrier used before it was initialised",
                       [] { ptx::mbarrier_arrive(reinterpret_cast<uint64_t*>(ptx::dynamic_shared())); });
  expect_kernel_report(32, "more arrivals than it was initialised for", [] {
    auto* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(barrier, 2);
      ptx::mbarrier_arrive_expect(barrier, 64);
      ptx::mbarrier_arrive(barrier);
      ptx::mbarrier_arrive(barrier);
    }
  });
  expect_kernel_report(32, "mbarrier was overwritten", [] {
    auto* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
    if (threadIdx.x != 0) return;
    ptx::mbarrier_init(barrier, 1);
    *barrier = 0;
    ptx::mbarrier_arrive(barrier);
  });
  expect_kernel_report(128, "where its warpgroup is at", [] {
    if (threadIdx.x < 64) ptx::wgmma_fence();
    ptx::wgmma_commit();
  });
  expect_kernel_report(128, "not all threads of a warpgroup came to wgmma.fence", [] {
    if (threadIdx.x < 64) ptx::wgmma_fence();
  });
  expect_kernel_report(256, "at most 65536 registers", [] {
    if (threadIdx.x < 128) {
      ptx::increase_registers<256>();
    }
  });
  const auto wide = [] {};
  expect_report([&] { launch(body_kernel<decltype(wide)>, 1, 1056, 0, nullptr, wide); }, "invalid configuration");
  expect_report([&] { launch(body_kernel<decltype(wide)>, dim3(1, 65536), 32, 0, nullptr, wide); }, "invalid config");
  expect_report([&] { launch(body_kernel<decltype(wide)>, 1, 32, 228 << 10, nullptr, wide); }, "invalid argument");
  emulator_set_device(1, 86, 4);
  expect_report([&] { launch(body_kernel<decltype(wide)>, 1, 32, 100 << 10, nullptr, wide); }, "invalid argument");
  expect_kernel_report(128, "wgmma.fence on a device that is not 9.0", [] { ptx::wgmma_fence(); });
  emulator_set_device(1, 90, 4);
  expect(report_of([&] { launch(body_kernel<decltype(wide)>, 1, 32, 227 << 10, nullptr, wide); }).empty(),
         "a launch after failed ones");
}

template <int n, Fault fault>
void expect_wgmma_report(const std::string& part) {
  expect_report([] { run_wgmma<n, true, fault>(); }, part);
}

void test_wgmma_reports() {
  expect_wgmma_report<16, Fault::early_rewrite>("operand registers were written while a wgmma read them");
  expect_wgmma_report<16, Fault::no_fence>("no wgmma.fence since its operand registers were written");
  expect_wgmma_report<16, Fault::no_init_fence>("initialisation was not fenced");
  expect_wgmma_report<16, Fault::short_expect>("deadlock");
}

void test_tensor_map_requirements() {
  alignas(16) static uint16_t data[64];
  struct Case {
    uint64_t misalignment, columns, stride_bytes;
    uint32_t box_columns, box_rows, element_stride;
  };
  const auto encode = [&](const Case& c) {
    CUtensorMap map;
    const uint64_t sizes[] = {c.columns, 1}, strides[] = {c.stride_bytes};
    const uint32_t box[] = {c.box_columns, c.box_rows}, steps[] = {c.element_stride, 1};
    return cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, data + c.misalignment, sizes, strides, box,
                                  steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  constexpr uint64_t far = uint64_t{1} << 32;
  expect(encode({0, 64, 128, 64, 256, 1}) == CUDA_SUCCESS, "a good one");
  expect(encode({0, far, 2 * far, 64, 256, 1}) == CUDA_SUCCESS, "the largest");
  for (const Case& c : {Case{4, 64, 128, 64, 8, 1},
                        {0, 0, 128, 64, 8, 1},
                        {0, far + 1, 4 * far, 64, 8, 1},
                        {0, 64, 136, 64, 8, 1},
                        {0, 64, uint64_t{1} << 40, 64, 8, 1},
                        {0, 64, 128, 128, 8, 1},
                        {0, 64, 128, 64, 257, 1},
                        {0, 64, 128, 64, 0, 1},
                        {0, 64, 128, 64, 8, 2}}) {
    expect(encode(c) == CUDA_ERROR_INVALID_VALUE, "a bad one was taken");
  }
}

const std::map<std::string, void (*)()> cases = {
    {"bits", test_bits},
    {"mma_bf16", test_mma<true>},
    {"mma_fp16", test_mma<false>},
    {"ldmatrix_and_movmatrix", test_ldmatrix_and_movmatrix},
    {"tma_swizzles_and_fills_with_zeros", test_tma_swizzles_and_fills_with_zeros},
    {"tensor_map_requirements", test_tensor_map_requirements},
    {"mbarrier_phases", test_mbarrier_phases},
    {"wgmma_8", test_wgmma<8>},
    {"wgmma_64", test_wgmma<64>},
    {"wgmma_256", test_wgmma<256>},
    {"reports", test_reports},
    {"wgmma_reports", test_wgmma_reports},
    {"missing_barrier", expect_copy_fault<Copy::no_barrier>},
    {"missing_barrier_before_the_next_round", expect_copy_fault<Copy::no_second_barrier>},
    {"missing_cp_async_wait", expect_copy_fault<Copy::no_wait>},
    {"missing_mbarrier_wait", expect_wgmma_fault<Fault::no_mbarrier_wait>},
    {"missing_wgmma_wait", expect_wgmma_fault<Fault::no_wgmma_wait>},
    {"missing_wait_for_an_empty_stage",
     [] { expect_detected([](auto missing) { return run_ring<decltype(missing)::value>(); }); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    for (const auto& [name, run] : cases) std::cout << name << "\n";
    return 0;
  }
  try {
    cases.at(argv[1])();
  } catch (const std::exception& error) {
    std::cout << argv[1] << ": " << error.what() << "\n";
    return 1;
  }
  return 0;
}
