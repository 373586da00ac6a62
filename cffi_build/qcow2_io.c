/* Requests on a qcow2 layer, and its opening and closing.
 *
 * Overwrites of clusters that are ours alone go straight to the file.  Everything that changes the mapping holds the
 * guest clusters it changes in `clusters`, looks them up again under that lock, moves data with no metadata lock
 * held, and links the result in one step under meta_lock.
 */
#include "qcow2.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { INCOMPATIBLE_OFFSET = 72, INCOMPATIBLE_CORRUPT = 2 };

/* ---- damage ---- */

/* Set the corrupt bit in the header (version 3 has one). */
static int mark_corrupt_on_disk(struct qcow2 *q)
{
    uint64_t features;
    int err = node_pread(q->node.file, &features, 8, INCOMPATIBLE_OFFSET);
    if (err)
        return err;
    features |= __builtin_bswap64(INCOMPATIBLE_CORRUPT);
    err = node_pwrite(q->node.file, &features, 8, INCOMPATIBLE_OFFSET, 0);
    return err ? err : node_flush(q->node.file);
}

int qcow2_damaged(struct qcow2 *q, uint32_t fault, uint64_t index_or_offset, uint64_t value)
{
    if (!atomic_exchange(&q->corrupt, true)) {
        int err = q->writable && q->layout.version >= 3 ? mark_corrupt_on_disk(q) : 0;
        ring_post(NB_EVENT_CORRUPT, err, q->node.id, fault, index_or_offset, value);
    }
    return -EIO;
}

/* ---- reading ---- */

static int read_from_compressed(struct qcow2 *q, const struct run *run, char *buf, uint64_t offset)
{
    char *cluster = malloc(q->cluster_size);
    int err = cluster ? qcow2_read_compressed(q, run->entry, cluster_start(q, offset), cluster) : -ENOMEM;
    if (!err)
        memcpy(buf, cluster + (offset - cluster_start(q, offset)), run->length);
    free(cluster);
    return err;
}

static int read_run(struct qcow2 *q, const struct run *run, char *buf, uint64_t offset)
{
    switch (run->kind) {
    case RUN_DATA:
        return node_pread(q->node.file, buf, run->length, run->host_offset);
    case RUN_ZERO:
        memset(buf, 0, run->length);
        return 0;
    case RUN_ABSENT:
        return node_pread_padded(q->node.backing, buf, run->length, offset);
    case RUN_COMPRESSED:
        return read_from_compressed(q, run, buf, offset);
    }
    abort();
}

static int read_range(struct qcow2 *q, char *buf, uint64_t count, uint64_t offset)
{
    int err = 0;
    while (count && !err) {
        struct run run;
        err = qcow2_lookup(q, offset, count, &run);
        if (!err)
            err = read_run(q, &run, buf, offset);
        if (err)
            break;
        buf += run.length;
        offset += run.length;
        count -= run.length;
    }
    return err;
}

static int qcow2_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    struct qcow2 *q = qcow2_of(node);
    if (!q->writable)
        return read_range(q, buf, count, offset);
    unsigned long epoch = epoch_enter(q);
    int err = read_range(q, buf, count, offset);
    epoch_leave(q, epoch);
    return err;
}

/* ---- writing where space must be allocated ---- */

/* An allocation in progress: `length` bytes from `offset` go into `clusters` host clusters at `host`. */
struct allocation {
    uint64_t offset, length;
    uint64_t start, end;          /* of the guest clusters */
    uint64_t host;
    bool reused;                  /* the host clusters of preallocated zeroes, already ours */
    bool virgin;                  /* never written: read as zeroes */
};

/* Whether bytes of a backing file show where this layer has none: those of the one below, or of one that the header
 * names and that others, who open the image with it, will see. */
static bool shows_backing(const struct qcow2 *q)
{
    return q->node.backing || q->layout.names_backing;
}

