/* Refcounts, 16 bits wide: reading, allocating, freeing; and the epochs that protect stale mappings.
 *
 * Every function here runs under meta_lock unless it says otherwise.  Refcount blocks are read and written through
 * the cache `refcounts`; the refcount table lies in memory.  Everything that knows the width of a refcount is in
 * refcount_read and refcount_write.
 */
#include "qcow2.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { TABLE_PART = 4096 };      /* granularity of the dirty marks of L1 and refcount table, bytes */

/* ---- epochs: any thread, no lock ---- */

static atomic_uint *active_of(struct qcow2 *q, unsigned long epoch)
{
    static atomic_uint threads;
    static _Thread_local unsigned number;
    if (!number)
        number = atomic_fetch_add_explicit(&threads, 1, memory_order_relaxed) % CACHE_SHARDS + 1;
    return &q->epochs.shards[number - 1].active[epoch & 1];
}

unsigned long epoch_enter(struct qcow2 *q)
{
    for (;;) {
        unsigned long epoch = atomic_load(&q->epochs.current);
        atomic_fetch_add(active_of(q, epoch), 1);
        if (atomic_load(&q->epochs.current) == epoch)
            return epoch;
        epoch_leave(q, epoch);
    }
}

void epoch_leave(struct qcow2 *q, unsigned long epoch)
{
    atomic_fetch_sub(active_of(q, epoch), 1);
}

static bool epoch_is_empty(struct qcow2 *q, unsigned long epoch)
{
    for (int i = 0; i < CACHE_SHARDS; i++)
        if (atomic_load(&q->epochs.shards[i].active[epoch & 1]))
            return false;
    return true;
}

/* Begin a new epoch if the one before the current has ended.  Afterwards every request of epochs < current - 1 has
 * left, and of current - 1 too once it is empty. */
static void epoch_advance(struct qcow2 *q)
{
    unsigned long current = atomic_load(&q->epochs.current);
    if (epoch_is_empty(q, current + 1))
        atomic_store(&q->epochs.current, current + 1);
}

bool epoch_is_over(struct qcow2 *q, unsigned long epoch)
{
    for (int i = 0; i < 2; i++)
        if (atomic_load(&q->epochs.current) <= epoch + 1)
            epoch_advance(q);
    unsigned long current = atomic_load(&q->epochs.current);
    /* Epochs before current - 1 are over; current - 1 is when nobody is left in it. */
    return epoch + 1 < current || (epoch < current && epoch_is_empty(q, current - 1));
}

/* ---- single refcounts ---- */

static uint64_t refcount_read(const struct slice *slice, uint64_t index)
{
    return __builtin_bswap16(((const uint16_t *)(const void *)slice->words)[index]);
}

static void refcount_write(struct qcow2 *q, struct slice *slice, uint64_t index, uint64_t value)
{
    ((uint16_t *)(void *)slice->words)[index] = __builtin_bswap16((uint16_t)value);
    mark_dirty(q, &q->refcounts, slice);
}

static uint64_t entries_per_slice(const struct qcow2 *q)
{
    return q->refcounts.slice_bytes / 2;
}

/* Pin the slice with the refcount of `cluster`; -ENOENT where no block exists (all refcounts there are 0). */
static int refcount_slice(struct qcow2 *q, uint64_t cluster, struct slice **slice, uint64_t *index)
{
    uint64_t block = cluster >> q->refblock_bits;
    if (block >= q->reftable_entries || !q->reftable[block])
        return -ENOENT;
    uint64_t in_block = cluster & ((UINT64_C(1) << q->refblock_bits) - 1);
    *index = in_block % entries_per_slice(q);
    return cache_get(&q->refcounts, q->reftable[block] + in_block / entries_per_slice(q) * q->refcounts.slice_bytes,
                     slice);
}

int refcount_get(struct qcow2 *q, uint64_t cluster, uint64_t *value)
{
    struct slice *slice;
    uint64_t index;
    int err = refcount_slice(q, cluster, &slice, &index);
    *value = 0;
    if (err)
        return err == -ENOENT ? 0 : err;
    *value = refcount_read(slice, index);
    cache_put(slice);
    return 0;
}

/* ---- new refcount blocks and a larger table ---- */

