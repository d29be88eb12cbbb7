// What a block of a cooperative launch may see of the others' writes, at worst: nothing but what they had published by
// a fence before this block's own last fence. A block's cache holds all of memory and only its fence flushes it; its
// stores reach the others at its fence and not before. Volatile reads and atomics go past the cache, as to L2.
//
// The kernels are compiled with GCC's hooks for ThreadSanitizer, which call the functions at the end of this file
// before each access; there is no ThreadSanitizer behind them. Memory itself always is what the running block sees: the
// others' views are kept aside and changed for one another as the scheduler changes blocks.
//
// It also aborts where a read-only load touches what the same launch wrote, by whatever block: the caches that such
// loads go through are never made coherent.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

namespace {

using Bytes = std::vector<uint8_t>;

struct Region {
    uint8_t* base = nullptr;
    Bytes shared;                // what all blocks see after a fence
    Bytes written;               // 1: by this launch
    std::vector<Bytes> view, dirty;  // of each block: what it sees, and which bytes it has not published
    bool touched = false;        // by a write of this launch; until then all views are memory
};

std::map<uint8_t*, Region> regions;  // by address
int running = -1;                    // the block whose view memory is; -1: no cooperative launch
int blocks = 0;
bool launched = false;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "memory model: %s\n", what);
    std::abort();
}

Region* region_of(const void* at) {
    auto found = regions.upper_bound(static_cast<uint8_t*>(const_cast<void*>(at)));
    if (found == regions.begin()) return nullptr;
    Region& region = (--found)->second;
    return static_cast<const uint8_t*>(at) < region.base + region.shared.size() ? &region : nullptr;
}

void begin_region(Region& region) {
    const size_t bytes = region.shared.size();
    std::memcpy(region.shared.data(), region.base, bytes);
    region.view.assign(blocks, region.shared);
    region.dirty.assign(blocks, Bytes(bytes, 0));
    region.touched = true;
}

void before_write(void* at, size_t bytes) {
    Region* region = launched ? region_of(at) : nullptr;
    if (!region) return;
    const size_t first = static_cast<uint8_t*>(at) - region->base;
    if (running >= 0) {
        if (!region->touched) begin_region(*region);
        std::memset(region->dirty[running].data() + first, 1, bytes);
    }
    std::memset(region->written.data() + first, 1, bytes);
}

void publish(Region& region, int block) {
    Bytes& dirty = region.dirty[block];
    for (size_t i = 0; i < dirty.size(); ++i) {
        if (dirty[i]) region.shared[i] = region.base[i], dirty[i] = 0;
    }
}

// Before a read that goes past the cache, where this block has no store of its own under way.
void before_uncached(void* at, size_t bytes) {
    Region* region = running >= 0 ? region_of(at) : nullptr;
    if (!region || !region->touched) return;
    const size_t first = static_cast<uint8_t*>(at) - region->base;
    for (size_t i = first; i < first + bytes; ++i) {
        if (!region->dirty[running][i]) region->base[i] = region->shared[i];
    }
}

}  // namespace

extern "C" {

void model_allocated(void* base, size_t bytes) {
    Region region;
    region.base = static_cast<uint8_t*>(base);
    region.shared.resize(bytes), region.written.resize(bytes);
    regions[region.base] = region;
}

void model_freed(void* base) { regions.erase(static_cast<uint8_t*>(base)); }

void model_begin(int count, int together) {
    launched = true, blocks = count, running = together ? 0 : -1;
    for (auto& [_, region] : regions) {
        region.touched = false;
        std::fill(region.written.begin(), region.written.end(), 0);
    }
}

void model_switch(int block) {
    if (running < 0 || block == running) return;
    for (auto& [_, region] : regions) {
        if (!region.touched) continue;
        std::memcpy(region.view[running].data(), region.base, region.shared.size());
        std::memcpy(region.base, region.view[block].data(), region.shared.size());
    }
    running = block;
}

void model_fence() {
    if (running < 0) return;
    for (auto& [_, region] : regions) {
        if (!region.touched) continue;
        publish(region, running);
        std::memcpy(region.base, region.shared.data(), region.shared.size());
    }
}

void model_end() {
    for (int block = 0; running >= 0 && block < blocks; ++block) {
        model_switch(block);
        for (auto& [_, region] : regions) {
            if (region.touched) publish(region, block);
        }
    }
    for (auto& [_, region] : regions) {
        if (running >= 0 && region.touched) std::memcpy(region.base, region.shared.data(), region.shared.size());
    }
    launched = false, running = -1;
}

unsigned model_atomic_add(unsigned* at, unsigned x) {
    before_write(at, sizeof x);
    Region* region = running >= 0 ? region_of(at) : nullptr;
    if (!region) {
        const unsigned before = *at;
        *at += x;
        return before;
    }
    const size_t first = reinterpret_cast<uint8_t*>(at) - region->base;
    unsigned before;
    std::memcpy(&before, region->shared.data() + first, sizeof before);
    const unsigned after = before + x;
    std::memcpy(region->shared.data() + first, &after, sizeof after);
    std::memset(region->dirty[running].data() + first, 0, sizeof after);
    // What this block has cached stays as it was: an atomic does not fill its cache.
    return before;
}

void model_read_only(const void* at, size_t bytes) {
    Region* region = launched ? region_of(at) : nullptr;
    if (!region) return;
    const size_t first = static_cast<const uint8_t*>(at) - region->base;
    for (size_t i = first; i < first + bytes; ++i) {
        if (region->written[i]) fail("a read-only load of what the same launch wrote");
    }
}

// ---- The hooks.

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void*, size_t) {}
void __tsan_write_range(void* at, size_t bytes) { before_write(at, bytes); }

#define HOOKS(bytes)                                                            \
    void __tsan_read##bytes(void*) {}                                           \
    void __tsan_unaligned_read##bytes(void*) {}                                 \
    void __tsan_write##bytes(void* at) { before_write(at, bytes); }             \
    void __tsan_unaligned_write##bytes(void* at) { before_write(at, bytes); }   \
    void __tsan_volatile_read##bytes(void* at) { before_uncached(at, bytes); }  \
    void __tsan_unaligned_volatile_read##bytes(void* at) { before_uncached(at, bytes); } \
    void __tsan_volatile_write##bytes(void* at) { before_write(at, bytes); }    \
    void __tsan_unaligned_volatile_write##bytes(void* at) { before_write(at, bytes); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS

}
