/* The kernel's public interface: what nbd_backend.block.kernel calls through cffi.
 *
 * cffi reads the declarations between the two markers; they are the single source of truth.
 *
 * Conventions
 * - Offsets and lengths are bytes of the guest disk unless a name says otherwise (host_offset: bytes of a file).
 * - Functions return 0 (or a count) on success and -errno on failure; nothing is logged.
 * - "any thread" means: callable at once from several threads.  "loop" means: only from the thread that runs the
 *   event loop and owns the graph; such calls never run at the same time as one another.
 * - A function marked "blocks" may wait for storage; from the loop call it through nb_task_* instead.
 * - Handles are reference counted where it says so; every *_new and *_open gives the caller one reference.
 */
#ifndef NB_KERNEL_H
#define NB_KERNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/* Flags of a node, given when it is opened. */
enum {
    NB_NODE_READ_ONLY = 1,    /* writes fail with -EROFS */
    NB_NODE_DIRECT = 2,       /* O_DIRECT: no page cache (file only) */
    NB_NODE_UNMAP = 4,        /* discards punch holes / free clusters; without it a discard does nothing */
    NB_NODE_NO_FLUSH = 8      /* flush does nothing (cache.no-flush) */
};

/* Flags of a write-like request. */
enum {
    NB_REQ_FUA = 1,           /* durable when the call returns */
    NB_REQ_MAY_UNMAP = 2,     /* zero: space may be freed */
    NB_REQ_FAST = 4           /* zero: fail with -EOPNOTSUPP unless much faster than writing */
};

/* What an extent reads as and where it comes from; a set of bits. */
enum {
    NB_EXTENT_DATA = 1,       /* may hold non-zero data */
    NB_EXTENT_ZERO = 2,       /* reads as zeroes */
    NB_EXTENT_HOLE = 4,       /* no space is allocated for it in the layer that answers */
    NB_EXTENT_OFFSET = 8,     /* host_offset and layer are valid: the bytes lie there, plain */
    NB_EXTENT_COMPRESSED = 16
};

/* Kinds of struct nb_event. */
enum {
    NB_EVENT_TASK = 1,        /* an nb_task_* ended: error */
    NB_EVENT_SLICE = 2,       /* an nb_copier_slice ended: error, a = bytes done; without error b = bytes read, else
                               * b = offset of the failure, c = side */
    NB_EVENT_DRAINED = 3,     /* a gate closed by nb_export_close_gate has no request in flight */
    NB_EVENT_CORRUPT = 4,     /* token = node id, a = fault kind, b = index or offset, c = the value found */
    NB_EVENT_CBW_BROKEN = 5,  /* token = the cbw's: a point in time could not be kept; error says why */
    NB_EVENT_CBW_FULL = 6,    /* token = the cbw's: the local store is full, guest writes wait; a = bytes stored */
    NB_EVENT_CBW_STORED = 7   /* token = the cbw's: the empty store got its first entry; drain it by a slice */
};

/* The side of a copy that failed (nb_event.c of NB_EVENT_SLICE). */
enum { NB_SIDE_SOURCE = 1, NB_SIDE_TARGET = 2, NB_SIDE_STORE = 3 };

/* What is wrong with an image's metadata; struct nb_fault.kind. */
enum {
    NB_FAULT_NONE = 0,
    NB_FAULT_L1_ENTRY = 1,        /* reserved bits, unaligned, or beyond the end of the file: index, value */
    NB_FAULT_L2_ENTRY = 2,        /* same for an L2 entry: offset (of the entry in the file), value */
    NB_FAULT_REFTABLE_ENTRY = 3,  /* same for a refcount table entry: index, value */
    NB_FAULT_COMPRESSED = 4,      /* compressed data cut short, damaged, or beyond the end: offset, value = entry */
    NB_FAULT_REFCOUNT = 5,        /* a cluster in use has refcount 0, or overlaps metadata: offset = host offset */
    NB_FAULT_TRUNCATED = 6        /* a table lies beyond the end of the file: offset, value = file size */
};

