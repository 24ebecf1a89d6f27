// Kernels for processors with AVX-512 F, BW, DQ, VL and VNNI, but without VBMI: Cascade Lake, Cooper Lake.
#define UNIT_ISA AVX512_VNNI
#define UNIT_NAME "avx512_vnni"
#define UNIT_KERNELS avx512_vnni_kernels
#define UNIT_SETS "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define UNIT_VBMI 0
#include "avx512_unit.h"
