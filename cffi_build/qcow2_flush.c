/* The order in which metadata reaches the disk.
 *
 * A flush takes, under meta_lock, copies of everything dirty.  At that instant each L2 entry that refers to a cluster
 * has its data written (entries are set after the data) and its refcount raised (before), so the copies are one
 * consistent state.  It then writes, without any lock that a guest's request takes:
 *
 *   1. refcount blocks            (data is already in the file)
 *      sync; refcount table       only if new blocks were made
 *      sync; header               only if the table moved
 *      sync
 *   2. L2 slices, sync
 *   3. L1, sync                   only if tables were made
 *   4. clusters dropped before the copies were taken become durable: reusable once nobody uses their old mapping
 *
 * A step with nothing to write costs nothing; without dirty metadata a flush is one fdatasync.
 *
 * A write that fails leaves everything dirty and the dropped clusters pending; the next flush tries again.
 *
 * Tickets: a caller whose ticket was drawn before a flush took its copies is covered by that flush; so callers that
 * wait for flush_lock together are served by one flush.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { TABLE_PART = 4096 };

/* Slices of one cache, pinned, and their contents at one instant. */
struct slice_copies {
    struct cache *cache;
    struct slice **slices;
    char *bytes;
    long count;
};

/* Parts of a table held in memory (L1 or refcount table), big endian. */
struct table_copy {
    uint64_t *words;              /* the whole table */
    bool *parts;
    uint64_t entries, host_offset;
};

struct flush {
    struct slice_copies refcounts, l2;
    struct table_copy reftable, l1;
    struct pending_list dropped;
    bool header;                  /* write that the refcount table lies at reftable_offset */
    uint64_t reftable_offset;
    uint32_t reftable_clusters;
};

/* ---- taking the copies, under meta_lock ---- */

static int copy_slices(struct slice_copies *copies, struct cache *cache)
{
    copies->cache = cache;
    if (!cache->dirty)
        return 0;
    long count = cache_collect_dirty(cache, &copies->slices);
    if (count < 0)
        return (int)count;
    copies->count = count;
    copies->bytes = aligned_alloc(4096, ((size_t)count * cache->slice_bytes + 4095) / 4096 * 4096);
    if (!copies->bytes)
        return -ENOMEM;
    for (long i = 0; i < count; i++)
        memcpy(copies->bytes + (size_t)i * cache->slice_bytes, (void *)copies->slices[i]->words, cache->slice_bytes);
    return 0;
}

static int copy_table(struct table_copy *copy, bool any, const bool *dirty, uint64_t entries, uint64_t host_offset)
{
    if (!any)
        return 0;
    uint64_t parts = entries * 8 / TABLE_PART + 1;
    *copy = (struct table_copy) { .entries = entries, .host_offset = host_offset };
    copy->words = malloc(entries * 8);
    copy->parts = malloc(parts * sizeof(bool));
    if (!copy->words || !copy->parts)
        return -ENOMEM;
    memcpy(copy->parts, dirty, parts * sizeof(bool));
    return 0;
}

static void mark_clean(struct slice_copies *copies)
{
    for (long i = 0; i < copies->count; i++)
        copies->slices[i]->dirty = false;
    copies->cache->dirty -= (size_t)copies->count;
}