struct node;      /* one node of the block graph; reference counted */
struct export;    /* one export; reference counted */
struct bitmap;    /* a dirty bitmap */
struct copier;    /* a background copy from a node to a node */

struct nb_event {
    uint32_t kind;
    int32_t error;            /* 0 or -errno */
    uint64_t token;           /* given by the caller when the work was submitted */
    uint64_t a, b, c;
};

struct nb_fault {
    uint32_t kind;
    uint32_t reserved;
    uint64_t index;           /* entry number in its table */
    uint64_t offset;          /* bytes in the image file */
    uint64_t value;           /* the value found */
};

struct nb_extent {
    uint64_t offset, length;
    uint32_t flags;           /* NB_EXTENT_* */
    uint32_t depth;           /* layers below the node asked (0: the node itself) of the layer that answers */
    uint64_t host_offset;     /* with NB_EXTENT_OFFSET: bytes in that layer's file */
    uint64_t node_id;         /* id of the layer that answers */
};

struct nb_counters {          /* since the export was made; bytes and operations that succeeded */
    uint64_t read_ops, read_bytes, write_ops, write_bytes, zero_ops, zero_bytes;
    uint64_t trim_ops, trim_bytes, flush_ops, failed_ops, in_flight;
};

/* A checked qcow2 header (the check is nbd_backend.block.qcow2.header's); sizes in bytes unless said. */
struct nb_qcow2_layout {
    uint32_t version;             /* 2 or 3 */
    uint32_t cluster_bits;        /* 9..21 */
    uint32_t refcount_order;      /* log2 of the width in bits; only 4 */
    uint32_t compression_type;    /* 0 deflate, 1 zstd */
    uint32_t l1_entries;
    uint32_t reftable_clusters;
    uint64_t size;                /* virtual size, a multiple of 512 */
    uint64_t l1_offset, reftable_offset;
    uint64_t l2_cache_bytes, refcount_cache_bytes;   /* bounds of the two caches */
    bool names_backing;           /* the header names a backing file, whether it is opened or not */
};

struct nb_cbw_options {
    uint32_t cluster_size;        /* bytes kept at once: a power of two, 4 KiB..64 MiB */
    uint32_t on_full;             /* 0: guest writes wait for room; 1: break the point in time instead */
    uint64_t memory_limit;        /* bytes of the store in memory; beyond: the scratch file */
    uint64_t scratch_limit;       /* bytes of the scratch file; 0: no other limit than its filesystem's */
    int32_t scratch_fd;           /* an unlinked file, owned by the caller, or -1: memory only */
    uint32_t wait_ms;             /* how long a guest write waits for room before the point in time breaks; 0: for ever */
    uint64_t token;               /* of the events */
};

struct nb_copier_options {
    uint32_t max_workers;         /* copies in flight, 1..64 */
    uint32_t chunk;               /* most bytes of one copy, a multiple of the bitmap's granularity; at least 64 KiB */
    bool target_is_zero;          /* the target reads as zeroes where it was not written: zeroes need no write */
    bool detect_zeroes;           /* data that is all zero is written as zeroes */
    bool background;              /* true: guests go first (low priority, shrinks under load) */
};

/* ---- version ---- */

/* The nbdkit version the filter was built for, e.g. "1.32.5".  Any thread. */
const char *nb_nbdkit_version(void);
/* True once nbdkit has loaded this module as its filter in this process.  Any thread. */
bool nb_filter_loaded(void);

/* ---- event ring (ring.c) ---- */

/* The eventfd that is readable while events wait; the same for the process's life.  -errno if none can be had.  Loop. */
int nb_ring_fd(void);
/* Move up to max waiting events to `events`, oldest first; returns their number and clears the eventfd when none is
 * left.  No event is ever dropped: the ring grows.  Loop. */
