/* Dirty bitmaps against a naive shadow, and under threads. */
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/resource.h>

#include "kernel.h"

static uint64_t random_state = 88172645463325252u;

static uint64_t random_below(uint64_t limit)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % limit;
}

static struct bitmap *new_bitmap(uint64_t size, uint32_t granularity)
{
    struct bitmap *bitmap;
    CHECK_OK(nb_bitmap_new(size, granularity, &bitmap));
    return bitmap;
}

static void refuses_granularities_out_of_range(void)
{
    struct bitmap *bitmap = NULL;
    CHECK_INT(nb_bitmap_new(1 << 20, 256, &bitmap), -EINVAL);
    CHECK_INT(nb_bitmap_new(1 << 20, 65537, &bitmap), -EINVAL);
    CHECK_INT(nb_bitmap_new(1 << 20, 0, &bitmap), -EINVAL);
    CHECK_INT(nb_bitmap_new(1 << 20, UINT32_C(3) << 30, &bitmap), -EINVAL);
    for (uint64_t granularity = 512; granularity <= UINT64_C(1) << 31; granularity *= 2) {
        bitmap = new_bitmap(1 << 20, (uint32_t)granularity);
        CHECK_INT(nb_bitmap_granularity(bitmap), granularity);
        CHECK_INT(nb_bitmap_size(bitmap), 1 << 20);
        nb_bitmap_free(bitmap);
    }
    nb_bitmap_free(NULL);
}

static void an_empty_disk_has_nothing_dirty(void)
{
    struct bitmap *bitmap = new_bitmap(0, 65536);
    uint64_t start, length;
    nb_bitmap_set(bitmap, 0, 1);
    nb_bitmap_clear(bitmap, 0, 1);
    CHECK(!nb_bitmap_test(bitmap, 0, 1));
    CHECK(!nb_bitmap_next_dirty(bitmap, 0, 1, &start, &length));
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 0);
    nb_bitmap_free(bitmap);
}

static void set_takes_touched_granules_and_clear_only_whole_ones(void)
{
    struct bitmap *bitmap = new_bitmap(10 * 4096 + 100, 4096);
    nb_bitmap_set(bitmap, 4095, 2);
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 8192);
    nb_bitmap_clear(bitmap, 1, 8191);
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 4096);
    CHECK(nb_bitmap_test(bitmap, 4095, 1));
    CHECK(!nb_bitmap_test(bitmap, 4096, 1));
    nb_bitmap_set(bitmap, 10 * 4096 + 50, UINT64_MAX);      /* beyond the end: cut */
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 4096 + 100);
    nb_bitmap_clear(bitmap, 10 * 4096, 99);
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 4096 + 100);
    nb_bitmap_clear(bitmap, 10 * 4096, 100);
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 4096);
    nb_bitmap_set(bitmap, 0, 0);
    nb_bitmap_clear(bitmap, 0, 0);
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), 4096);
    nb_bitmap_free(bitmap);
}

static void finds_areas_cut_at_the_offset_the_maximum_and_the_end(void)
{
    struct bitmap *bitmap = new_bitmap(1000 * 512 + 7, 512);
    uint64_t start, length;
    nb_bitmap_set(bitmap, 100 * 512, 200 * 512);
    CHECK(nb_bitmap_next_dirty(bitmap, 0, UINT64_MAX, &start, &length));
    CHECK_INT(start, 100 * 512);
    CHECK_INT(length, 200 * 512);
    CHECK(nb_bitmap_next_dirty(bitmap, 150 * 512 + 10, 1000, &start, &length));
    CHECK_INT(start, 150 * 512 + 10);
    CHECK_INT(length, 1000);
    CHECK(!nb_bitmap_next_dirty(bitmap, 300 * 512, UINT64_MAX, &start, &length));
    CHECK(!nb_bitmap_next_dirty(bitmap, 0, 0, &start, &length));
    nb_bitmap_set(bitmap, 999 * 512, 512 + 7);
    CHECK(nb_bitmap_next_dirty(bitmap, 300 * 512, UINT64_MAX, &start, &length));
    CHECK_INT(start, 999 * 512);
    CHECK_INT(length, 512 + 7);
    nb_bitmap_free(bitmap);
}

/* The shadow: one byte per granule. */
static void check_against(const struct bitmap *bitmap, const uint8_t *shadow, uint64_t granules, uint64_t size,
                          uint32_t granularity)
{
    uint64_t bytes = 0, start, length;
    for (uint64_t i = 0; i < granules; i++)
        if (shadow[i])
            bytes += i == granules - 1 ? size - i * granularity : granularity;
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), bytes);
    uint64_t from = random_below(size), max = 1 + random_below(size), expected = from / granularity;
    while (expected < granules && !shadow[expected])
        expected++;
    bool found = nb_bitmap_next_dirty(bitmap, from, max, &start, &length);
    CHECK_INT(found, expected < granules);
    if (found) {
        uint64_t begin = expected * granularity < from ? from : expected * granularity, end = expected;
        while (end < granules && shadow[end])
            end++;
        uint64_t stop = end * granularity < size ? end * granularity : size;
        CHECK_INT(start, begin);
        CHECK_INT(length, stop - begin < max ? stop - begin : max);
    }
    uint64_t count = 1 + random_below(size - from);
    bool any = false;
    for (uint64_t i = from / granularity; i <= (from + count - 1) / granularity; i++)
        any |= shadow[i];
    CHECK_INT(nb_bitmap_test(bitmap, from, count), any);
}

