/* qcow2 inside the kernel: the state of one open layer and what its files offer one another.
 *
 *   qcow2_cache.c     bounded cache of table slices (L2 and refcount)
 *   qcow2_map.c       lookups: guest offset -> run; pure but for loading slices
 *   qcow2_refcount.c  refcounts, allocation and freeing of clusters
 *   qcow2_overlap.c   which clusters hold metadata
 *   qcow2_flush.c     the order in which metadata reaches the disk
 *   qcow2_compress.c  reading compressed clusters
 *   qcow2_io.c        requests: read, write, zero, discard, map; opening and closing
 *
 * Who may touch what
 * - meta_lock: refcounts, the refcount table, changes of L1 and L2 entries, the allocation hint, pending frees, the
 *   dirty marks of slices.  Metadata may be read from the file under it; guest data never moves under it.
 * - Reading L1 and L2 entries takes no lock: entries are atomic words.
 * - `clusters` (a range lock on guest offsets, cluster aligned, always exclusive) serialises requests that change the
 *   mapping of a cluster: allocating writes, zeroes, discards.  Reads and overwrites in place take no lock.
 * - flush_lock: one flush at a time.
 * Order: clusters, flush_lock, meta_lock, a cache shard's lock.
 *
 * Stale mappings.  A read or an overwrite in place uses a host offset after looking it up, so a cluster that a
 * discard freed meanwhile must not be given to anybody else until every request that may still use it has ended.
 * Such requests run inside an epoch (epoch_enter/leave); a freed cluster is pending until (1) the L2 entry that
 * dropped it is durable and (2) every request that began before that has left.  Only then is its refcount decreased
 * and the cluster free for reuse.  A crash in between leaks it, no more.
 *
 * Why overwrites in place need no lock against zero, discard and copy on write of the same cluster: they can only
 * meet a cluster that is being un-mapped while both requests are in flight, and then either order is right; the
 * late write lands in a pending cluster that nobody reads.  A cluster that was zeroed but stays allocated would be
 * read again once a write takes the zero flag away, and show the late write that was overtaken; so it is written in
 * place only when every request that began before the zeroing has ended (zeroed_epoch), else replaced.
 */
#ifndef NB_QCOW2_H
#define NB_QCOW2_H

#include <pthread.h>

#include "node.h"
#include "rangelock.h"

#define L1_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define L1_RESERVED_MASK UINT64_C(0x7f000000000001ff)
#define L2_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define L2_RESERVED_MASK UINT64_C(0x3f000000000001fe)
#define REFTABLE_RESERVED_MASK UINT64_C(0x1ff)
#define FLAG_COPIED (UINT64_C(1) << 63)
#define FLAG_COMPRESSED (UINT64_C(1) << 62)
#define FLAG_ZERO UINT64_C(1)

/* ---- cache ---- */

struct slice {
    uint64_t offset;              /* of its first byte in the file; immutable while it is in the cache */
    struct slice *next;           /* in its bucket */
    atomic_uint pins;             /* users; > 0: stays where it is */
    atomic_bool used;             /* since the clock hand last passed */
    bool loading, failed;         /* protected by the shard's lock */
    atomic_bool dirty;            /* changed under meta_lock, while pinned */
    _Atomic uint64_t *words;      /* the bytes as they are in the file (big endian) */
};

enum { CACHE_SHARDS = 16 };

struct cache_shard {
    _Alignas(64) pthread_mutex_t lock;
    pthread_cond_t loaded;
    struct slice **buckets;
    struct slice **slots;         /* every slice of the shard, for the clock hand */
    size_t slot_count, slot_capacity, hand;
};

struct cache {
    struct node *file;
    size_t slice_bytes;           /* power of two, 512..4096 */
    size_t bucket_count, slots_per_shard;
    size_t dirty;                 /* slices; protected by meta_lock */
    struct cache_shard shards[CACHE_SHARDS];
};