int nb_ring_read(struct nb_event *events, int max);

/* ---- nodes (node.c and one file per driver) ---- */

/* Open a regular file or block device.  Errors: those of open(2); -EISDIR; -EINVAL for other kinds of file.  Blocks. */
int nb_file_open(const char *path, uint32_t flags, struct node **out);
/* A raw view of `child`: bytes [offset, offset+size) of it; size 0: to its end.  Takes a reference to child.
 * -ERANGE when the window does not fit.  Loop. */
int nb_raw_open(struct node *child, uint64_t offset, uint64_t size, uint32_t flags, struct node **out);
/* A qcow2 layer in `file` over `backing` (or NULL); takes references to both.  Reads and checks the L1 and refcount
 * tables; on -EUCLEAN *fault says what is wrong.  Blocks. */
int nb_qcow2_open(struct node *file, struct node *backing, const struct nb_qcow2_layout *layout, uint32_t flags,
                  struct node **out, struct nb_fault *fault);
/* size bytes that read as zeroes (or, without read_zeroes, as whatever the buffer held) and forget writes; each
 * request takes latency_ns.  Loop. */
int nb_null_open(uint64_t size, uint64_t latency_ns, bool read_zeroes, uint32_t flags, struct node **out);
/* An NBD server's export as a node, through libnbd.  uri as in the NBD URI specification; connections: 1..16 (used
 * when the server allows multi-conn).  On failure *message (freed with nb_string_free) tells libnbd's reason.  Blocks. */
int nb_nbd_open(const char *uri, uint32_t connections, uint32_t flags, struct node **out, char **message);
/* Give up the server of the NBD node that `node` is or reaches through `file` children (filters, raw, a format; without
 * one nothing happens): what is in flight on it and everything later fails with -ECONNRESET, for good.  Any thread. */
void nb_nbd_abort(struct node *node);
void nb_string_free(char *s);
/* Faults in front of `child`; takes a reference.  Rules are added with nb_error_inject_rule.  Loop. */
int nb_error_inject_open(struct node *child, uint32_t flags, struct node **out);
/* Operations: 1 read, 2 write, 4 flush, 8 zero or discard, as a mask.  The rule acts on requests that overlap
 * [offset, offset+length): waits delay_ns, then fails with `error` (positive errno; 0: none).  skip: so many matching
 * requests pass first; count: how many it acts on, 0: all.  -EINVAL if the node is of another driver.  Any thread. */
int nb_error_inject_rule(struct node *node, uint32_t operations, uint64_t offset, uint64_t length, int error,
                         uint64_t delay_ns, uint64_t skip, uint64_t count);

struct node *nb_node_ref(struct node *node);
/* Drop a reference; the last one closes the driver and drops the children.  A writable qcow2 layer is flushed then, but
 * failures are lost: flush it before.  NULL is ignored.  Blocks. */
void nb_node_unref(struct node *node);
/* The number by which events and extents name the node; set once, before use.  Loop. */
void nb_node_set_id(struct node *node, uint64_t id);
uint64_t nb_node_size(const struct node *node);                       /* any thread */
const char *nb_node_driver(const struct node *node);                  /* any thread */
bool nb_node_read_only(const struct node *node);                      /* any thread */
/* Space the node's own file takes on its filesystem in bytes, or -errno.  Any thread. */
int64_t nb_node_allocated(struct node *node);
/* Replace the backing child (may be NULL).  Every export above must be drained.  Loop. */
int nb_node_set_backing(struct node *node, struct node *backing);

/* Requests.  [offset, offset+count) must lie within the node, else -EINVAL (reads) or -ENOSPC (writes).
 * Return 0 or -errno.  Any thread; block. */
