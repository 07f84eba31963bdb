// Kernels with one fault each, for test_sass.py.
#include <cstdint>
#include <cuda_runtime.h>

struct Args {
  const char* z[8];
  float w[8];
  int dtype[8], models, groups;
  float* out;
};

#define EFT_DEVICE static __device__ __forceinline__
#define EFT_KERNEL static __global__ __launch_bounds__(256)

EFT_DEVICE float from_bits(uint32_t b) { return __uint_as_float(b); }
EFT_DEVICE uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
EFT_DEVICE int first_group() { return blockIdx.x * 8 + threadIdx.x / 32; }
EFT_DEVICE int step() { return gridDim.x * 8; }

template <int D>  // 0: bf16, 1: f32
EFT_DEVICE void widen(const uint4& v, float* z) {
  const uint32_t x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (D == 1) {
      z[i] = from_bits(x[i]);  // sass: f32
    } else {
      // sass: bf16
      z[2 * i] = from_bits(x[i] << 16);
      z[2 * i + 1] = from_bits(x[i] & 0xFFFF0000u);
      // sass: end
    }
  }
}

template <int N>
EFT_DEVICE float largest(const float (&s)[N]) {
  float best = s[0];
#pragma unroll
  for (int i = 1; i < N; ++i) best = fmaxf(best, s[i]);
  return best;
}

// a loop over models, with a branch for each type
EFT_KERNEL void good_kernel(Args a) {
  float best = -1e30f;
  // sass: group 512 tokens
  for (int g = first_group(); g < a.groups; g += step()) {
    float s[16] = {};
    // sass: model
#pragma unroll 1
    for (int j = 0; j < a.models; ++j) {
      float z[16];
      const float w = a.w[j];
      if (a.dtype[j] == 0) {
        // sass: bf16
        const char* p = a.z[j] + g * 1024ll + threadIdx.x % 32 * 32;
        widen<0>(load16(p), z);
        widen<0>(load16(p + 16), z + 8);
        // sass: end
      } else {
        // sass: f32
        const char* p = a.z[j] + g * 2048ll + threadIdx.x % 32 * 64;
#pragma unroll
        for (int i = 0; i < 4; ++i) widen<1>(load16(p + 16 * i), z + 4 * i);
#pragma unroll
        for (int i = 0; i < 64; ++i) z[i % 16] = fmaxf(z[i % 16] * 3.0f, w);  // longer than the branch of bf16
        // sass: end
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) s[i] = s[i] + w * z[i];
    }
    // sass: end
    const float high = largest(s);
    if (high > best + 3) {
      // sass: rare
      for (int i = 0; i < 16; ++i) a.out[g * 16 + i] = s[i];
      // sass: end
    }
    best = fmaxf(best, high);
  }
  // sass: end
  a.out[blockIdx.x * 256 + threadIdx.x] = best;
}

// four models at most, their loads first; a loop for each type
template <int D>
EFT_DEVICE float ahead(const Args& a) {
  constexpr int N = D ? 8 : 16;
  float best = -1e30f;
  // sass: group ahead 512 tokens
  for (int g = first_group(); g < a.groups; g += step()) {
    uint4 v[4][2];
    float s[N] = {};
    // sass: model
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < a.models) {
        const char* p = a.z[j] + g * 1024ll + threadIdx.x % 32 * 16;
        v[j][0] = load16(p), v[j][1] = load16(p + 512);
      }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < a.models) {
        float z[N];
        widen<D>(v[j][0], z), widen<D>(v[j][1], z + N / 2);
#pragma unroll
        for (int i = 0; i < N; ++i) s[i] = s[i] + a.w[j] * z[i];
      }
    // sass: end
    best = fmaxf(best, largest(s));
  }
  // sass: end
  return best;
}
EFT_KERNEL void ahead_kernel(Args a) { a.out[blockIdx.x * 256 + threadIdx.x] = a.dtype[0] ? ahead<1>(a) : ahead<0>(a); }

// a group for each warp, three models, no loop
EFT_KERNEL void once_kernel(Args a) {
  const float scale = a.w[4] + a.w[5];
  // sass: group once 256 tokens
  float s[8] = {};
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    float z[8];
    widen<0>(load16(a.z[j] + first_group() * 512ll + threadIdx.x % 32 * 16), z);
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = s[i] + a.w[j] * z[i];
  }
  const float best = largest(s);
  // sass: end
  a.out[blockIdx.x * 256 + threadIdx.x] = best * scale;
}

