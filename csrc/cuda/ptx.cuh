// Every instruction that the kernels use by name: one wrapper each, and no asm anywhere else.
//
// The kernels' source also compiles as ordinary C++, for tests on machines without a GPU. Then TRAK_FAST_EMULATE is
// defined, and tests/emulator/ptx_host.h declares the same functions with their meaning spelled out; a function is
// performed when all threads that take part have arrived. So a kernel body may use these wrappers, plain C++ and the
// functions of launch.cuh, and nothing else of CUDA.
//
// Shared memory is addressed by ordinary pointers; the wrappers convert them. All 32 threads of a warp, or all 128 of a
// warpgroup, must call the functions that are said to be of a warp or of a warpgroup.
#pragma once
#include <cstdint>

#ifdef TRAK_FAST_EMULATE
#include <ptx_host.h>
#else
#include <cuda.h>

namespace trak_fast {
namespace ptx {

using TensorMap = CUtensorMap;

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char trak_fast_dynamic_shared[];
  return trak_fast_dynamic_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Registers and bits -------------------------------------------------------------------------------------------------

// Returns (a & b) ^ c, in one operation.
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Returns x, and hides from the compiler that it does: a constant stays in a register, and values that depend on x are
// computed here, not kept from before.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Returns four bytes of the pair a (bytes 0..3), b (bytes 4..7), chosen by the four nibbles of `selector`. A nibble
// with its high bit set gives the byte's sign bit eight times.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Returns a and b (finite) rounded to the nearest bf16, ties to even; a in the low half.
__device__ __forceinline__ uint32_t round_to_bf16(float a, float b) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  return d;
}

// Sets low and high to the two fp16 of a pair, exactly.
__device__ __forceinline__ void halves_to_floats(float& low, float& high, uint32_t pair) {
  asm("{\n"
      ".reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.f32.f16 %0, l;\n"
      "cvt.f32.f16 %1, h;\n"
      "}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

// Barriers -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void block_barrier() { asm volatile("bar.sync 0;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised mbarriers visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for `bytes` of copies, too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits for the phase of this parity to complete.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Waits like mbarrier_wait, but ends the kernel with an error if the phase has not completed after two seconds: a
// mistake about barriers or copies then costs one context, not a device that hangs. The error is a store to address 0:
// with a trap in a kernel, ptxas keeps descriptors out of the uniform registers in all its warps (17.0 instead of 13.7
// instructions a piece, 10 to 15 % slower on an H100).
__device__ __forceinline__ void mbarrier_wait_or_fail(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done, late;\n"
      ".reg .u64 begin, now, nowhere;\n"
      "mov.u64 nowhere, 0;\n"
      "mov.u64 begin, %%globaltimer;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "mov.u64 now, %%globaltimer;\n"
      "sub.u64 now, now, begin;\n"
      "setp.gt.u64 late, now, 2000000000;\n"
      "@late st.global.u64 [nowhere], nowhere;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies to shared memory --------------------------------------------------------------------------------------------

// Starts a copy of 16 bytes: the first `valid` (0..16) come from global memory, the rest are zeros.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}

// Likewise for 4 or 8 bytes.
template <int bytes>
__device__ __forceinline__ void cp_async_narrow(void* shared, const void* global, int valid) {
  static_assert(bytes == 4 || bytes == 8, "16 bytes have an instruction of their own");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(bytes),
               "r"(valid)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most n of this thread's committed groups are under way.
template <int n>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts the copy of a box of a two-dimensional tensor. The box's first element is (x, y), x along the contiguous
// dimension; elements outside of the tensor are zeros. The mbarrier counts the box's bytes.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// mma.sync -----------------------------------------------------------------------------------------------------------

// Loads four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and gets
// elements 2 (l % 4) and the next of row l / 4 of each matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// Returns the transpose of an 8 x 8 matrix of 16-bit elements, held as one register a lane.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t a) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// Adds a (16 x 16) times b (16 x 8) to d (16 x 8, four floats a lane). The elements of a and b are bf16 or fp16.
template <bool bf16>
__device__ __forceinline__ void mma_m16n8k16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// wgmma (warpgroup) --------------------------------------------------------------------------------------------------

// Orders the warpgroup's register accesses before its next wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most n committed groups are under way.
template <int n>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

// Keeps the compiler from moving uses of d across this point: a wgmma changes it behind the compiler's back.
template <int size>
__device__ __forceinline__ void wgmma_operand(float (&d)[size]) {
#pragma unroll
  for (int i = 0; i < size; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Likewise for registers that a wgmma reads until it is waited for.
__device__ __forceinline__ void wgmma_operand(uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}

// Set how many registers a thread of this warpgroup may use from here on.
template <int count>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

#define TRAK_FAST_REGISTERS_4 "%0, %1, %2, %3"
#define TRAK_FAST_REGISTERS_8 \
  TRAK_FAST_REGISTERS_4       \
  ", %4, %5, %6, %7"
#define TRAK_FAST_REGISTERS_16 \
  TRAK_FAST_REGISTERS_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TRAK_FAST_REGISTERS_32 \
  TRAK_FAST_REGISTERS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TRAK_FAST_REGISTERS_64                                                       \
  TRAK_FAST_REGISTERS_32                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TRAK_FAST_REGISTERS_128                                                                  \
  TRAK_FAST_REGISTERS_64                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TRAK_FAST_OPERANDS_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define TRAK_FAST_OPERANDS_8(i) TRAK_FAST_OPERANDS_4(i), TRAK_FAST_OPERANDS_4((i) + 4)
#define TRAK_FAST_OPERANDS_16(i) TRAK_FAST_OPERANDS_8(i), TRAK_FAST_OPERANDS_8((i) + 8)
#define TRAK_FAST_OPERANDS_32(i) TRAK_FAST_OPERANDS_16(i), TRAK_FAST_OPERANDS_16((i) + 16)
#define TRAK_FAST_OPERANDS_64(i) TRAK_FAST_OPERANDS_32(i), TRAK_FAST_OPERANDS_32((i) + 32)
#define TRAK_FAST_OPERANDS_128(i) TRAK_FAST_OPERANDS_64(i), TRAK_FAST_OPERANDS_64((i) + 64)

// One instruction. Its operands are %0.. for d, then four registers of a, the descriptor, and the flag `accumulate`.
#define TRAK_FAST_WGMMA(n, type, size, a0, a1, a2, a3, descriptor, add)                               \
  asm volatile(                                                                                       \
      "{\n"                                                                                           \
      ".reg .pred add;\n"                                                                             \
      "setp.ne.b32 add, %" #add                                                                       \
      ", 0;\n"                                                                                        \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" TRAK_FAST_REGISTERS_##size \
      "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #descriptor                                    \
      ", add, 1, 1, 0;\n"                                                                             \
      "}"                                                                                             \
      : TRAK_FAST_OPERANDS_##size(0)                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)                           \
      : "memory")

// Starts d (64 x n, float) = a (64 x 16, in registers) b (16 x n, in shared memory), plus d if accumulate. The elements
// of a and b are bf16 or fp16. b: descriptor of n rows of 16 elements, see swizzled_descriptor. a and d must stay
// untouched until the wgmma is waited for.
template <int n, bool bf16>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  if constexpr (n == 8) {
    if constexpr (bf16) {
      TRAK_FAST_WGMMA(8, "bf16", 4, 4, 5, 6, 7, 8, 9);
    } else {
      TRAK_FAST_WGMMA(8, "f16", 4, 4, 5, 6, 7, 8, 9);
    }
  } else if constexpr (n == 16) {
    if constexpr (bf16) {
      TRAK_FAST_WGMMA(16, "bf16", 8, 8, 9, 10, 11, 12, 13);
    } else {
      TRAK_FAST_WGMMA(16, "f16", 8, 8, 9, 10, 11, 12, 13);
    }
  } else if constexpr (n == 32) {
    if constexpr (bf16) {
      TRAK_FAST_WGMMA(32, "bf16", 16, 16, 17, 18, 19, 20, 21);
    } else {
      TRAK_FAST_WGMMA(32, "f16", 16, 16, 17, 18, 19, 20, 21);
    }
  } else if constexpr (n == 64) {
    if constexpr (bf16) {
      TRAK_FAST_WGMMA(64, "bf16", 32, 32, 33, 34, 35, 36, 37);
    } else {
      TRAK_FAST_WGMMA(64, "f16", 32, 32, 33, 34, 35, 36, 37);
    }
  } else if constexpr (n == 128) {
    if constexpr (bf16) {
      TRAK_FAST_WGMMA(128, "bf16", 64, 64, 65, 66, 67, 68, 69);
    } else {
      TRAK_FAST_WGMMA(128, "f16", 64, 64, 65, 66, 67, 68, 69);
    }
  } else if constexpr (n == 256) {
    if constexpr (bf16) {
      TRAK_FAST_WGMMA(256, "bf16", 128, 128, 129, 130, 131, 132, 133);
    } else {
      TRAK_FAST_WGMMA(256, "f16", 128, 128, 129, 130, 131, 132, 133);
    }
  } else {
    static_assert(n == 8, "no wgmma of this width is used");
  }
}

#undef TRAK_FAST_WGMMA
#endif

}  // namespace ptx
}  // namespace trak_fast
#endif

// The same on both sides ---------------------------------------------------------------------------------------------

namespace trak_fast {
namespace ptx {

// Returns the descriptor of rows of 128 bytes, swizzled in groups of eight as in the copy engine's 128-byte mode, the
// groups back to back. `shared` points to the first of the 16 elements within row 0; row 0 is aligned to 1024 bytes.
__device__ __forceinline__ uint64_t swizzled_descriptor(const void* shared) {
  const uint64_t start = (shared_address(shared) & 0x3FFFF) >> 4, group_stride = 1024 >> 4, swizzle_128 = 1;
  return start | uint64_t{1} << 16 | group_stride << 32 | swizzle_128 << 62;
}

}  // namespace ptx
}  // namespace trak_fast
