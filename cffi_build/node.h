/* The block graph inside the kernel: what a driver implements and what it may call.
 *
 * A driver is one C file: a struct that begins with `struct node`, a `static const struct node_ops`, and an nb_*_open
 * function declared in kernel.h.  No list of drivers exists.
 *
 * Requests come from any thread at once.  The caller has checked bounds ([offset, offset+count) inside the node,
 * count > 0) and read-only; drivers may assert them.  All request operations return 0 or -errno and may block; data
 * operations transfer everything or fail (a driver loops over short transfers).
 */
#ifndef NB_NODE_H
#define NB_NODE_H

#include <stdatomic.h>

#include "kernel.h"

/* Where the bytes of a run lie, as one layer sees it. */
enum map_kind {
    MAP_DATA,          /* plain bytes at host_offset of `file`, or, with file NULL, only readable through pread */
    MAP_ZERO,          /* reads as zeroes */
    MAP_ABSENT,        /* not in this layer: ask the backing child (none: zeroes) */
    MAP_COMPRESSED     /* in this layer, readable only through pread */
};

struct mapping {
    enum map_kind kind;
    bool allocated;            /* MAP_ZERO: space is allocated in the layer's file */
    uint64_t length;           /* bytes the mapping holds for, from the offset asked */
    struct node *file;         /* not referenced: valid while the request that asked is running */
    uint64_t host_offset;
};

struct node_ops {
    const char *driver;        /* as blockdev-add names it */
    int (*pread)(struct node *node, void *buf, size_t count, uint64_t offset);
    int (*pwrite)(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags);
    int (*zero)(struct node *node, uint64_t count, uint64_t offset, uint32_t flags);      /* NULL: written as data */
    int (*discard)(struct node *node, uint64_t count, uint64_t offset);                   /* NULL: nothing */
    int (*flush)(struct node *node);                                                      /* NULL: nothing */
    /* The first run at offset, at most count long.  NULL: everything is MAP_DATA with file NULL. */
    int (*map)(struct node *node, uint64_t offset, uint64_t count, struct mapping *out);
    int (*write_back)(struct node *node);                                                 /* NULL: of the child */
    int64_t (*allocated)(struct node *node);                                              /* NULL: of the child */
    void (*close)(struct node *node);   /* free what the driver owns; children are dropped by the caller */
};

struct node {
    const struct node_ops *ops;         /* immutable */
    struct node *file;                  /* the child a filter passes to, or a format's file; immutable; may be NULL */
    struct node *backing;               /* changed only while drained */
    uint64_t size;                      /* bytes; changed only while drained */
    uint64_t id;                        /* for events; set before use */
    uint32_t flags;                     /* NB_NODE_*; immutable */
    bool filter;                        /* its data is its child's: block status and base pass through; immutable */
    atomic_uint refs;
};

/* Allocate a driver's struct (whole_size >= sizeof(struct node)), zeroed, with one reference; takes references to
 * the children.  NULL without memory. */
void *node_alloc(size_t whole_size, const struct node_ops *ops, uint64_t size, uint32_t flags, struct node *file,
                 struct node *backing);

/* Requests as drivers and the copy engine make them: bounds already checked. */
int node_pread(struct node *node, void *buf, size_t count, uint64_t offset);
int node_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags);
int node_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags);
int node_discard(struct node *node, uint64_t count, uint64_t offset);
int node_flush(struct node *node);
/* Read what may lie partly or wholly beyond the end of `node` (NULL: everything): zeroes there. */
int node_pread_padded(struct node *node, void *buf, size_t count, uint64_t offset);
/* One run of the whole chain below node, merged across layers as far as cheap: extent->length <= count. */
int node_status(struct node *node, struct node *base, uint64_t offset, uint64_t count, struct nb_extent *extent);
/* The open descriptor of a plain file node, for copy_file_range; -1 for any other node or with O_DIRECT. */
int file_descriptor(const struct node *node);
/* Bytes in the file now (a format's file grows); any other node or a block device: its size. */
int file_current_size(const struct node *node, uint64_t *size);

#define container_of(ptr, type, member) ((type *)((char *)(ptr) - offsetof(type, member)))

/* Is a guest's request in flight on any export, or has one ended since *seen, which is brought up to date?  For
 * background work to step back while guests are active.  Any thread; a few hundred loads. (export.c) */
bool export_guests_active(uint64_t *seen);

/* Post an event to the loop; never blocks, never drops (aborts without memory).  Any thread. (ring.c) */
void ring_post(uint32_t kind, int error, uint64_t token, uint64_t a, uint64_t b, uint64_t c);

/* Give the calling thread, made by the loop's, which may have a better one, the niceness of the process. (pool.c) */
void thread_take_process_priority(void);

/* Run fn(arg) on a pool thread, started on first use. background: at a priority that any other work preempts.
 * -ENOMEM or -EAGAIN when no thread can be had.  Any thread. (pool.c) */
int pool_submit(void (*fn)(void *arg), void *arg, bool background);

#endif