int nb_node_pread(struct node *node, void *buf, size_t count, uint64_t offset);
int nb_node_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags);
int nb_node_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags);
int nb_node_discard(struct node *node, uint64_t count, uint64_t offset);
int nb_node_flush(struct node *node);
/* Describe [offset, offset+count) through the whole chain into at most `capacity` extents, neighbours that say the
 * same merged.  base: layers from this node on (inclusive) count as unallocated zeroes, or NULL.  Returns the number of extents, which cover
 * the range unless capacity ran out.  Any thread; blocks. */
int nb_node_block_status(struct node *node, struct node *base, uint64_t offset, uint64_t count,
                         struct nb_extent *extents, size_t capacity);
/* Write back cached metadata in the safe order but without waiting for the disk: other processes then see a consistent
 * image, and it survives the death of this process.  Until the next flush a power cut may leave entries on disk without
 * their refcounts, so it is for images that nobody relies on yet.  Any thread; blocks. */
int nb_node_write_back(struct node *node);

/* Run one of the above in the pool and post NB_EVENT_TASK with token.  The node is referenced meanwhile.  Loop. */
int nb_task_flush(struct node *node, uint64_t token);
int nb_task_write_back(struct node *node, uint64_t token);
/* Drop a reference in the pool: the closing of files happens off the loop. */
int nb_task_unref(struct node *node, uint64_t token);

/* ---- exports (export.c) ---- */

/* Make an export of `root` (referenced) under the NBD export name and register it; -EEXIST if the name is taken.
 * Loop. */
int nb_export_new(const char *name, struct node *root, bool writable, struct export **out);
/* Take the name out of the registry; clients that are connected go on until nb_export_kill.  Loop. */
void nb_export_unregister(struct export *exp);
/* All further requests fail with -ESHUTDOWN and disconnect their client.  Loop. */
void nb_export_kill(struct export *exp);
void nb_export_unref(struct export *exp);
/* A registered export by name with a new reference, or NULL.  Any thread. */
struct export *nb_export_find(const char *name);
/* How many clients have it open (filter or fallback: nb_export_client).  Any thread. */
uint32_t nb_export_clients(struct export *exp);
/* Count a client in (+1) or out (-1); the filter does this itself.  Any thread. */
void nb_export_client(struct export *exp, int change);
bool nb_export_writable(const struct export *exp);                    /* any thread */
uint64_t nb_export_size(struct export *exp);                          /* any thread */
void nb_export_counters(struct export *exp, struct nb_counters *out); /* any thread */
/* Close the gate: new requests wait.  When none is in flight any more NB_EVENT_DRAINED is posted with token.
 * Counted: as many nb_export_open_gate reopen it.  Loop. */
void nb_export_close_gate(struct export *exp, uint64_t token);
void nb_export_open_gate(struct export *exp);
/* The gate must be closed and drained.  Takes a reference to root, drops the old one's.  Loop. */
int nb_export_set_root(struct export *exp, struct node *root);
/* A guest's request; what the filter's callbacks call and the plugin's data callbacks in fallback.  Bounds are
 * checked (-EINVAL, -ENOSPC), -EROFS without writable, -ESHUTDOWN once killed.  Any thread; block. */
int nb_export_pread(struct export *exp, void *buf, uint32_t count, uint64_t offset);
int nb_export_pwrite(struct export *exp, const void *buf, uint32_t count, uint64_t offset, uint32_t flags);
int nb_export_zero(struct export *exp, uint32_t count, uint64_t offset, uint32_t flags);
int nb_export_trim(struct export *exp, uint32_t count, uint64_t offset, uint32_t flags);
int nb_export_flush(struct export *exp);
int nb_export_cache(struct export *exp, uint32_t count, uint64_t offset);
int nb_export_extents(struct export *exp, uint32_t count, uint64_t offset, struct nb_extent *extents,
                      size_t capacity);

/* ---- dirty bitmaps (bitmap.c) ---- */

/* A bitmap of a disk of `size` bytes, clean; granularity 512..2 GiB, a power of two.  Any thread may set, clear,
 * test and count at once. */
