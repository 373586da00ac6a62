/* Guest offset -> where its bytes lie in this layer.
 *
 * Lookups read L1 and L2 entries as atomic words and take no lock but, for an instant, the cache's.  Every entry is
 * checked when it is used: reserved bits, alignment, that it lies inside the file and not on metadata.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>

static uint64_t l1_index(const struct qcow2 *q, uint64_t offset)
{
    return offset >> (q->cluster_bits + q->l2_bits);
}

static uint64_t l2_index(const struct qcow2 *q, uint64_t offset)
{
    return (offset >> q->cluster_bits) & ((UINT64_C(1) << q->l2_bits) - 1);
}

/* Where the slice lies that holds l2_index of the table at `table`. */
static uint64_t slice_offset(const struct qcow2 *q, uint64_t table, uint64_t index)
{
    return table + index * 8 / q->l2.slice_bytes * q->l2.slice_bytes;
}

int qcow2_l2_slice(struct qcow2 *q, uint64_t offset, struct slice **slice, size_t *index)
{
    uint64_t table = atomic_load_explicit(&q->l1[l1_index(q, offset)], memory_order_acquire) & L1_OFFSET_MASK;
    uint64_t in_table = l2_index(q, offset);
    if (!table)
        return -ENOENT;
    *index = in_table % (q->l2.slice_bytes / 8);
    return cache_get(&q->l2, slice_offset(q, table, in_table), slice);
}

/* ---- classification ---- */

static bool inside_file(const struct qcow2 *q, uint64_t host, uint64_t length)
{
    uint64_t end = atomic_load_explicit(&q->file_end, memory_order_acquire);
    return host <= end && length <= end - host;
}

static bool compressed_is_sound(const struct qcow2 *q, uint64_t entry)
{
    uint64_t offset = entry & ((UINT64_C(1) << q->compressed_shift) - 1);
    return !(entry & FLAG_COPIED) && inside_file(q, offset, 1) && !metadata_has(q, offset >> q->cluster_bits);
}

static bool standard_is_sound(const struct qcow2 *q, uint64_t entry)
{
    uint64_t host = entry & L2_OFFSET_MASK;
    if (entry & L2_RESERVED_MASK)
        return false;
    if ((entry & FLAG_ZERO) && q->layout.version < 3)
        return false;
    if (!host)
        return !(entry & FLAG_COPIED);
    return !(host & (q->cluster_size - 1)) && inside_file(q, host, q->cluster_size)
        && !metadata_has(q, host >> q->cluster_bits);
}

static bool entry_is_sound(const struct qcow2 *q, uint64_t entry)
{
    if (entry & FLAG_COMPRESSED)
        return compressed_is_sound(q, entry);
    return standard_is_sound(q, entry);
}

static struct run classify(uint64_t entry)
{
    uint64_t host = entry & L2_OFFSET_MASK;
    if (entry & FLAG_COMPRESSED)
        return (struct run) { .kind = RUN_COMPRESSED, .entry = entry };
    if (entry & FLAG_ZERO)
        return (struct run) { .kind = RUN_ZERO, .in_place = host && entry & FLAG_COPIED, .host_offset = host };
    if (host)
        return (struct run) { .kind = RUN_DATA, .in_place = entry & FLAG_COPIED, .host_offset = host };
    return (struct run) { .kind = RUN_ABSENT };
}

/* ---- runs ---- */

/* Without an L2 table everything up to the next table's span is absent; so are further spans without one. */
static void absent_spans(struct qcow2 *q, uint64_t offset, uint64_t max, struct run *out)
{
    uint64_t span = UINT64_C(1) << (q->cluster_bits + q->l2_bits);
    uint64_t end = (offset & ~(span - 1)) + span;
    while (end - offset < max
           && !(atomic_load_explicit(&q->l1[l1_index(q, end)], memory_order_acquire) & L1_OFFSET_MASK))
        end += span;
    *out = (struct run) { .kind = RUN_ABSENT, .length = end - offset < max ? end - offset : max };
}

static bool continues(const struct qcow2 *q, const struct run *run, uint64_t entry, uint64_t distance)
{
    struct run next = classify(entry);
    (void)q;
    if (next.kind != run->kind || next.in_place != run->in_place)
        return false;
    if (run->kind == RUN_ABSENT)
        return true;
    return run->host_offset ? next.host_offset == run->host_offset + distance : !next.host_offset;
}

int qcow2_check_entry(struct qcow2 *q, const struct slice *slice, size_t index, uint64_t entry)
{
    if (entry_is_sound(q, entry))
        return 0;
    uint32_t fault = entry & FLAG_COMPRESSED ? NB_FAULT_COMPRESSED : NB_FAULT_L2_ENTRY;
    return qcow2_damaged(q, fault, slice->offset + index * 8, entry);
}

