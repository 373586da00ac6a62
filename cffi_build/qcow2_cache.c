/* Bounded cache of table slices.
 *
 * A slice is absent, loading (in its bucket, pinned by the loader, not readable yet) or present.  A hit takes the
 * shard's lock for a few instructions and never waits for I/O: loading happens outside the lock, and only requests
 * for the very slice that is loading wait.  A pinned or dirty slice is never evicted; when nothing can be, the cache
 * grows, and qcow2_relieve soon flushes.
 *
 * Eviction needs a slice's dirty mark, which meta_lock protects, not the shard's lock.  That is safe in the one
 * direction that matters: a slice is marked dirty only while it is pinned, and pins are taken under the shard's lock;
 * so an unpinned slice that the evictor sees as dirty may at worst have become clean since, and is kept.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int cache_init(struct cache *cache, struct node *file, size_t slice_bytes, uint64_t bytes)
{
    cache->file = file;
    cache->slice_bytes = slice_bytes;
    cache->slots_per_shard = bytes / slice_bytes / CACHE_SHARDS;
    if (cache->slots_per_shard < 4)
        cache->slots_per_shard = 4;
    cache->bucket_count = 1;
    while (cache->bucket_count < cache->slots_per_shard && cache->bucket_count < 4096)
        cache->bucket_count *= 2;
    for (int i = 0; i < CACHE_SHARDS; i++) {
        struct cache_shard *shard = &cache->shards[i];
        pthread_mutex_init(&shard->lock, NULL);
        pthread_cond_init(&shard->loaded, NULL);
    }
    for (int i = 0; i < CACHE_SHARDS; i++) {
        cache->shards[i].buckets = calloc(cache->bucket_count, sizeof(struct slice *));
        if (!cache->shards[i].buckets)
            return -ENOMEM;
    }
    return 0;
}

static void slice_free(struct slice *slice)
{
    free((void *)slice->words);
    free(slice);
}

void cache_destroy(struct cache *cache)
{
    for (int i = 0; i < CACHE_SHARDS; i++) {
        struct cache_shard *shard = &cache->shards[i];
        for (size_t s = 0; s < shard->slot_count; s++)
            slice_free(shard->slots[s]);
        free(shard->slots);
        free(shard->buckets);
        pthread_cond_destroy(&shard->loaded);
        pthread_mutex_destroy(&shard->lock);
    }
}

static uint64_t hash(const struct cache *cache, uint64_t offset)
{
    return offset / cache->slice_bytes * UINT64_C(0x9e3779b97f4a7c15) >> 20;
}

static struct cache_shard *shard_of(struct cache *cache, uint64_t offset)
{
    return &cache->shards[hash(cache, offset) % CACHE_SHARDS];
}

static struct slice **bucket_of(struct cache *cache, struct cache_shard *shard, uint64_t offset)
{
    return &shard->buckets[hash(cache, offset) / CACHE_SHARDS % cache->bucket_count];
}

static struct slice *find_locked(struct cache *cache, struct cache_shard *shard, uint64_t offset)
{
    struct slice *slice = *bucket_of(cache, shard, offset);
    while (slice && slice->offset != offset)
        slice = slice->next;
    return slice;
}

static void unlink_locked(struct cache *cache, struct cache_shard *shard, struct slice *slice)
{
    struct slice **at = bucket_of(cache, shard, slice->offset);
    while (*at != slice)
        at = &(*at)->next;
    *at = slice->next;
}

static bool evictable(const struct slice *slice)
{
    return !atomic_load_explicit(&slice->pins, memory_order_acquire) && !slice->dirty;
}

/* An unused slice to fill anew, out of its bucket but still in its slot; NULL if none may go. */
static struct slice *evict_locked(struct cache *cache, struct cache_shard *shard)
{
    for (size_t tries = 2 * shard->slot_count; tries; tries--) {
        struct slice *slice = shard->slots[shard->hand];
        shard->hand = (shard->hand + 1) % shard->slot_count;
        if (!evictable(slice))
            continue;
        if (atomic_exchange_explicit(&slice->used, false, memory_order_relaxed))
            continue;
        unlink_locked(cache, shard, slice);
        return slice;
    }
    return NULL;
}