/* bytes: the bound on clean and dirty slices together; exceeded only while all are pinned or dirty. */
int cache_init(struct cache *cache, struct node *file, size_t slice_bytes, uint64_t bytes);
void cache_destroy(struct cache *cache);
/* Pin the slice at `offset` (a multiple of slice_bytes), reading it if need be.  Any thread. */
int cache_get(struct cache *cache, uint64_t offset, struct slice **out);
/* Pin the slice of a table that was just made: all zeroes, whatever the file or the cache held.  Under meta_lock. */
int cache_get_new(struct cache *cache, uint64_t offset, struct slice **out);
static inline void cache_put(struct slice *slice)
{
    atomic_fetch_sub_explicit(&slice->pins, 1, memory_order_release);
}
/* Pin every dirty slice; *out is malloced.  Returns their number or -ENOMEM.  Under meta_lock. */
long cache_collect_dirty(struct cache *cache, struct slice ***out);

/* ---- epochs ---- */

struct epoch_shard {
    _Alignas(64) atomic_uint active[2];
};

struct epochs {
    atomic_ulong current;
    struct epoch_shard shards[CACHE_SHARDS];
};

/* ---- the layer ---- */

/* A cluster whose reference was dropped and that may not be reused yet. */
struct pending_free {
    uint64_t cluster;             /* host cluster index */
    uint64_t epoch;               /* current when its L2 entry had become durable */
};

struct pending_list {
    struct pending_free *items;
    size_t count, capacity;
};

struct metadata_table;

struct qcow2 {
    struct node node;
    /* immutable after open */
    struct nb_qcow2_layout layout;
    uint32_t cluster_bits, l2_bits, refblock_bits;   /* log2 of: bytes per cluster, entries per L2 table, per block */
    uint64_t cluster_size;
    uint32_t compressed_shift;                        /* first bit of the sector count in a compressed entry */
    struct cache l2, refcounts;
    struct range_lock clusters;
    struct epochs epochs;
    bool writable;
    /* atomic */
    _Atomic uint64_t *l1;                             /* host endian; changed under meta_lock */
    _Atomic uint64_t file_end;                        /* end of the last cluster ever used: beyond, the file is virgin */
    _Atomic(struct metadata_table *) metadata;        /* replaced under meta_lock */
    atomic_bool corrupt;                              /* writes fail; the header says so on disk */
    /* protected by meta_lock */
    pthread_mutex_t meta_lock;
    uint64_t *reftable;                               /* host endian */
    uint64_t reftable_entries, reftable_offset;
    uint32_t reftable_clusters;
    bool *l1_dirty, *reftable_dirty;                  /* per 4096 bytes of the table */
    bool any_l1_dirty, any_reftable_dirty;
    bool header_stale;                                /* it names the refcount table's former place */
    unsigned long zeroed_epoch;                       /* current when a data cluster last became preallocated zeroes */
    uint64_t free_hint;                               /* no free cluster lies before it */
    struct pending_list dropped, durable;             /* dropped: L2 entry not durable yet; durable: waits for epochs */
    atomic_ulong changes;                             /* bumped by each change of metadata */
    /* protected by flush_lock */
    pthread_mutex_t flush_lock;
    atomic_ulong flush_asked;                         /* tickets; see qcow2_flush.c */
    unsigned long flush_done;
    int flush_error;
};

static inline struct qcow2 *qcow2_of(const struct node *node)
{
    return container_of(node, struct qcow2, node);
}

static inline uint64_t cluster_start(const struct qcow2 *q, uint64_t offset)
{
    return offset & ~(q->cluster_size - 1);
}

static inline uint64_t cluster_end(const struct qcow2 *q, uint64_t offset)
{
    return cluster_start(q, offset + q->cluster_size - 1);
}

/* Tell the loop about damaged metadata, stop writes to the image and, when it is writable, say so in its header.
 * Returns -EIO, for the request that met it. */
int qcow2_damaged(struct qcow2 *q, uint32_t fault, uint64_t index_or_offset, uint64_t value);

/* ---- map ---- */

enum run_kind { RUN_DATA, RUN_ZERO, RUN_ABSENT, RUN_COMPRESSED };

struct run {
    enum run_kind kind;
    bool in_place;                /* RUN_DATA: refcount 1, may be overwritten; RUN_ZERO: likewise its host cluster */
    uint64_t length;              /* bytes from the offset asked */
    uint64_t host_offset;         /* RUN_DATA: of the byte asked; RUN_ZERO: of it, 0 if none is allocated */
    uint64_t entry;               /* RUN_COMPRESSED: the L2 entry (length then ends with the cluster) */
};

