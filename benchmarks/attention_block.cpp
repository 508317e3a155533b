// What attention's arithmetic takes of one core: a decoded token's 16 query heads over a KV head of 128, for each 64
// positions, where the rows lie in the second-level cache and where they come from memory.
//
//     c++ -std=c++17 -O3 -fno-math-errno -fno-trapping-math -march=native -I glm4run/kernels/cpu/src \
//         benchmarks/attention_block.cpp -o attention_block && taskset -c 1 ./attention_block
//
// Needs AVX-512 with VNNI and BF16. The best of five runs each.
#include "kernels_avx512_bf16.cpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <vector>

namespace {

constexpr int64_t HEADS = 16, WIDTH = 128, BLOCK = 64;

double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

// Nanoseconds for each block of 64 positions, over `positions` of `bits` bits.
double block_ns(int64_t positions, int bits) {
    std::mt19937 random(1);
    std::vector<uint8_t> keys(positions * WIDTH * bits / 8), values(keys.size());
    std::vector<uint16_t> scales(positions, float_to_half(0.01f)), query(HEADS * WIDTH);
    std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
    const auto fill = [&](std::vector<uint8_t>& rows) {
        if (bits == 8)
            for (uint8_t& value : rows) value = static_cast<uint8_t>(static_cast<int>(random() % 255) - 127);
        else
            for (size_t i = 0; i < rows.size(); i += 2) {
                const uint16_t value = to_bf16(unit(random));
                std::memcpy(&rows[i], &value, 2);
            }
    };
    fill(keys);
    fill(values);
    for (uint16_t& value : query) value = to_bf16(unit(random));
    const auto rows = [&](const std::vector<uint8_t>& data, Order order) {
        const auto* side = bits == 8 ? reinterpret_cast<const uint8_t*>(scales.data()) : nullptr;
        return CacheRows{data.data(), side, WIDTH, bits == 8 ? WIDTH : 0, bits, G4_BF16, order};
    };
    AttentionRows attention{};
    attention.query = query.data();
    attention.query_token = HEADS * WIDTH;
    attention.query_head = WIDTH;
    attention.keys = rows(keys, Order::KEYS);
    attention.values = rows(values, Order::VALUES);
    attention.heads = HEADS;
    attention.seen = positions;
    attention.dtype = G4_BF16;
    attention.scale = 0.0884f;
    auto* scratch = static_cast<float*>(std::aligned_alloc(64, (attend_scratch(WIDTH, 1) * 4 + 63) / 64 * 64));
    auto* out = static_cast<float*>(std::aligned_alloc(64, HEADS * (WIDTH + 2) * 4 + 64 * 4));
    const int64_t times = std::max<int64_t>(1, 100000 * BLOCK / positions);
    double best = 1e9;
    for (int again = 0; again < 5; again++) {
        const double started = seconds();
        for (int64_t i = 0; i < times; i++) attend(attention, 0, 1, 0, positions, scratch, out);
        best = std::min(best, (seconds() - started) / times / (positions / BLOCK) * 1e9);
    }
    std::free(scratch);
    std::free(out);
    return best;
}

} // namespace

int main() {
    for (const int bits : {8, 16})
        for (const int64_t positions : {512, 1024, 2048, 32768, 262144})
            std::printf("%2d bits, %6ld positions, %7.2f MB: %.0f ns a block\n", bits, positions,
                        2e-6 * positions * WIDTH * bits / 8, block_ns(positions, bits));
    return 0;
}