int nb_bitmap_new(uint64_t size, uint32_t granularity, struct bitmap **out);
void nb_bitmap_free(struct bitmap *bitmap);
uint32_t nb_bitmap_granularity(const struct bitmap *bitmap);
uint64_t nb_bitmap_size(const struct bitmap *bitmap);
/* Set every granule that [offset, offset+count) touches. */
void nb_bitmap_set(struct bitmap *bitmap, uint64_t offset, uint64_t count);
/* Clear every granule that lies wholly inside the range (the disk's last one: up to its end). */
void nb_bitmap_clear(struct bitmap *bitmap, uint64_t offset, uint64_t count);
/* True if any granule touched by the range is set. */
bool nb_bitmap_test(const struct bitmap *bitmap, uint64_t offset, uint64_t count);
/* Bytes of dirty granules, the last one cut at the disk's end; exact when nobody changes it meanwhile. */
uint64_t nb_bitmap_dirty_bytes(const struct bitmap *bitmap);
/* First dirty area at or after `offset`, at most max bytes: false if none.  Clean space is skipped hierarchically. */
bool nb_bitmap_next_dirty(const struct bitmap *bitmap, uint64_t offset, uint64_t max, uint64_t *start, uint64_t *length);
/* OR src into dst; sizes must be equal (-EINVAL); granularities may differ (granules touched are set). */
int nb_bitmap_merge(struct bitmap *dst, const struct bitmap *src);
/* Set what block status says is allocated in `node` above `base` (NULL: in node's own layer and all below), zeroes
 * that are allocated included; with skip_zero leave out what is known to read as zero.  In the pool; posts
 * NB_EVENT_TASK. */
int nb_bitmap_set_allocated(struct bitmap *bitmap, struct node *node, struct node *base, bool skip_zero, uint64_t token);

/* ---- copy before write (intercept.c) ---- */

/* A filter node over `source` (referenced) that keeps the state of source at this moment available for what `todo`
 * has dirty, until it is copied: see intercept.c.  The node owns `todo` from now on.  Insert it with the exports
 * above drained.  Loop. */
int nb_cbw_open(struct node *source, struct bitmap *todo, const struct nb_cbw_options *options, struct node **out);
/* Stop intercepting: nothing is kept any more, waiting guest writes go on.  Any thread. */
void nb_cbw_release(struct node *cbw);
/* Bytes stored in memory, bytes stored in the scratch file, guest writes that waited, nanoseconds they waited. */
void nb_cbw_usage(struct node *cbw, uint64_t *memory, uint64_t *scratch, uint64_t *waits, uint64_t *wait_ns);

/* ---- copy engine (copy.c) ---- */

/* Copies what `todo` has dirty from source to target (both referenced; equal sizes or target larger).  With
 * cbw != NULL source must be it, todo must be NULL, and what the guest's writes put into the store goes first.
 * The copier does not own todo.  Loop. */
int nb_copier_new(struct node *source, struct node *target, struct bitmap *todo, struct node *cbw,
                  const struct nb_copier_options *options, struct copier **out);
/* Copy until max_bytes are done, max_ms have passed, everything is clean, or a copy fails; then post NB_EVENT_SLICE
 * (a = bytes of todo and store that were dealt with).  What failed is dirty again (stored data stays stored).
 * store_only: only the store is drained.  One slice at a time per copier (-EBUSY).  Loop. */
int nb_copier_slice(struct copier *copier, uint64_t max_bytes, uint32_t max_ms, bool store_only, uint64_t token);
/* Bytes left to do: dirty, being copied, and stored.  Any thread. */
uint64_t nb_copier_remaining(struct copier *copier);
/* End a running slice early; its event still comes.  Any thread. */
void nb_copier_stop(struct copier *copier);
/* No slice may be running (-EBUSY).  Loop. */
int nb_copier_free(struct copier *copier);

/* cffi: end */

#endif