/* The run at offset, at most max bytes.  0, -EIO (damaged metadata, reported), or the error of reading a table. */
int qcow2_lookup(struct qcow2 *q, uint64_t offset, uint64_t max, struct run *out);
/* Pin the slice that holds the L2 entry of `offset`; *index is the entry's in words.  -ENOENT without an L2 table. */
int qcow2_l2_slice(struct qcow2 *q, uint64_t offset, struct slice **slice, size_t *index);
/* The same, making the L2 table if there is none, or a private copy if it is shared. */
int qcow2_l2_slice_for_write(struct qcow2 *q, uint64_t offset, struct slice **slice, size_t *index);

/* 0, or -EIO when the L2 entry is damaged (reported).  Any thread. */
int qcow2_check_entry(struct qcow2 *q, const struct slice *slice, size_t index, uint64_t entry);

/* ---- refcounts ---- */

/* Read and check the refcount table.  -EUCLEAN with *fault. */
int refcount_open(struct qcow2 *q, struct nb_fault *fault);
/* Allocate up to `want` adjacent clusters: their first byte in *host, their number in *got.  *virgin: never written
 * before, so they read as zeroes.  Under meta_lock. */
int refcount_allocate(struct qcow2 *q, uint64_t want, uint64_t *host, uint64_t *got, bool *virgin);
/* Take back clusters that no entry ever referred to.  Under meta_lock. */
void refcount_release(struct qcow2 *q, uint64_t host, uint64_t count);
/* The L2 entry `entry` was overwritten: what it referred to becomes pending.  Under meta_lock. */
int refcount_drop_entry(struct qcow2 *q, uint64_t entry);
/* Decrease the refcounts of durable pending clusters that no request uses any more.  Under meta_lock. */
int refcount_reclaim(struct qcow2 *q);
int refcount_get(struct qcow2 *q, uint64_t cluster, uint64_t *value);
int pending_push(struct pending_list *list, uint64_t cluster, uint64_t epoch);

/* True once every request that began in `epoch` or before has left.  Under meta_lock. */
bool epoch_is_over(struct qcow2 *q, unsigned long epoch);
unsigned long epoch_enter(struct qcow2 *q);
void epoch_leave(struct qcow2 *q, unsigned long epoch);

/* ---- metadata clusters ---- */

/* Enter the metadata of an image that is being opened. */
int metadata_init(struct qcow2 *q);
void metadata_free(struct qcow2 *q);
/* True if the host cluster holds metadata.  Any thread. */
bool metadata_has(const struct qcow2 *q, uint64_t cluster);
/* `clusters` clusters from byte `host` on are metadata from now on.  -ENOMEM.  Under meta_lock. */
int metadata_add(struct qcow2 *q, uint64_t host, uint64_t clusters);
void metadata_remove(struct qcow2 *q, uint64_t cluster);

/* ---- flush ---- */

/* Make everything that ended before the call durable, in order.  Any thread. */
int qcow2_flush(struct qcow2 *q);
/* The same order of writes without waiting for the disk. */
int qcow2_write_back(struct qcow2 *q);
/* Called after a change, without meta_lock: flush when the caches hold too much that is dirty. */
int qcow2_relieve(struct qcow2 *q);
static inline void mark_dirty(struct qcow2 *q, struct cache *cache, struct slice *slice)
{
    if (!slice->dirty)
        cache->dirty++;
    slice->dirty = true;
    atomic_fetch_add_explicit(&q->changes, 1, memory_order_relaxed);
}

/* ---- compressed clusters ---- */

/* Read and inflate the whole cluster into `cluster` (cluster_size bytes). */
int qcow2_read_compressed(struct qcow2 *q, uint64_t entry, uint64_t offset, void *cluster);

/* ---- words ---- */

/* Copy n words between host and big endian. */
static inline void words_to_be(uint64_t *out, const uint64_t *in, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = __builtin_bswap64(in[i]);
}

#endif