static struct slice *grow_locked(struct cache *cache, struct cache_shard *shard)
{
    if (shard->slot_count == shard->slot_capacity) {
        size_t capacity = shard->slot_capacity ? 2 * shard->slot_capacity : 16;
        struct slice **slots = realloc(shard->slots, capacity * sizeof *slots);
        if (!slots)
            return NULL;
        shard->slots = slots;
        shard->slot_capacity = capacity;
    }
    struct slice *slice = calloc(1, sizeof *slice);
    if (!slice)
        return NULL;
    /* Aligned so that tables can be read with direct I/O. */
    slice->words = aligned_alloc(cache->slice_bytes, cache->slice_bytes);
    if (!slice->words) {
        free(slice);
        return NULL;
    }
    shard->slots[shard->slot_count++] = slice;
    return slice;
}

/* A slice for `offset`, pinned and in its bucket, its content not valid yet. */
static struct slice *insert_locked(struct cache *cache, struct cache_shard *shard, uint64_t offset)
{
    struct slice *slice = NULL;
    if (shard->slot_count >= cache->slots_per_shard)
        slice = evict_locked(cache, shard);
    if (!slice)
        slice = grow_locked(cache, shard);
    if (!slice)
        return NULL;
    slice->offset = offset;
    slice->failed = false;
    slice->loading = true;
    atomic_store(&slice->pins, 1);
    atomic_store(&slice->used, true);
    struct slice **bucket = bucket_of(cache, shard, offset);
    slice->next = *bucket;
    *bucket = slice;
    return slice;
}

/* A slice that could not be read leaves the cache; who waits for it sees failed and asks the file again. */
static void finish_loading(struct cache *cache, struct cache_shard *shard, struct slice *slice, int err)
{
    pthread_mutex_lock(&shard->lock);
    slice->loading = false;
    slice->failed = err != 0;
    if (err) {
        unlink_locked(cache, shard, slice);
        /* Out of every bucket: an offset that no table has, so that unlinking it again is harmless. */
        slice->offset = UINT64_MAX - cache->slice_bytes + 1;
        struct slice **bucket = bucket_of(cache, shard, slice->offset);
        slice->next = *bucket;
        *bucket = slice;
    }
    pthread_cond_broadcast(&shard->loaded);
    pthread_mutex_unlock(&shard->lock);
}

int cache_get(struct cache *cache, uint64_t offset, struct slice **out)
{
    struct cache_shard *shard = shard_of(cache, offset);
    pthread_mutex_lock(&shard->lock);
    for (;;) {
        struct slice *slice = find_locked(cache, shard, offset);
        if (!slice)
            break;
        atomic_fetch_add_explicit(&slice->pins, 1, memory_order_acquire);
        if (!atomic_load_explicit(&slice->used, memory_order_relaxed))
            atomic_store_explicit(&slice->used, true, memory_order_relaxed);
        while (slice->loading)
            pthread_cond_wait(&shard->loaded, &shard->lock);
        if (!slice->failed) {
            pthread_mutex_unlock(&shard->lock);
            *out = slice;
            return 0;
        }
        cache_put(slice);
    }
    struct slice *slice = insert_locked(cache, shard, offset);
    pthread_mutex_unlock(&shard->lock);
    if (!slice)
        return -ENOMEM;
    int err = node_pread(cache->file, (void *)slice->words, cache->slice_bytes, offset);
    finish_loading(cache, shard, slice, err);
    if (err)
        cache_put(slice);
    else
        *out = slice;
    return err;
}

int cache_get_new(struct cache *cache, uint64_t offset, struct slice **out)
{
    struct cache_shard *shard = shard_of(cache, offset);
    pthread_mutex_lock(&shard->lock);
    struct slice *slice = find_locked(cache, shard, offset);
    if (slice)
        atomic_fetch_add(&slice->pins, 1);
    else
        slice = insert_locked(cache, shard, offset);
    if (slice) {
        for (size_t i = 0; i < cache->slice_bytes / 8; i++)
            atomic_store_explicit(&slice->words[i], 0, memory_order_relaxed);
        slice->loading = slice->failed = false;
    }
    pthread_mutex_unlock(&shard->lock);
    *out = slice;
    return slice ? 0 : -ENOMEM;
}

long cache_collect_dirty(struct cache *cache, struct slice ***out)
{
    size_t found = 0;
    struct slice **slices = malloc((cache->dirty + 1) * sizeof *slices);
    if (!slices)
        return -ENOMEM;
    for (int i = 0; i < CACHE_SHARDS && found < cache->dirty; i++) {
        struct cache_shard *shard = &cache->shards[i];
        pthread_mutex_lock(&shard->lock);
        for (size_t s = 0; s < shard->slot_count; s++)
            if (shard->slots[s]->dirty) {
                atomic_fetch_add(&shard->slots[s]->pins, 1);
                slices[found++] = shard->slots[s];
            }
        pthread_mutex_unlock(&shard->lock);
    }
    *out = slices;
    return (long)found;
}