static void raise_file_end(struct qcow2 *q, uint64_t end)
{
    if (atomic_load(&q->file_end) < end)
        atomic_store(&q->file_end, end);
}

/* Make a block in the cluster at `host`: its first `used` refcounts 1, the others 0.  Zeroes go to the file at once,
 * for slices that the cache drops. */
static int new_block(struct qcow2 *q, uint64_t host, uint64_t used)
{
    if (metadata_has(q, host >> q->cluster_bits))
        return qcow2_damaged(q, NB_FAULT_REFCOUNT, host, 0);      /* in use, though no block counts it */
    raise_file_end(q, host + q->cluster_size);
    void *zeroes = calloc(1, q->cluster_size);
    int err = zeroes ? node_pwrite(q->node.file, zeroes, q->cluster_size, host, 0) : -ENOMEM;
    free(zeroes);
    for (uint64_t at = 0; !err && at < q->cluster_size; at += q->refcounts.slice_bytes) {
        struct slice *slice;
        err = cache_get_new(&q->refcounts, host + at, &slice);
        if (err)
            break;
        for (uint64_t i = 0; i < entries_per_slice(q) && at / 2 + i < used; i++)
            refcount_write(q, slice, i, 1);
        cache_put(slice);
    }
    return err;
}

/* Make the block for table entry `entry` of which nothing is in use: it lies in the first cluster that it counts,
 * so it counts itself and needs no other block. */
static int make_block(struct qcow2 *q, uint64_t entry)
{
    uint64_t host = entry << q->refblock_bits << q->cluster_bits;
    int err = new_block(q, host, 1);
    if (!err)
        err = metadata_add(q, host, 1);
    if (err)
        return err;
    q->reftable[entry] = host;
    q->reftable_dirty[entry * 8 / TABLE_PART] = q->any_reftable_dirty = true;
    return 0;
}

/* Put `table` in the place of the present one; the next flush writes it and then makes the header name it.  The old
 * one's clusters are free when that is durable. */
static void replace_table(struct qcow2 *q, uint64_t *table, bool *dirty, uint64_t host, uint32_t clusters)
{
    for (uint64_t c = 0; c < q->reftable_clusters; c++)
        (void)pending_push(&q->dropped, (q->reftable_offset >> q->cluster_bits) + c, 0);      /* else it leaks */
    free(q->reftable);
    free(q->reftable_dirty);
    q->reftable = table;
    q->reftable_dirty = dirty;
    q->reftable_entries = clusters * q->cluster_size / 8;
    memset(dirty, true, q->reftable_entries * 8 / TABLE_PART + 1);
    q->any_reftable_dirty = q->header_stale = true;
    q->reftable_offset = host;
    q->reftable_clusters = clusters;
    raise_file_end(q, host + clusters * q->cluster_size);
}

/* Give the table at least `needed` entries.  The new table lies behind everything in use, with the blocks that count
 * the table and themselves in front of it: [blocks][table], from the first cluster of an unused block's span. */
static int grow_table(struct qcow2 *q, uint64_t needed)
{
    uint64_t per_cluster = q->cluster_size / 8, per_block = UINT64_C(1) << q->refblock_bits;
    uint64_t first_entry = q->reftable_entries;      /* the blocks' first entry: a span that no block counted yet */
    uint64_t start = first_entry << q->refblock_bits, clusters, blocks, total;
    if (needed < q->reftable_entries * 3 / 2)
        needed = q->reftable_entries * 3 / 2;
    for (blocks = 1;; blocks++) {
        uint64_t entries = needed > first_entry + blocks ? needed : first_entry + blocks;
        clusters = (entries + per_cluster - 1) / per_cluster;
        total = blocks + clusters;
        if (total <= blocks * per_block)
            break;
    }
    if (clusters * q->cluster_size > UINT64_C(8) << 20)
        return -EFBIG;
    uint64_t *table = calloc(clusters, q->cluster_size);
    bool *dirty = calloc(clusters * q->cluster_size / TABLE_PART + 1, 1);
    int err = table && dirty ? 0 : -ENOMEM;
    for (uint64_t b = 0; b < blocks && !err; b++) {
        uint64_t host = (start + b) << q->cluster_bits, counted = b * per_block;
        err = new_block(q, host, total > counted ? total - counted : 0);
        if (!err)
            table[first_entry + b] = host;
    }
    if (!err)
        err = metadata_add(q, start << q->cluster_bits, total);
    if (err) {
        for (uint64_t c = 0; c < total; c++)
            metadata_remove(q, start + c);
        free(table);
        free(dirty);
        return err;
    }
    memcpy(table, q->reftable, q->reftable_entries * 8);
    replace_table(q, table, dirty, (start + blocks) << q->cluster_bits, (uint32_t)clusters);
    return 0;
}

