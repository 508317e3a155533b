// How often AVX-512's dot products run with an operand that is broadcast from memory: what bounds attention and prefill.
//
//     cc -O2 -mavx512f benchmarks/dot_rate.c -o dot_rate && ./dot_rate
//
// Ten independent sums, as many as the kernels have at least; the best of five runs. The clock is that of dependent additions.
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

enum { TIMES = 20000000, SUMS = 10 };

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

#define DOT(name, k, place) name " " #place "(%1)%{1to16%}, %0, %%zmm" #k "\n"
#define TEN(name)                                                                                                  \
    DOT(name, 0, 0) DOT(name, 1, 4) DOT(name, 2, 8) DOT(name, 3, 12) DOT(name, 4, 256) DOT(name, 5, 512)           \
    DOT(name, 6, 768) DOT(name, 7, 1024) DOT(name, 8, 1280) DOT(name, 9, 1536)
#define MEASURE(name)                                                                                              \
    static double rate_of_##name(const uint8_t* memory) {                                                          \
        const __m512i row = _mm512_setzero_si512();                                                                \
        const double started = seconds();                                                                          \
        for (int64_t i = 0; i < TIMES; i++)                                                                        \
            __asm__ volatile(TEN(#name)                                                                            \
                             :                                                                                     \
                             : "v"(row), "r"(memory)                                                               \
                             : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9");    \
        return (seconds() - started) / TIMES / SUMS * 1e9;                                                         \
    }
MEASURE(vdpbf16ps)
MEASURE(vpdpbusd)
MEASURE(vpdpwssd)

static double cycle(const uint8_t* memory) {
    int64_t sum = 0;
    const double started = seconds();
    for (int64_t i = 0; i < 10 * TIMES; i++) __asm__ volatile("add $1, %0" : "+r"(sum) : "r"(memory));
    return (seconds() - started) / (10 * TIMES) * 1e9;
}

static double best(double (*measure)(const uint8_t*), const uint8_t* memory) {
    double least = 1e9;
    for (int again = 0; again < 5; again++) {
        const double ns = measure(memory);
        least = ns < least ? ns : least;
    }
    return least;
}

int main(void) {
    static uint8_t memory[2048];
    const double clock = best(cycle, memory);
    printf("a cycle   %.3f ns, %.2f GHz\n", clock, 1 / clock);
    const struct {
        const char* name;
        double (*measure)(const uint8_t*);
    } all[] = {{"vdpbf16ps", rate_of_vdpbf16ps}, {"vpdpbusd", rate_of_vpdpbusd}, {"vpdpwssd", rate_of_vpdpwssd}};
    for (int i = 0; i < 3; i++) {
        const double ns = best(all[i].measure, memory);
        printf("%-9s %.3f ns each, %.2f a cycle\n", all[i].name, ns, clock / ns);
    }
    return 0;
}