/* Does [offset, offset+count), which is not data of this layer, read as zeroes, whoever opens the image? */
static bool reads_as_zeroes(struct qcow2 *q, enum run_kind kind, uint64_t offset, uint64_t count)
{
    struct nb_extent extent;
    if (kind == RUN_ZERO)
        return true;
    if (kind != RUN_ABSENT)
        return false;
    if (!q->node.backing)
        return !shows_backing(q);
    while (count) {
        if (node_status(q->node.backing, NULL, offset, count, &extent) || !(extent.flags & NB_EXTENT_ZERO))
            return false;
        /* An empty answer: beyond the end of every layer. */
        if (!extent.length || extent.length >= count)
            return true;
        offset += extent.length;
        count -= extent.length;
    }
    return true;
}

/* What the guest sees now in [offset, offset+count); beyond the disk's end: zeroes. */
static int read_old(struct qcow2 *q, char *buf, uint64_t count, uint64_t offset)
{
    uint64_t inside = offset >= q->node.size ? 0 : q->node.size - offset < count ? q->node.size - offset : count;
    memset(buf + inside, 0, count - inside);
    return inside ? read_range(q, buf, inside, offset) : 0;
}

/* Head, data and tail in one write. */
static int write_with_edges(struct qcow2 *q, const struct allocation *a, const char *buf, uint64_t head,
                            uint64_t tail)
{
    uint64_t whole = head + a->length + tail, from = a->offset - head;
    char *bounce = malloc(whole);
    int err = bounce ? 0 : -ENOMEM;
    if (!err && head && tail && a->length <= head + tail) {
        err = read_old(q, bounce, whole, from);      /* one read is cheaper than two, though it reads what is replaced */
    } else {
        if (!err && head)
            err = read_old(q, bounce, head, from);
        if (!err && tail)
            err = read_old(q, bounce + head + a->length, tail, a->offset + a->length);
    }
    if (!err) {
        memcpy(bounce + head, buf, a->length);
        err = node_pwrite(q->node.file, bounce, whole, a->host + (from - a->start), 0);
    }
    free(bounce);
    return err;
}

/* Large requests: the edges apart, so that the data is not copied. */
static int write_edges_apart(struct qcow2 *q, const struct allocation *a, const char *buf, uint64_t head,
                             uint64_t tail)
{
    uint64_t larger = head > tail ? head : tail, after = a->offset + a->length;
    char *edge = malloc(larger);
    int err = edge ? 0 : -ENOMEM;
    if (!err && head) {
        err = read_old(q, edge, head, a->start);
        if (!err)
            err = node_pwrite(q->node.file, edge, head, a->host, 0);
    }
    if (!err && tail) {
        err = read_old(q, edge, tail, after);
        if (!err)
            err = node_pwrite(q->node.file, edge, tail, a->host + (after - a->start), 0);
    }
    free(edge);
    return err ? err : node_pwrite(q->node.file, buf, a->length, a->host + (a->offset - a->start), 0);
}

/* Fill the new clusters: the guest's data, and around it what was there before. */
static int fill_clusters(struct qcow2 *q, const struct allocation *a, enum run_kind old, const char *buf)
{
    enum { COPY_LIMIT = 256 << 10 };
    uint64_t after = a->offset + a->length, head = a->offset - a->start, tail = a->end - after;
    if (a->virgin && head && reads_as_zeroes(q, old, a->start, head))
        head = 0;
    if (a->virgin && tail && reads_as_zeroes(q, old, after, tail))
        tail = 0;
    if (!head && !tail)
        return node_pwrite(q->node.file, buf, a->length, a->host + (a->offset - a->start), 0);
    if (head + a->length + tail <= COPY_LIMIT)
        return write_with_edges(q, a, buf, head, tail);
    return write_edges_apart(q, a, buf, head, tail);
}

