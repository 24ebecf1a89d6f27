// Kernels for processors with AVX-512 F, BW, DQ, VL, VNNI and VBMI: Ice Lake, Zen 4 and later ones.
#define UNIT_ISA AVX512
#define UNIT_NAME "avx512"
#define UNIT_KERNELS avx512_kernels
#define UNIT_SETS "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"
#define UNIT_VBMI 1
#include "avx512_unit.h"