EFT_KERNEL void works_kernel(Args a) {
  float best = -1e30f;
  // sass: group 256 tokens
  for (int g = first_group(); g < a.groups; g += step()) {
    float s[8] = {};
#pragma unroll 1
    for (int j = 0; j < a.models; ++j) {  // sass: model
      float z[8];
      widen<0>(load16(a.z[j] + g * 512ll + threadIdx.x % 32 * 16), z);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int k = 0; k < 8; ++k) z[i] = z[i] * a.w[k] + 0.25f;
        s[i] = s[i] + z[i];
      }
    }
    best = fmaxf(best, largest(s));
  }
  // sass: end
  a.out[blockIdx.x * 256 + threadIdx.x] = best;
}

EFT_KERNEL void narrow_kernel(Args a) {
  float best = -1e30f;
  // sass: group 256 tokens
  for (int g = first_group(); g < a.groups; g += step()) {
    float s[8] = {};
#pragma unroll
    for (int j = 0; j < 3; ++j)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const char* p = a.z[j] + 2 * (g * 256ll + threadIdx.x % 32 + 32 * i);
        s[i] = s[i] + a.w[j] * from_bits(__ldg(reinterpret_cast<const uint16_t*>(p)) << 16);
      }
    best = fmaxf(best, largest(s));
  }
  // sass: end
  a.out[blockIdx.x * 256 + threadIdx.x] = best;
}

EFT_KERNEL void nested_kernel(Args a) {
  float best = -1e30f;
  // sass: group 256 tokens
  for (int g = first_group(); g < a.groups; g += step()) {
    float z[8];
    widen<0>(load16(a.z[0] + g * 512ll + threadIdx.x % 32 * 16), z);
#pragma unroll 1
    for (int i = 0; i < a.models; ++i) best = fmaxf(best * a.w[i], largest(z));
  }
  // sass: end
  a.out[blockIdx.x * 256 + threadIdx.x] = best;
}

static __global__ __launch_bounds__(1024, 2) void spills_kernel(Args a) {
  float s[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) s[i] = a.out[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 48; ++i) a.out[threadIdx.x * 48 + i] = s[i] * s[(i * 7 + 5) % 48];
}

EFT_KERNEL void local_kernel(Args a, int at) {
  float s[64] = {};
  for (int i = 0; i < a.models; ++i) s[(at + i * threadIdx.x) % 64] += a.out[i];
  for (int i = 0; i < a.models; ++i) a.out[threadIdx.x + i] = s[(at * i) % 64];
}

EFT_KERNEL void fma_kernel(Args a) { a.out[threadIdx.x] = fmaf(a.out[threadIdx.x + 1], a.w[0], a.w[1]); }

static __device__ __noinline__ float fused(float a, float b) { return fmaf(a, b, 1.0f) + sqrtf(a); }
EFT_KERNEL void called_kernel(Args a) { a.out[threadIdx.x] = fused(a.out[threadIdx.x], a.out[threadIdx.x + 256]); }

EFT_KERNEL void allowed_kernel(Args a) {
  a.out[threadIdx.x] = fmaf(a.out[threadIdx.x + 1], a.w[0], a.w[1]);  // sass: fma
}

EFT_KERNEL void exp_kernel(Args a) { a.out[threadIdx.x] = expf(a.out[threadIdx.x]); }

// made of multiply-adds, all of them the compiler's; the last two operations are a contraction with -fmad=true
EFT_KERNEL void division_kernel(Args a, double* d, unsigned long long* u, int n) {
  const int i = threadIdx.x;
  a.out[i] = a.out[i] / a.w[0];
  d[i] = d[i] / d[i + 256] + sqrt(d[i + 512]);
  a.out[i + 256] = sqrtf(a.out[i + 256]) + 1.0f / a.w[1];
  u[i] = u[i] / static_cast<unsigned>(n) + static_cast<unsigned long long>(a.w[2]);
  a.out[i + 768] = static_cast<float>(u[i + 256]) + static_cast<float>(d[i + 768]);
  a.out[i + 512] = a.out[i + 512] * a.w[3] + a.w[4];
}

void all(Args a, double* d, unsigned long long* u) {
  good_kernel<<<1, 256>>>(a);
  ahead_kernel<<<1, 256>>>(a);
  once_kernel<<<1, 256>>>(a);
  works_kernel<<<1, 256>>>(a);
  narrow_kernel<<<1, 256>>>(a);
  nested_kernel<<<1, 256>>>(a);
  spills_kernel<<<1, 1024>>>(a);
  local_kernel<<<1, 256>>>(a, 1);
  fma_kernel<<<1, 256>>>(a);
  called_kernel<<<1, 256>>>(a);
  allowed_kernel<<<1, 256>>>(a);
  exp_kernel<<<1, 256>>>(a);
  division_kernel<<<1, 256>>>(a, d, u, 1);
}