/* Point the guest clusters to the new host clusters; what they pointed to becomes pending. */
static int link_clusters(struct qcow2 *q, const struct allocation *a, struct slice *slice, size_t index)
{
    int err = 0;
    pthread_mutex_lock(&q->meta_lock);
    for (uint64_t at = a->start; at < a->end && !err; at += q->cluster_size, index++) {
        uint64_t old = __builtin_bswap64(atomic_load_explicit(&slice->words[index], memory_order_relaxed));
        if (!a->reused)
            err = refcount_drop_entry(q, old);
        if (!err)
            atomic_store_explicit(&slice->words[index],
                                  __builtin_bswap64((a->host + (at - a->start)) | FLAG_COPIED), memory_order_release);
    }
    mark_dirty(q, &q->l2, slice);
    pthread_mutex_unlock(&q->meta_lock);
    return err;
}

/* Find host clusters for the run at a->offset; shortens a->length to what they hold. */
static int allocate(struct qcow2 *q, const struct run *run, struct allocation *a)
{
    uint64_t got, skip = a->offset - a->start;
    a->end = cluster_end(q, a->offset + run->length);
    pthread_mutex_lock(&q->meta_lock);
    a->reused = run->kind == RUN_ZERO && run->in_place && epoch_is_over(q, q->zeroed_epoch);
    int err = a->reused ? 0 : refcount_allocate(q, (a->end - a->start) >> q->cluster_bits, &a->host, &got, &a->virgin);
    pthread_mutex_unlock(&q->meta_lock);
    if (err)
        return err;
    if (a->reused) {
        a->host = run->host_offset - skip;
        return 0;
    }
    if (a->start + (got << q->cluster_bits) < a->end) {
        a->end = a->start + (got << q->cluster_bits);
        a->length = a->end - a->offset;
    }
    return 0;
}

static int write_new_locked(struct qcow2 *q, const char *buf, struct allocation *a, const struct run *run)
{
    struct slice *slice;
    size_t index;
    int err = qcow2_l2_slice_for_write(q, a->offset, &slice, &index);
    if (err)
        return err;
    a->length = run->length;
    err = allocate(q, run, a);
    if (!err) {
        err = fill_clusters(q, a, run->kind, buf);
        if (!err)
            err = link_clusters(q, a, slice, index);
        else if (!a->reused) {
            pthread_mutex_lock(&q->meta_lock);
            refcount_release(q, a->host, (a->end - a->start) >> q->cluster_bits);
            pthread_mutex_unlock(&q->meta_lock);
        }
    }
    cache_put(slice);
    return err;
}

/* Write the first part of [offset, offset+count), of which the first cluster needs space; *done: how much. */
static int write_allocating(struct qcow2 *q, const char *buf, uint64_t count, uint64_t offset, uint64_t *done)
{
    uint64_t span = (uint64_t)q->l2.slice_bytes / 8 << q->cluster_bits, left = span - offset % span;
    struct allocation a = { .offset = offset, .start = cluster_start(q, offset) };
    struct range_hold hold;
    struct run run;
    if (count > left)
        count = left;
    range_lock(&q->clusters, &hold, a.start, cluster_end(q, offset + count), true);
    int err = qcow2_lookup(q, offset, count, &run);
    if (!err && run.kind == RUN_DATA && run.in_place) {
        a.length = run.length;      /* somebody else allocated it meanwhile */
        err = node_pwrite(q->node.file, buf, run.length, run.host_offset, 0);
    } else if (!err) {
        err = write_new_locked(q, buf, &a, &run);
    }
    range_unlock(&q->clusters, &hold);
    *done = a.length;
    return err ? err : qcow2_relieve(q);
}

static int write_range(struct qcow2 *q, const char *buf, uint64_t count, uint64_t offset)
{
    int err = atomic_load_explicit(&q->corrupt, memory_order_relaxed) ? -EIO : 0;
    while (count && !err) {
        struct run run;
        unsigned long epoch = epoch_enter(q);
        err = qcow2_lookup(q, offset, count, &run);
        uint64_t done = run.length;
        bool in_place = !err && run.kind == RUN_DATA && run.in_place;
        if (in_place)
            err = node_pwrite(q->node.file, buf, done, run.host_offset, 0);
        epoch_leave(q, epoch);
        if (!err && !in_place)
            err = write_allocating(q, buf, done, offset, &done);
        if (err)
            break;
        buf += done;
        offset += done;
        count -= done;
    }
    return err;
}