enum { BLOCK_MADE = 1 };

/* The slice with the refcount of `cluster`, making its block if need be.  BLOCK_MADE: it was just made, and the search
 * for free clusters must start over, because the block took one. */
static int refcount_slice_for_write(struct qcow2 *q, uint64_t cluster, struct slice **slice, uint64_t *index)
{
    uint64_t entry = cluster >> q->refblock_bits;
    int err = refcount_slice(q, cluster, slice, index);
    if (err != -ENOENT)
        return err;
    if (entry >= q->reftable_entries)
        err = grow_table(q, entry + 1);
    else
        err = make_block(q, entry);
    return err ? err : BLOCK_MADE;
}

/* ---- allocation ---- */

/* Count free clusters from `cluster` on, at most `want`, within the slice that holds its refcount. */
static int free_here(struct qcow2 *q, uint64_t cluster, uint64_t want, uint64_t *count, uint64_t *used)
{
    struct slice *slice;
    uint64_t index;
    int err = refcount_slice(q, cluster, &slice, &index);
    *count = *used = 0;
    if (err == -ENOENT) {
        uint64_t block = UINT64_C(1) << q->refblock_bits;
        *count = block - (cluster & (block - 1));
        if (*count > want)
            *count = want;
        return 0;
    }
    if (err)
        return err;
    uint64_t entries = entries_per_slice(q);
    while (index < entries && refcount_read(slice, index)) {
        index++;
        ++*used;
    }
    while (!*used && index < entries && *count < want && !refcount_read(slice, index)) {
        index++;
        ++*count;
    }
    cache_put(slice);
    return 0;
}

/* The first free cluster at or after the hint, and how many are free from there, at most `want`. */
static int find_free(struct qcow2 *q, uint64_t want, uint64_t *first, uint64_t *count)
{
    uint64_t cluster = q->free_hint, more, used;
    for (;;) {
        int err = free_here(q, cluster, want, count, &used);
        if (err)
            return err;
        if (*count)
            break;
        cluster += used;
    }
    q->free_hint = *first = cluster;
    while (*count < want) {
        int err = free_here(q, cluster + *count, want - *count, &more, &used);
        if (err)
            return err;
        if (!more)
            break;
        *count += more;
    }
    return 0;
}

/* Clusters that count as free must not hold metadata, the header's included. */
static int check_free(struct qcow2 *q, uint64_t first, uint64_t count)
{
    for (uint64_t cluster = first; cluster < first + count; cluster++)
        if (metadata_has(q, cluster))
            return qcow2_damaged(q, NB_FAULT_REFCOUNT, cluster << q->cluster_bits, 0);
    return 0;
}

static int take(struct qcow2 *q, uint64_t first, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        struct slice *slice;
        uint64_t index;
        int err = refcount_slice_for_write(q, first + i, &slice, &index);
        if (err) {
            refcount_release(q, first << q->cluster_bits, i);
            return err;
        }
        refcount_write(q, slice, index, 1);
        cache_put(slice);
    }
    return 0;
}

int refcount_allocate(struct qcow2 *q, uint64_t want, uint64_t *host, uint64_t *got, bool *virgin)
{
    uint64_t first = 0, count = 0;
    int err;
    do {
        err = find_free(q, want, &first, &count);
        if (!err)
            err = check_free(q, first, count);
        if (!err)
            err = take(q, first, count);
    } while (err == BLOCK_MADE);
    if (err)
        return err;
    uint64_t end = (first + count) << q->cluster_bits;
    *host = first << q->cluster_bits;
    *got = count;
    *virgin = *host >= atomic_load(&q->file_end);
    raise_file_end(q, end);
    q->free_hint = first + count;
    return 0;
}

