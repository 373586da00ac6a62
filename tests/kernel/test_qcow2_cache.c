/* The cache of table slices: its bound, what it never evicts, and slices that cannot be read. */
#include "events.h"
#include "image_file.h"
#include "qcow2.h"

enum { SLICE = 4096, SLICES = 256 };

static struct image_file *make_table(struct cache *cache)
{
    struct image_file *file = image_file_new(SLICES * SLICE);
    for (uint64_t i = 0; i < SLICES; i++)
        put64(file, i * SLICE, i);
    *cache = (struct cache) { 0 };
    CHECK_OK(cache_init(cache, &file->node, SLICE, 64 * SLICE));
    return file;
}

static size_t slots(const struct cache *cache)
{
    size_t count = 0;
    for (int i = 0; i < CACHE_SHARDS; i++)
        count += cache->shards[i].slot_count;
    return count;
}

static uint64_t first_word(const struct slice *slice)
{
    return be64toh(atomic_load(&slice->words[0]));
}

static void check_get(struct cache *cache, uint64_t number)
{
    struct slice *slice;
    CHECK_OK(cache_get(cache, number * SLICE, &slice));
    CHECK_INT(first_word(slice), number);
    cache_put(slice);
}

static void it_stays_within_its_bound(void)
{
    struct cache cache;
    struct image_file *file = make_table(&cache);
    for (int round = 0; round < 3; round++)
        for (uint64_t i = 0; i < SLICES; i++)
            check_get(&cache, i);
    CHECK(slots(&cache) <= 64);
    unsigned reads = file->reads;
    check_get(&cache, SLICES - 1);
    CHECK_INT(file->reads, reads);      /* a hit */
    cache_destroy(&cache);
    nb_node_unref(&file->node);
}

static void pinned_and_dirty_slices_stay(void)
{
    struct cache cache;
    struct image_file *file = make_table(&cache);
    struct slice *pinned, *dirty, **found;
    CHECK_OK(cache_get(&cache, 0, &pinned));
    CHECK_OK(cache_get(&cache, SLICE, &dirty));
    dirty->dirty = true;
    cache.dirty = 1;
    cache_put(dirty);
    for (uint64_t i = 2; i < SLICES; i++)
        check_get(&cache, i);
    unsigned reads = file->reads;
    check_get(&cache, 0);
    check_get(&cache, 1);
    CHECK_INT(file->reads, reads);
    CHECK_INT(cache_collect_dirty(&cache, &found), 1);
    CHECK(found[0] == dirty && dirty->pins == 1);
    cache_put(dirty);
    cache_put(pinned);
    free(found);
    cache_destroy(&cache);
    nb_node_unref(&file->node);
}

static int fail_reads(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    (void)file, (void)offset, (void)count;
    return op == FILE_READ && !after ? -EIO : 0;
}

static void a_slice_that_could_not_be_read_is_asked_for_again(void)
{
    struct cache cache;
    struct image_file *file = make_table(&cache);
    struct slice *slice;
    file->hook = fail_reads;
    for (uint64_t i = 0; i < SLICES; i++)
        CHECK_INT(cache_get(&cache, i * SLICE, &slice), -EIO);
    CHECK(slots(&cache) <= 64);
    file->hook = NULL;
    for (uint64_t i = 0; i < SLICES; i++)
        check_get(&cache, i);
    cache_destroy(&cache);
    nb_node_unref(&file->node);
}

static void a_new_table_s_slice_is_zero_whatever_was_there(void)
{
    struct cache cache;
    struct image_file *file = make_table(&cache);
    struct slice *slice;
    check_get(&cache, 5);
    for (uint64_t i = 5; i < 7; i++) {      /* one in the cache, one not */
        unsigned reads = file->reads;
        CHECK_OK(cache_get_new(&cache, i * SLICE, &slice));
        CHECK_INT(first_word(slice), 0);
        CHECK_INT(file->reads, reads);
        cache_put(slice);
    }
    cache_destroy(&cache);
    nb_node_unref(&file->node);
}

/* ---- threads ---- */

static struct gate loading = GATE_INIT;
static atomic_bool stop_and_fail;

/* The first read of slice 3 stops, then fails. */
static int stop_and_fail_once(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    (void)file, (void)count;
    if (op != FILE_READ || after || offset != 3 * SLICE || !atomic_exchange(&stop_and_fail, false))
        return 0;
    gate_pass(&loading);
    return -EIO;
}

static void *get_third(void *cache)
{
    struct slice *slice;
    int err = cache_get(cache, 3 * SLICE, &slice);
    if (!err) {
        CHECK_INT(first_word(slice), 3);
        cache_put(slice);
    }
    return (void *)(intptr_t)err;
}

static void a_failed_load_fails_its_loader_and_nobody_who_waited(void)
{
    struct cache cache;
    struct image_file *file = make_table(&cache);
    pthread_t threads[4];
    int failed = 0;
    atomic_store(&stop_and_fail, true);
    file->hook = stop_and_fail_once;
    CHECK_OK(pthread_create(&threads[0], NULL, get_third, &cache));
    gate_await(&loading, 1);
    for (int i = 1; i < 4; i++)
        CHECK_OK(pthread_create(&threads[i], NULL, get_third, &cache));
    check_get(&cache, 4);      /* another slice does not wait for this one */
    gate_open(&loading);
    for (int i = 0; i < 4; i++) {
        void *result;
        CHECK_OK(pthread_join(threads[i], &result));
        failed += result != NULL;
    }
    CHECK_INT(failed, 1);
    CHECK_INT(file->reads, 2);
    cache_destroy(&cache);
    nb_node_unref(&file->node);
}

static void *get_at_random(void *cache)
{
    uint64_t seed = (uintptr_t)&seed;
    for (int i = 0; i < 3000; i++)
        check_get(cache, random_next(&seed) % SLICES);
    return NULL;
}

static void everybody_gets_the_right_slice_under_eviction(void)
{
    struct cache cache;
    struct image_file *file = make_table(&cache);
    pthread_t threads[8];
    for (int i = 0; i < 8; i++)
        CHECK_OK(pthread_create(&threads[i], NULL, get_at_random, &cache));
    for (int i = 0; i < 8; i++)
        CHECK_OK(pthread_join(threads[i], NULL));
    CHECK(slots(&cache) <= 128);
    cache_destroy(&cache);
    nb_node_unref(&file->node);
}

int main(void)
{
    RUN(it_stays_within_its_bound);
    RUN(pinned_and_dirty_slices_stay);
    RUN(a_slice_that_could_not_be_read_is_asked_for_again);
    RUN(a_new_table_s_slice_is_zero_whatever_was_there);
    RUN(a_failed_load_fails_its_loader_and_nobody_who_waited);
    RUN(everybody_gets_the_right_slice_under_eviction);
    return 0;
}