static int qcow2_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    struct qcow2 *q = qcow2_of(node);
    int err = write_range(q, buf, count, offset);
    if (!err && (flags & NB_REQ_FUA))
        err = node_flush(node);
    return err;
}

/* ---- zero and discard ---- */

/* The entry that makes a cluster read as zeroes.  keep: leave its space allocated.  Without a backing file an entry
 * of 0 does; over one it would show the backing file's bytes. */
static uint64_t zero_entry(const struct qcow2 *q, uint64_t old, bool keep)
{
    uint64_t host = old & FLAG_COMPRESSED ? 0 : old & L2_OFFSET_MASK;
    if (keep && host && (old & FLAG_COPIED))
        return host | FLAG_COPIED | FLAG_ZERO;
    if (!(old & ~FLAG_COPIED) && !shows_backing(q))
        return 0;
    if (old == FLAG_ZERO)
        return old;
    return shows_backing(q) || keep ? FLAG_ZERO : 0;
}

static int zero_entries(struct qcow2 *q, struct slice *slice, size_t index, uint64_t clusters, bool keep)
{
    bool changed = false;
    int err = 0;
    pthread_mutex_lock(&q->meta_lock);
    for (uint64_t i = 0; i < clusters && !err; i++) {
        uint64_t old = __builtin_bswap64(atomic_load_explicit(&slice->words[index + i], memory_order_relaxed));
        uint64_t new = zero_entry(q, old, keep);
        err = qcow2_check_entry(q, slice, index + i, old);
        if (err)
            break;
        if (new == old)
            continue;
        if (!(new & L2_OFFSET_MASK))
            err = refcount_drop_entry(q, old);
        if (err)
            break;
        atomic_store_explicit(&slice->words[index + i], __builtin_bswap64(new), memory_order_release);
        changed = true;
    }
    if (changed) {
        mark_dirty(q, &q->l2, slice);
        q->zeroed_epoch = atomic_load(&q->epochs.current);
    }
    pthread_mutex_unlock(&q->meta_lock);
    return err;
}

/* Whole clusters inside one slice's span. */
static int zero_span(struct qcow2 *q, uint64_t offset, uint64_t count, bool keep)
{
    struct range_hold hold;
    struct slice *slice;
    size_t index;
    range_lock(&q->clusters, &hold, offset, offset + count, true);
    int err = qcow2_l2_slice(q, offset, &slice, &index);
    bool nothing_to_do = err == -ENOENT && reads_as_zeroes(q, RUN_ABSENT, offset, count);
    if (nothing_to_do)
        err = 0;
    else {
        if (!err)
            cache_put(slice);
        err = err && err != -ENOENT ? err : qcow2_l2_slice_for_write(q, offset, &slice, &index);
        if (!err) {
            err = zero_entries(q, slice, index, count >> q->cluster_bits, keep);
            cache_put(slice);
        }
    }
    range_unlock(&q->clusters, &hold);
    return err ? err : qcow2_relieve(q);
}

static int zero_clusters(struct qcow2 *q, uint64_t count, uint64_t offset, bool keep)
{
    uint64_t span = (uint64_t)q->l2.slice_bytes / 8 << q->cluster_bits;
    int err = 0;
    while (count && !err) {
        uint64_t left = span - offset % span, part = count < left ? count : left;
        err = zero_span(q, offset, part, keep);
        offset += part;
        count -= part;
    }
    return err;
}

/* Part of a cluster: nothing to do if it reads as zeroes already, else written. */
static int zero_part(struct qcow2 *q, uint64_t count, uint64_t offset, bool fast)
{
    struct run run;
    unsigned long epoch = epoch_enter(q);
    int err = qcow2_lookup(q, offset, count, &run);
    bool zero = !err && reads_as_zeroes(q, run.kind, offset, count);
    epoch_leave(q, epoch);
    if (err || zero)
        return err;
    if (fast)
        return -EOPNOTSUPP;
    void *zeroes = calloc(1, count);
    err = zeroes ? write_range(q, zeroes, count, offset) : -ENOMEM;
    free(zeroes);
    return err;
}