static int take_copies(struct qcow2 *q, struct flush *flush)
{
    int err = copy_slices(&flush->refcounts, &q->refcounts);
    if (!err)
        err = copy_slices(&flush->l2, &q->l2);
    if (!err)
        err = copy_table(&flush->reftable, q->any_reftable_dirty, q->reftable_dirty, q->reftable_entries,
                         q->reftable_offset);
    if (!err)
        err = copy_table(&flush->l1, q->any_l1_dirty, q->l1_dirty, q->layout.l1_entries, q->layout.l1_offset);
    if (err)
        return err;
    if (flush->reftable.words) {
        words_to_be(flush->reftable.words, q->reftable, q->reftable_entries);
        memset(q->reftable_dirty, 0, q->reftable_entries * 8 / TABLE_PART + 1);
        q->any_reftable_dirty = false;
    }
    if (flush->l1.words) {
        for (uint64_t i = 0; i < flush->l1.entries; i++)
            flush->l1.words[i] = __builtin_bswap64(atomic_load_explicit(&q->l1[i], memory_order_relaxed));
        memset(q->l1_dirty, 0, flush->l1.entries * 8 / TABLE_PART + 1);
        q->any_l1_dirty = false;
    }
    flush->header = q->header_stale;
    flush->reftable_offset = q->reftable_offset;
    flush->reftable_clusters = q->reftable_clusters;
    q->header_stale = false;
    mark_clean(&flush->refcounts);
    mark_clean(&flush->l2);
    flush->dropped = q->dropped;
    q->dropped = (struct pending_list) { 0 };
    return 0;
}

/* ---- writing them, without a lock that requests take ---- */

static int write_slices(struct qcow2 *q, const struct slice_copies *copies)
{
    size_t size = copies->count ? copies->cache->slice_bytes : 0;
    int err = 0;
    for (long i = 0; i < copies->count && !err; i++)
        err = node_pwrite(q->node.file, copies->bytes + (size_t)i * size, size, copies->slices[i]->offset, 0);
    return err;
}

static int write_table_parts(struct qcow2 *q, const struct table_copy *copy)
{
    uint64_t bytes = copy->entries * 8;
    int err = 0;
    for (uint64_t at = 0; copy->words && at < bytes && !err; at += TABLE_PART) {
        uint64_t length = bytes - at < TABLE_PART ? bytes - at : TABLE_PART;
        if (copy->parts[at / TABLE_PART])
            err = node_pwrite(q->node.file, (char *)copy->words + at, length, copy->host_offset + at, 0);
    }
    return err;
}

/* Header bytes 48..59: where the refcount table lies and how many clusters it takes. */
static int write_header(struct qcow2 *q, const struct flush *flush)
{
    unsigned char be[12];
    uint64_t offset = __builtin_bswap64(flush->reftable_offset);
    uint32_t clusters = __builtin_bswap32(flush->reftable_clusters);
    memcpy(be, &offset, 8);
    memcpy(be + 8, &clusters, 4);
    return node_pwrite(q->node.file, be, sizeof be, 48, 0);
}

static int write_in_order(struct qcow2 *q, const struct flush *flush, bool sync)
{
    struct node *file = q->node.file;
    int err = write_slices(q, &flush->refcounts);
    if (!err && flush->reftable.words) {
        err = sync ? node_flush(file) : 0;
        if (!err)
            err = write_table_parts(q, &flush->reftable);
    }
    if (!err && flush->header) {
        err = sync ? node_flush(file) : 0;
        if (!err)
            err = write_header(q, flush);
    }
    if (!err && sync)
        err = node_flush(file);
    if (!err && flush->l2.count) {
        err = write_slices(q, &flush->l2);
        if (!err && sync)
            err = node_flush(file);
    }
    if (!err && flush->l1.words) {
        err = write_table_parts(q, &flush->l1);
        if (!err && sync)
            err = node_flush(file);
    }
    return err;
}

/* ---- afterwards, under meta_lock ---- */

static void mark_dirty_again(struct qcow2 *q, struct flush *flush)
{
    struct slice_copies *both[] = { &flush->refcounts, &flush->l2 };
    for (int b = 0; b < 2; b++)
        for (long i = 0; i < both[b]->count; i++)
            mark_dirty(q, both[b]->cache, both[b]->slices[i]);
    /* A table that was replaced meanwhile (grow_table) is dirty as a whole, and so is the header. */
    if (flush->reftable.words && flush->reftable.host_offset == q->reftable_offset) {
        for (uint64_t i = 0; i < flush->reftable.entries * 8 / TABLE_PART + 1; i++)
            q->reftable_dirty[i] |= flush->reftable.parts[i];
        q->any_reftable_dirty = true;
    }
    q->header_stale |= flush->header;
    if (flush->l1.words) {
        for (uint64_t i = 0; i < flush->l1.entries * 8 / TABLE_PART + 1; i++)
            q->l1_dirty[i] |= flush->l1.parts[i];
        q->any_l1_dirty = true;
    }
    atomic_fetch_add(&q->changes, 1);
}