int qcow2_lookup(struct qcow2 *q, uint64_t offset, uint64_t max, struct run *out)
{
    struct slice *slice;
    size_t index;
    int err = qcow2_l2_slice(q, offset, &slice, &index);
    if (err == -ENOENT) {
        absent_spans(q, offset, max, out);
        return 0;
    }
    if (err)
        return err;
    uint64_t entry = __builtin_bswap64(atomic_load_explicit(&slice->words[index], memory_order_acquire));
    uint64_t skip = offset & (q->cluster_size - 1);
    err = qcow2_check_entry(q, slice, index, entry);
    if (err)
        goto out;
    *out = classify(entry);
    uint64_t length = q->cluster_size;
    if (out->kind != RUN_COMPRESSED) {
        size_t words = q->l2.slice_bytes / 8;
        while (length - skip < max && ++index < words) {
            entry = __builtin_bswap64(atomic_load_explicit(&slice->words[index], memory_order_acquire));
            if (!continues(q, out, entry, length) || !entry_is_sound(q, entry))
                break;      /* unsound: for whoever asks for that very cluster */
            length += q->cluster_size;
        }
    }
    out->length = length - skip < max ? length - skip : max;
    if (out->host_offset)
        out->host_offset += skip;
out:
    cache_put(slice);
    return err;
}

/* ---- making L2 tables ---- */

/* The table at `shared` as it is now, which may be newer than the file. */
static int copy_shared(struct qcow2 *q, uint64_t shared, uint64_t *words)
{
    size_t per_slice = q->l2.slice_bytes / 8;
    int err = 0;
    for (uint64_t at = 0; at < q->cluster_size && !err; at += q->l2.slice_bytes, words += per_slice) {
        struct slice *slice;
        err = cache_get(&q->l2, shared + at, &slice);
        if (err)
            break;
        for (size_t i = 0; i < per_slice; i++)
            words[i] = atomic_load_explicit(&slice->words[i], memory_order_relaxed);
        cache_put(slice);
    }
    return err;
}

/* Write the new table's content so that, once the flush order has made it durable, L1 may point to it.  Its slices
 * are clean: should this fail, none of them may be written over whoever gets the cluster then. */
static int fill_table(struct qcow2 *q, uint64_t table, uint64_t shared)
{
    uint64_t *words = calloc(1, q->cluster_size);
    size_t per_slice = q->l2.slice_bytes / 8;
    int err = words ? 0 : -ENOMEM;
    if (!err && shared)
        err = copy_shared(q, shared, words);
    if (!err)
        err = node_pwrite(q->node.file, words, q->cluster_size, table, 0);
    for (uint64_t at = 0; !err && at < q->cluster_size; at += q->l2.slice_bytes) {
        struct slice *slice;
        err = cache_get_new(&q->l2, table + at, &slice);
        if (err)
            break;
        for (size_t i = 0; i < per_slice; i++)
            atomic_store_explicit(&slice->words[i], words[at / 8 + i], memory_order_relaxed);
        cache_put(slice);
    }
    free(words);
    return err;
}

static int make_table_locked(struct qcow2 *q, uint64_t index)
{
    uint64_t old = atomic_load(&q->l1[index]), table, got, refcount = 1;
    bool virgin;
    uint64_t shared = old & L1_OFFSET_MASK;
    int err;
    if (shared) {
        err = refcount_get(q, shared >> q->cluster_bits, &refcount);
        if (err)
            return err;
    }
    if (shared && refcount == 1) {
        table = shared;      /* ours alone, though COPIED was missing */
    } else {
        err = refcount_allocate(q, 1, &table, &got, &virgin);
        if (err)
            return err;
        err = fill_table(q, table, shared);
        if (!err)
            err = metadata_add(q, table, 1);
        if (err) {
            refcount_release(q, table, 1);
            return err;
        }
        if (shared && (err = refcount_drop_entry(q, shared)))
            return err;
    }
    atomic_store_explicit(&q->l1[index], table | FLAG_COPIED, memory_order_release);
    q->l1_dirty[index * 8 / 4096] = q->any_l1_dirty = true;
    atomic_fetch_add(&q->changes, 1);
    return 0;
}

int qcow2_l2_slice_for_write(struct qcow2 *q, uint64_t offset, struct slice **slice, size_t *index)
{
    _Atomic uint64_t *entry = &q->l1[l1_index(q, offset)];
    int err = 0;
    if (!(atomic_load_explicit(entry, memory_order_acquire) & FLAG_COPIED)) {
        pthread_mutex_lock(&q->meta_lock);
        if (!(atomic_load(entry) & FLAG_COPIED))
            err = make_table_locked(q, l1_index(q, offset));
        pthread_mutex_unlock(&q->meta_lock);
    }
    return err ? err : qcow2_l2_slice(q, offset, slice, index);
}