/* The whole clusters of a request; the disk's last one counts as whole when the request reaches the disk's end. */
static void whole_clusters(const struct qcow2 *q, uint64_t count, uint64_t offset, uint64_t *start, uint64_t *end)
{
    uint64_t request_end = offset + count;
    *start = cluster_end(q, offset);
    *end = request_end == q->node.size ? cluster_end(q, request_end) : cluster_start(q, request_end);
    if (*end < *start)
        *end = *start;
}

static int qcow2_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct qcow2 *q = qcow2_of(node);
    uint64_t start, end, request_end = offset + count;
    bool keep = !(flags & NB_REQ_MAY_UNMAP) || !(node->flags & NB_NODE_UNMAP), fast = flags & NB_REQ_FAST;
    int err = atomic_load(&q->corrupt) ? -EIO : 0;
    if (err)
        return err;
    if (q->layout.version < 3 && (shows_backing(q) || keep))
        return -EOPNOTSUPP;      /* version 2 has no zero flag */
    whole_clusters(q, count, offset, &start, &end);
    if (start == end && cluster_start(q, offset) == cluster_start(q, request_end - 1))
        start = end = request_end;      /* inside one cluster */
    if (offset < start)
        err = zero_part(q, (start < request_end ? start : request_end) - offset, offset, fast);
    if (!err && end > start)
        err = zero_clusters(q, end - start, start, keep);
    if (!err && end < request_end)
        err = zero_part(q, request_end - end, end, fast && start == end);
    if (!err && (flags & NB_REQ_FUA))
        err = node_flush(node);
    return err;
}

static int qcow2_discard(struct node *node, uint64_t count, uint64_t offset)
{
    struct qcow2 *q = qcow2_of(node);
    uint64_t start, end;
    if (atomic_load(&q->corrupt))
        return -EIO;
    if (q->layout.version < 3 && shows_backing(q))
        return 0;      /* freeing the cluster would bring the backing file's bytes back */
    whole_clusters(q, count, offset, &start, &end);
    return zero_clusters(q, end - start, start, false);
}

/* ---- the rest ---- */

static int qcow2_map(struct node *node, uint64_t offset, uint64_t count, struct mapping *out)
{
    static const enum map_kind kinds[] = { [RUN_DATA] = MAP_DATA, [RUN_ZERO] = MAP_ZERO, [RUN_ABSENT] = MAP_ABSENT,
                                           [RUN_COMPRESSED] = MAP_COMPRESSED };
    struct qcow2 *q = qcow2_of(node);
    struct run run;
    int err = qcow2_lookup(q, offset, count, &run);
    if (err)
        return err;
    *out = (struct mapping) { .kind = kinds[run.kind], .length = run.length,
                              .allocated = run.kind == RUN_ZERO && run.host_offset };
    if (run.kind == RUN_DATA || out->allocated) {
        out->file = node->file;
        out->host_offset = run.host_offset;
    }
    return 0;
}

static int qcow2_op_flush(struct node *node)
{
    return qcow2_flush(qcow2_of(node));
}

static int qcow2_op_write_back(struct node *node)
{
    return qcow2_write_back(qcow2_of(node));
}

static void qcow2_close(struct node *node)
{
    struct qcow2 *q = qcow2_of(node);
    if (q->writable && q->l1 && q->reftable) {
        /* Twice: the first frees what was pending, the second writes the refcounts of that.  The owner has flushed
         * already and reported errors; a failure here leaks clusters. */
        (void)qcow2_flush(q);
        (void)qcow2_flush(q);
    }
    cache_destroy(&q->l2);
    cache_destroy(&q->refcounts);
    range_lock_destroy(&q->clusters);
    pthread_mutex_destroy(&q->meta_lock);
    pthread_mutex_destroy(&q->flush_lock);
    free((void *)q->l1);
    free(q->l1_dirty);
    free(q->reftable);
    free(q->reftable_dirty);
    free(q->dropped.items);
    free(q->durable.items);
    metadata_free(q);
}