static int decrease(struct qcow2 *q, uint64_t cluster)
{
    struct slice *slice;
    uint64_t index;
    int err = refcount_slice(q, cluster, &slice, &index);
    if (err == -ENOENT)
        return qcow2_damaged(q, NB_FAULT_REFCOUNT, cluster << q->cluster_bits, 0);
    if (err)
        return err;
    uint64_t count = refcount_read(slice, index);
    if (count == 0) {
        cache_put(slice);
        return qcow2_damaged(q, NB_FAULT_REFCOUNT, cluster << q->cluster_bits, 0);
    }
    refcount_write(q, slice, index, count - 1);
    cache_put(slice);
    if (count == 1) {
        metadata_remove(q, cluster);
        if (cluster < q->free_hint)
            q->free_hint = cluster;
        /* Best effort: space that cannot be given back is still free for the image itself. */
        (void)node_discard(q->node.file, q->cluster_size, cluster << q->cluster_bits);
    }
    return 0;
}

void refcount_release(struct qcow2 *q, uint64_t host, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        (void)decrease(q, (host >> q->cluster_bits) + i);      /* on failure the cluster leaks */
}

/* ---- pending frees ---- */

int pending_push(struct pending_list *list, uint64_t cluster, uint64_t epoch)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 64;
        struct pending_free *items = realloc(list->items, capacity * sizeof *items);
        if (!items)
            return -ENOMEM;
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->count++] = (struct pending_free) { .cluster = cluster, .epoch = epoch };
    return 0;
}

int refcount_drop_entry(struct qcow2 *q, uint64_t entry)
{
    if (entry & FLAG_COMPRESSED) {
        uint64_t offset = entry & ((UINT64_C(1) << q->compressed_shift) - 1);
        uint64_t sectors = ((entry & ~FLAG_COMPRESSED) >> q->compressed_shift) + 1;
        uint64_t last = (offset / 512 * 512 + sectors * 512 - 1) >> q->cluster_bits;
        size_t before = q->dropped.count;
        for (uint64_t c = offset >> q->cluster_bits; c <= last; c++) {
            int err = pending_push(&q->dropped, c, 0);
            if (err) {
                q->dropped.count = before;      /* the entry stays, so do all of its references */
                return err;
            }
        }
        return 0;
    }
    uint64_t host = entry & L2_OFFSET_MASK;
    return host ? pending_push(&q->dropped, host >> q->cluster_bits, 0) : 0;
}

int refcount_reclaim(struct qcow2 *q)
{
    int err = 0;
    size_t kept = 0;
    for (size_t i = 0; i < q->durable.count; i++) {
        struct pending_free item = q->durable.items[i];
        if (epoch_is_over(q, item.epoch))
            err = decrease(q, item.cluster) ? -EIO : err;
        else
            q->durable.items[kept++] = item;
    }
    q->durable.count = kept;
    return err;
}

/* ---- opening ---- */

int refcount_open(struct qcow2 *q, struct nb_fault *fault)
{
    q->reftable_offset = q->layout.reftable_offset;
    q->reftable_clusters = q->layout.reftable_clusters;
    uint64_t bytes = (uint64_t)q->reftable_clusters << q->cluster_bits, end = atomic_load(&q->file_end);
    if (q->reftable_offset > end || bytes > end - q->reftable_offset) {
        *fault = (struct nb_fault) { .kind = NB_FAULT_TRUNCATED, .offset = q->reftable_offset, .value = end };
        return -EUCLEAN;
    }
    q->reftable_entries = bytes / 8;
    q->reftable = malloc(bytes);
    q->reftable_dirty = calloc(bytes / TABLE_PART + 1, 1);
    if (!q->reftable || !q->reftable_dirty)
        return -ENOMEM;
    int err = node_pread(q->node.file, q->reftable, bytes, q->reftable_offset);
    for (uint64_t i = 0; !err && i < q->reftable_entries; i++) {
        uint64_t entry = q->reftable[i] = __builtin_bswap64(q->reftable[i]);
        if (entry & (q->cluster_size - 1) || entry >= end) {
            *fault = (struct nb_fault) { .kind = NB_FAULT_REFTABLE_ENTRY, .index = i, .value = entry,
                                         .offset = q->reftable_offset + i * 8 };
            err = -EUCLEAN;
        }
    }
    return err;
}
