/* Which clusters of the file hold metadata: header, L1, L2 tables, refcount table and blocks.
 *
 * An image may come from anywhere.  Guest data in a metadata cluster would let the guest read and write the tables
 * that say what it may touch, and a cluster that metadata uses but the refcounts call free would be given away.  So
 * every L2 entry and every allocation is looked up here.
 *
 * An open-addressed hash set of cluster numbers.  metadata_has takes no lock; changes happen under meta_lock.  A table
 * that becomes too small is replaced and kept until the image is closed, for those who are still reading it: together
 * they are no larger than the last.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>

enum { FIRST_SLOTS = 64 };

/* Slots hold cluster + 1; 0: never used. */
#define REMOVED UINT64_MAX

struct metadata_table {
    struct metadata_table *former;
    size_t mask, used;             /* used: slots that are not 0; under meta_lock */
    _Atomic uint64_t slots[];
};

static size_t slot_of(const struct metadata_table *table, uint64_t cluster)
{
    return (cluster * UINT64_C(0x9e3779b97f4a7c15) >> 32) & table->mask;
}

bool metadata_has(const struct qcow2 *q, uint64_t cluster)
{
    const struct metadata_table *table = atomic_load_explicit(&q->metadata, memory_order_acquire);
    for (size_t slot = slot_of(table, cluster);; slot = (slot + 1) & table->mask) {
        uint64_t value = atomic_load_explicit(&table->slots[slot], memory_order_relaxed);
        if (!value || value == cluster + 1)
            return value;
    }
}

static void insert(struct metadata_table *table, uint64_t cluster)
{
    size_t slot = slot_of(table, cluster);
    while (atomic_load_explicit(&table->slots[slot], memory_order_relaxed))
        slot = (slot + 1) & table->mask;
    atomic_store_explicit(&table->slots[slot], cluster + 1, memory_order_relaxed);
    table->used++;
}

/* A table twice as large in the place of a half full one (or the first). */
static int make_room(struct qcow2 *q)
{
    struct metadata_table *old = atomic_load_explicit(&q->metadata, memory_order_relaxed);
    if (old && old->used < (old->mask + 1) / 2)
        return 0;
    size_t slots = old ? 2 * (old->mask + 1) : FIRST_SLOTS;
    struct metadata_table *table = calloc(1, sizeof *table + slots * sizeof *table->slots);
    if (!table)
        return -ENOMEM;
    table->former = old;
    table->mask = slots - 1;
    for (size_t i = 0; old && i <= old->mask; i++) {
        uint64_t value = atomic_load_explicit(&old->slots[i], memory_order_relaxed);
        if (value && value != REMOVED)
            insert(table, value - 1);
    }
    atomic_store_explicit(&q->metadata, table, memory_order_release);
    return 0;
}

int metadata_add(struct qcow2 *q, uint64_t host, uint64_t clusters)
{
    uint64_t first = host >> q->cluster_bits;
    int err = 0;
    for (uint64_t cluster = first; cluster < first + clusters && !err; cluster++) {
        err = make_room(q);
        if (!err && !metadata_has(q, cluster))
            insert(atomic_load_explicit(&q->metadata, memory_order_relaxed), cluster);
    }
    return err;
}

void metadata_remove(struct qcow2 *q, uint64_t cluster)
{
    struct metadata_table *table = atomic_load_explicit(&q->metadata, memory_order_relaxed);
    for (size_t slot = slot_of(table, cluster);; slot = (slot + 1) & table->mask) {
        uint64_t value = atomic_load_explicit(&table->slots[slot], memory_order_relaxed);
        if (value == cluster + 1)
            atomic_store_explicit(&table->slots[slot], REMOVED, memory_order_relaxed);
        if (!value || value == cluster + 1)
            return;
    }
}

int metadata_init(struct qcow2 *q)
{
    uint64_t l1_bytes = (uint64_t)q->layout.l1_entries * 8;
    int err = metadata_add(q, 0, 1);
    if (!err)
        err = metadata_add(q, q->layout.l1_offset, (l1_bytes + q->cluster_size - 1) >> q->cluster_bits);
    if (!err)
        err = metadata_add(q, q->layout.reftable_offset, q->layout.reftable_clusters);
    for (uint64_t i = 0; i < q->layout.l1_entries && !err; i++) {
        uint64_t table = atomic_load_explicit(&q->l1[i], memory_order_relaxed) & L1_OFFSET_MASK;
        if (table)
            err = metadata_add(q, table, 1);
    }
    for (uint64_t i = 0; i < q->reftable_entries && !err; i++)
        if (q->reftable[i])
            err = metadata_add(q, q->reftable[i], 1);
    return err;
}

void metadata_free(struct qcow2 *q)
{
    struct metadata_table *table = atomic_load_explicit(&q->metadata, memory_order_relaxed);
    while (table) {
        struct metadata_table *former = table->former;
        free(table);
        table = former;
    }
}