static const struct node_ops qcow2_ops = {
    .driver = "qcow2",
    .pread = qcow2_pread,
    .pwrite = qcow2_pwrite,
    .zero = qcow2_zero,
    .discard = qcow2_discard,
    .flush = qcow2_op_flush,
    .map = qcow2_map,
    .write_back = qcow2_op_write_back,
    .close = qcow2_close,
};

/* ---- opening ---- */

static int read_l1(struct qcow2 *q, struct nb_fault *fault)
{
    uint64_t bytes = (uint64_t)q->layout.l1_entries * 8, end = atomic_load(&q->file_end);
    if (q->layout.l1_offset > end || bytes > end - q->layout.l1_offset) {
        *fault = (struct nb_fault) { .kind = NB_FAULT_TRUNCATED, .offset = q->layout.l1_offset, .value = end };
        return -EUCLEAN;
    }
    q->l1 = malloc(bytes ? bytes : 8);
    q->l1_dirty = calloc(bytes / 4096 + 1, 1);
    if (!q->l1 || !q->l1_dirty)
        return -ENOMEM;
    int err = bytes ? node_pread(q->node.file, (void *)q->l1, bytes, q->layout.l1_offset) : 0;
    for (uint64_t i = 0; !err && i < q->layout.l1_entries; i++) {
        uint64_t entry = __builtin_bswap64(atomic_load_explicit(&q->l1[i], memory_order_relaxed));
        uint64_t table = entry & L1_OFFSET_MASK;
        atomic_store_explicit(&q->l1[i], entry, memory_order_relaxed);
        if (entry & L1_RESERVED_MASK || table & (q->cluster_size - 1) || table >= end || (!table && entry)) {
            *fault = (struct nb_fault) { .kind = NB_FAULT_L1_ENTRY, .index = i, .value = entry,
                                         .offset = q->layout.l1_offset + i * 8 };
            err = -EUCLEAN;
        }
    }
    return err;
}

static void set_geometry(struct qcow2 *q, const struct nb_qcow2_layout *layout)
{
    q->layout = *layout;
    q->cluster_bits = layout->cluster_bits;
    q->cluster_size = UINT64_C(1) << layout->cluster_bits;
    q->l2_bits = layout->cluster_bits - 3;
    q->refblock_bits = layout->cluster_bits + 3 - layout->refcount_order;
    q->compressed_shift = 62 - (layout->cluster_bits - 8);
}

int nb_qcow2_open(struct node *file, struct node *backing, const struct nb_qcow2_layout *layout, uint32_t flags,
                  struct node **out, struct nb_fault *fault)
{
    enum { SLICE = 4096 };
    struct qcow2 *q = node_alloc(sizeof *q, &qcow2_ops, layout->size, flags, file, backing);
    uint64_t size;
    *fault = (struct nb_fault) { 0 };
    if (!q)
        return -ENOMEM;
    set_geometry(q, layout);
    q->writable = !(flags & NB_NODE_READ_ONLY);
    range_lock_init(&q->clusters);
    pthread_mutex_init(&q->meta_lock, NULL);
    pthread_mutex_init(&q->flush_lock, NULL);
    atomic_init(&q->epochs.current, 2);      /* so that current - 1 is never below 0 */
    size_t slice_bytes = q->cluster_size < SLICE ? q->cluster_size : SLICE;
    int err = cache_init(&q->l2, file, slice_bytes, layout->l2_cache_bytes);
    if (!err)
        err = cache_init(&q->refcounts, file, slice_bytes, layout->refcount_cache_bytes);
    if (!err)
        err = file_current_size(file, &size);
    if (err)
        goto failed;
    atomic_init(&q->file_end, cluster_end(q, size));
    err = read_l1(q, fault);
    if (!err && q->writable)
        err = refcount_open(q, fault);
    if (!err)
        err = metadata_init(q);
    if (err)
        goto failed;
    *out = &q->node;
    return 0;
failed:
    q->writable = false;      /* nothing to write back */
    nb_node_unref(&q->node);
    return err;
}