/* Append `from` to `to`, with `epoch` unless it is 0.  Without memory the clusters leak: safe. */
static void pass_on(struct pending_list *to, struct pending_list *from, uint64_t epoch)
{
    for (size_t i = 0; i < from->count; i++)
        if (pending_push(to, from->items[i].cluster, epoch))
            break;
    free(from->items);
}

static void release_copies(struct slice_copies *copies)
{
    for (long i = 0; i < copies->count; i++)
        cache_put(copies->slices[i]);
    free(copies->slices);
    free(copies->bytes);
}

static void release(struct flush *flush)
{
    release_copies(&flush->refcounts);
    release_copies(&flush->l2);
    free(flush->reftable.words);
    free(flush->reftable.parts);
    free(flush->l1.words);
    free(flush->l1.parts);
}

/* Under flush_lock. */
static int flush_metadata(struct qcow2 *q, bool sync)
{
    struct flush flush = { 0 };
    pthread_mutex_lock(&q->meta_lock);
    int err = take_copies(q, &flush);
    pthread_mutex_unlock(&q->meta_lock);
    if (!err) {
        err = write_in_order(q, &flush, sync);
        pthread_mutex_lock(&q->meta_lock);
        if (err) {
            mark_dirty_again(q, &flush);
            pass_on(&q->dropped, &flush.dropped, 0);
        } else if (sync) {
            pass_on(&q->durable, &flush.dropped, atomic_load(&q->epochs.current));
            err = refcount_reclaim(q);
        } else {
            pass_on(&q->dropped, &flush.dropped, 0);
        }
        pthread_mutex_unlock(&q->meta_lock);
    }
    release(&flush);
    return err;
}

static bool nothing_dirty(struct qcow2 *q)
{
    pthread_mutex_lock(&q->meta_lock);
    bool clean = !q->refcounts.dirty && !q->l2.dirty && !q->any_l1_dirty && !q->any_reftable_dirty
        && !q->dropped.count && !q->durable.count;
    pthread_mutex_unlock(&q->meta_lock);
    return clean;
}

int qcow2_flush(struct qcow2 *q)
{
    unsigned long ticket = atomic_fetch_add(&q->flush_asked, 1) + 1;
    pthread_mutex_lock(&q->flush_lock);
    int err;
    if (q->flush_done >= ticket) {
        err = q->flush_error;
    } else {
        unsigned long covered = atomic_load(&q->flush_asked);
        err = nothing_dirty(q) ? node_flush(q->node.file) : flush_metadata(q, true);
        q->flush_done = covered;
        q->flush_error = err;
    }
    pthread_mutex_unlock(&q->flush_lock);
    return err;
}

int qcow2_write_back(struct qcow2 *q)
{
    pthread_mutex_lock(&q->flush_lock);
    int err = nothing_dirty(q) ? 0 : flush_metadata(q, false);
    pthread_mutex_unlock(&q->flush_lock);
    return err;
}

int qcow2_relieve(struct qcow2 *q)
{
    enum { MANY_PENDING = 4096 };
    pthread_mutex_lock(&q->meta_lock);
    bool full = q->l2.dirty > q->l2.slots_per_shard * CACHE_SHARDS / 2
        || q->refcounts.dirty > q->refcounts.slots_per_shard * CACHE_SHARDS / 2 || q->dropped.count > MANY_PENDING;
    pthread_mutex_unlock(&q->meta_lock);
    return full ? qcow2_flush(q) : 0;
}
