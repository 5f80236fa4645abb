/* Large blocks of torch's tensors on a CPU: what is freed is kept for the next one.
 *
 * Torch asks the C library for each block, which maps a new one of 32 MB or more and gives it back when it is freed, so that the system fills
 * every block with zeros first; a smaller one fits no freed one of its size, since it is to be aligned. Here blocks are cut from regions, what is
 * freed waits, joined with what waits beside it, and the smallest part that holds a block is taken for it. Before a new region is mapped, as much
 * of what waits longest is given back: never much more is held than was in use at once.
 *
 * blocks.py calls it.
 */
#include <c10/core/Allocator.h>

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t LEAST = size_t(1) << 20;                              /* bytes of a block from which on it is kept */
constexpr size_t GRAIN = size_t(1) << 16, LARGE = size_t(1) << 21;     /* of what blocks are multiples, and what is given back: a large page */
constexpr size_t REGION = size_t(1) << 26;                             /* of a region, at least */

size_t whole(size_t bytes, size_t of) { return (bytes + of - 1) / of * of; }

/* A part of memory that waits, and since when. */
struct Idle { size_t size; uint64_t age; };

class Blocks final : public c10::Allocator {
  public:
    c10::Allocator *before = nullptr; /* whose the small blocks are, and who says that there is no memory */
    std::atomic<bool> keeps{false};   /* else every block is the one before's: who stays installed can free by hand what either gave */
    bool large_pages = false;

    c10::DataPtr allocate(size_t bytes) override {
        if (bytes < LEAST || bytes > PTRDIFF_MAX || !keeps) return before->allocate(bytes);
        const size_t size = whole(bytes, GRAIN);
        char *at = nullptr;
        {
            std::lock_guard<std::mutex> guard(lock);
            if (!(at = reused(size)) && !(at = mapped(size))) {
                drop(SIZE_MAX);
                at = mapped(size);
            }
            if (at) taken.emplace(at, size);
        }
        if (!at) return before->allocate(bytes);
        if (c10::memoryProfilingEnabled()) c10::reportMemoryUsageToProfiler(at, (int64_t)size, 0, 0, c10::Device(c10::DeviceType::CPU));
        return {at, at, &freed, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &freed; }
    void copy_data(void *to, const void *from, size_t count) const override { std::memcpy(to, from, count); }

    /* Give back what has waited longest, large pages alone, at least so many bytes where there are. */
    void drop(size_t bytes) {
        size_t dropped = 0;
        for (auto found = by_age.begin(); found != by_age.end() && dropped < bytes;) {
            char *at = (found++)->second;
            const size_t size = by_place.at(at).size;
            char *from = (char *)whole((size_t)at, LARGE), *to = (char *)((size_t)(at + size) / LARGE * LARGE);
            if (from >= to) continue;
            if (munmap(from, to - from)) return; /* the system has no room for one more part: all of it waits on */
            forget(at);
            dropped += to - from;
            if (from > at) wait(at, from - at);
            if (at + size > to) wait(to, at + size - to);
        }
    }
    /* What is free from now on, joined with its neighbours. */
    void wait(char *at, size_t size) {
        auto after = by_place.lower_bound(at);
        if (after != by_place.begin()) {
            auto [place, idle] = *std::prev(after);
            if (place + idle.size == at) forget(place), at = place, size += idle.size;
        }
        after = by_place.lower_bound(at);
        if (after != by_place.end() && after->first == at + size) {
            const size_t more = after->second.size;
            forget(at + size), size += more;
        }
        by_place.emplace(at, Idle{size, next});
        by_size.emplace(std::make_pair(size, next), at);
        by_age.emplace(next++, at);
        waiting += size;
    }
    std::mutex lock;
    std::unordered_map<void *, size_t> taken;
    size_t waiting = 0; /* bytes */

  private:
    std::map<char *, Idle> by_place;
    std::map<uint64_t, char *> by_age;
    std::map<std::pair<size_t, uint64_t>, char *> by_size; /* of those of a size the one that has waited longest first */
    uint64_t next = 0;

    static void freed(void *at);
    void forget(char *at) {
        auto found = by_place.find(at);
        const Idle idle = found->second;
        by_place.erase(found);
        by_age.erase(idle.age);
        by_size.erase({idle.size, idle.age});
        waiting -= idle.size;
    }
    /* From the smallest part that waits and holds it. */
    char *reused(size_t size) {
        auto found = by_size.lower_bound({size, 0});
        if (found == by_size.end()) return nullptr;
        const size_t length = found->first.first;
        char *at = found->second;
        forget(at);
        if (length > size) wait(at + size, length - size);
        return at;
    }
    /* From a new region, which begins and ends with a large page. */
    char *mapped(size_t size) {
        drop(size);
        const size_t region = whole(size < REGION ? REGION : size, LARGE);
        char *at = (char *)mmap(nullptr, region + LARGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) return nullptr;
        char *from = (char *)whole((size_t)at, LARGE);
        if (from > at) munmap(at, from - at);
        if (from - at < (ptrdiff_t)LARGE) munmap(from + region, LARGE - (from - at));
        if (large_pages) madvise(from, region, MADV_HUGEPAGE);
        if (region > size) wait(from + size, region - size);
        return from;
    }
};

Blocks &blocks() {
    static Blocks *one = new Blocks; /* outlives every tensor */
    return *one;
}

void Blocks::freed(void *at) {
    Blocks &b = blocks();
    size_t size = 0;
    try {
        std::lock_guard<std::mutex> guard(b.lock);
        auto found = b.taken.find(at);
        if (found != b.taken.end()) {
            size = found->second;
            b.taken.erase(found);
            b.wait((char *)at, size);
            if (!b.keeps) b.drop(SIZE_MAX);
        }
    } catch (const std::bad_alloc &) { /* nothing can be written down: the block is lost */
    }
    if (!size) b.before->raw_deleter()(at); /* of the one before, which somebody frees by hand */
    else if (c10::memoryProfilingEnabled()) c10::reportMemoryUsageToProfiler(at, -(int64_t)size, 0, 0, c10::Device(c10::DeviceType::CPU));
}

} // namespace

extern "C" {

/* From now on torch's blocks are kept, on large pages where that is wanted; or no longer, and what waits is given back. */
void ramulus_keep(int keeps, int large_pages) {
    Blocks &b = blocks();
    if (!b.before) {
        b.before = c10::GetAllocator(c10::DeviceType::CPU);
        c10::SetAllocator(c10::DeviceType::CPU, &b);
        /* who forks while another thread allocates has a lock that nobody holds */
        pthread_atfork([] { blocks().lock.lock(); }, [] { blocks().lock.unlock(); }, [] { blocks().lock.unlock(); });
    }
    std::lock_guard<std::mutex> guard(b.lock);
    b.keeps = keeps, b.large_pages = large_pages;
    if (!keeps) b.drop(SIZE_MAX);
}

/* Bytes that wait. */
int64_t ramulus_idle(void) {
    std::lock_guard<std::mutex> guard(blocks().lock);
    return (int64_t)blocks().waiting;
}

/* Give back all that waits. */
void ramulus_drop(void) {
    std::lock_guard<std::mutex> guard(blocks().lock);
    blocks().drop(SIZE_MAX);
}
}