static void agrees_with_a_naive_shadow(void)
{
    for (int round = 0; round < 150; round++) {
        uint32_t granularity = 512u << random_below(8);
        uint64_t granules = 1 + random_below(round % 3 ? 300 : 70000);
        uint64_t size = granules * granularity - random_below(granularity);
        struct bitmap *bitmap = new_bitmap(size, granularity);
        uint8_t *shadow = calloc(1, granules);
        for (int step = 0; step < 60; step++) {
            uint64_t offset = random_below(size), count = 1 + random_below(random_below(4) ? 5 * granularity : size);
            bool set = random_below(2);
            (set ? nb_bitmap_set : nb_bitmap_clear)(bitmap, offset, count);
            for (uint64_t i = offset / granularity; i < granules && i * granularity < offset + count; i++) {
                uint64_t end = (i + 1) * granularity < size ? (i + 1) * granularity : size;
                if (set || (i * granularity >= offset && end <= offset + count))
                    shadow[i] = set;
            }
            check_against(bitmap, shadow, granules, size, granularity);
        }
        free(shadow);
        nb_bitmap_free(bitmap);
    }
}

static void merges_between_granularities(void)
{
    struct bitmap *fine = new_bitmap(100 << 16, 512), *coarse = new_bitmap(100 << 16, 65536);
    struct bitmap *other = new_bitmap(99 << 16, 512);
    nb_bitmap_set(fine, (3 << 16) + 512, 1);
    nb_bitmap_set(fine, (7 << 16) - 1, 2);
    CHECK_OK(nb_bitmap_merge(coarse, fine));
    CHECK_INT(nb_bitmap_dirty_bytes(coarse), 3 << 16);
    CHECK_OK(nb_bitmap_merge(fine, coarse));
    CHECK_INT(nb_bitmap_dirty_bytes(fine), 3 << 16);
    CHECK_INT(nb_bitmap_merge(other, fine), -EINVAL);
    nb_bitmap_free(fine);
    nb_bitmap_free(coarse);
    nb_bitmap_free(other);
}

static long peak_memory_kib(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
}

static void a_huge_clean_disk_costs_next_to_nothing(void)
{
    uint64_t size = UINT64_C(64) << 40, start, length;
    struct bitmap *bitmap = new_bitmap(size, 512);
    long before = peak_memory_kib();
    CHECK(!nb_bitmap_next_dirty(bitmap, 0, UINT64_MAX, &start, &length));
    nb_bitmap_set(bitmap, size - 1, 1);
    nb_bitmap_set(bitmap, size / 2, 1);
    CHECK(nb_bitmap_next_dirty(bitmap, 0, UINT64_MAX, &start, &length));
    CHECK_INT(start, size / 2);
    CHECK(nb_bitmap_next_dirty(bitmap, start + length, UINT64_MAX, &start, &length));
    CHECK_INT(start, size - 512);
    nb_bitmap_clear(bitmap, 0, size);
    CHECK(!nb_bitmap_test(bitmap, 0, size));
    CHECK(peak_memory_kib() - before < 8192);
    nb_bitmap_free(bitmap);
}

/* Threads flip granules of their own in words that all share.  A granule that its
 * owner has set must be found by a search that starts later. */
enum { THREADS = 4, FLIPS = 100000, GRANULES = 2 * 64 };

struct flipper {
    struct bitmap *bitmap;
    unsigned number;
    uint64_t dirty;      /* granules left dirty */
};

static void *flip(void *arg)
{
    struct flipper *flipper = arg;
    uint64_t state = flipper->number + 1;
    for (int i = 0; i < FLIPS; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        uint64_t granule = (state >> 33) % (GRANULES / THREADS) * THREADS + flipper->number, start, length;
        nb_bitmap_set(flipper->bitmap, granule * 512, 512);
        CHECK(nb_bitmap_test(flipper->bitmap, granule * 512, 1));
        CHECK(nb_bitmap_next_dirty(flipper->bitmap, granule * 512, 512, &start, &length) && start == granule * 512);
        nb_bitmap_clear(flipper->bitmap, granule * 512, 512);
        CHECK(!nb_bitmap_test(flipper->bitmap, granule * 512, 1));
    }
    for (uint64_t granule = flipper->number; granule < GRANULES; granule += THREADS * (flipper->number + 2)) {
        nb_bitmap_set(flipper->bitmap, granule * 512, 512);
        flipper->dirty++;
    }
    return NULL;
}

static void a_finished_set_is_always_found_and_counted(void)
{
    struct bitmap *bitmap = new_bitmap(GRANULES * 512, 512);
    struct flipper flippers[THREADS];
    pthread_t threads[THREADS];
    uint64_t dirty = 0;
    for (unsigned i = 0; i < THREADS; i++) {
        flippers[i] = (struct flipper) { .bitmap = bitmap, .number = i };
        CHECK_OK(pthread_create(&threads[i], NULL, flip, &flippers[i]));
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        dirty += flippers[i].dirty;
    }
    CHECK_INT(nb_bitmap_dirty_bytes(bitmap), dirty * 512);
    uint64_t found = 0, start = 0, length = 0;
    while (nb_bitmap_next_dirty(bitmap, start + length, UINT64_MAX, &start, &length))
        found += length;
    CHECK_INT(found, dirty * 512);
    nb_bitmap_free(bitmap);
}

int main(void)
{
    RUN(refuses_granularities_out_of_range);
    RUN(an_empty_disk_has_nothing_dirty);
    RUN(set_takes_touched_granules_and_clear_only_whole_ones);
    RUN(finds_areas_cut_at_the_offset_the_maximum_and_the_end);
    RUN(agrees_with_a_naive_shadow);
    RUN(merges_between_granularities);
    RUN(a_huge_clean_disk_costs_next_to_nothing);
    RUN(a_finished_set_is_always_found_and_counted);
    return 0;
}
