/* A disk in memory for tests: blocks of 4 KiB that are data or known zeroes, counters, and a hook in every request.
 *
 * Blocks are accessed under a lock each, as a disk does it: requests that overlap mix by blocks, never by bytes.
 */
#ifndef NB_MEMORY_NODE_H
#define NB_MEMORY_NODE_H

#include <pthread.h>
#include <stdatomic.h>

#include "check.h"
#include "node.h"

enum { MEMORY_BLOCK = 4096, MEMORY_LOCKS = 64 };

enum memory_request {
    MEMORY_READ,           /* before the data is read */
    MEMORY_READ_DONE,      /* after it, before the caller gets it */
    MEMORY_WRITE,          /* before */
    MEMORY_ZERO,
    MEMORY_DISCARD,
    MEMORY_FLUSH
};

struct memory_node {
    struct node node;
    uint8_t *data;
    atomic_uchar *holds_data;      /* per block; 0: known to be zeroes, or absent */
    bool absent;                   /* blocks without data are the backing child's */
    /* Called on the requester's thread in every request, if set; an error (-errno) fails the request. */
    int (*hook)(struct memory_node *disk, enum memory_request request, uint64_t offset, uint64_t count);
    void *hook_data;
    atomic_uint_least64_t reads, read_bytes, writes, written_bytes, zeroes, zeroed_bytes, discards, flushes;
    atomic_uint_least64_t largest_read;
    pthread_mutex_t locks[MEMORY_LOCKS];
};

static inline struct memory_node *memory_of(struct node *node)
{
    return container_of(node, struct memory_node, node);
}

static inline int memory_hook(struct node *node, enum memory_request request, uint64_t offset, uint64_t count)
{
    struct memory_node *disk = memory_of(node);
    return disk->hook ? disk->hook(disk, request, offset, count) : 0;
}

/* Copy one way block by block; buf NULL: write zeroes. */
static inline void memory_access(struct memory_node *disk, bool write, void *buf, uint64_t count, uint64_t offset)
{
    for (uint64_t at = 0, part; at < count; at += part) {
        uint64_t block = (offset + at) / MEMORY_BLOCK, room = MEMORY_BLOCK - (offset + at) % MEMORY_BLOCK;
        part = count - at < room ? count - at : room;
        uint8_t *place = disk->data + offset + at;
        pthread_mutex_lock(&disk->locks[block % MEMORY_LOCKS]);
        if (!write)
            memcpy((char *)buf + at, place, part);
        else if (buf)
            memcpy(place, (char *)buf + at, part);
        else
            memset(place, 0, part);
        if (write && (buf || part == MEMORY_BLOCK || offset + at + part == disk->node.size))
            atomic_store(&disk->holds_data[block], buf != NULL);
        pthread_mutex_unlock(&disk->locks[block % MEMORY_LOCKS]);
    }
}

static inline int memory_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    struct memory_node *disk = memory_of(node);
    int err = memory_hook(node, MEMORY_READ, offset, count);
    if (err)
        return err;
    atomic_fetch_add(&disk->reads, 1);
    atomic_fetch_add(&disk->read_bytes, count);
    uint_least64_t largest = atomic_load(&disk->largest_read);
    while (largest < count && !atomic_compare_exchange_weak(&disk->largest_read, &largest, count))
        ;
    memory_access(disk, false, buf, count, offset);
    return memory_hook(node, MEMORY_READ_DONE, offset, count);
}

static inline int memory_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    struct memory_node *disk = memory_of(node);
    int err = memory_hook(node, MEMORY_WRITE, offset, count);
    (void)flags;
    if (err)
        return err;
    atomic_fetch_add(&disk->writes, 1);
    atomic_fetch_add(&disk->written_bytes, count);
    memory_access(disk, true, (void *)buf, count, offset);
    return 0;
}

static inline int memory_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    struct memory_node *disk = memory_of(node);
    int err = memory_hook(node, MEMORY_ZERO, offset, count);
    (void)flags;
    if (err)
        return err;
    atomic_fetch_add(&disk->zeroes, 1);
    atomic_fetch_add(&disk->zeroed_bytes, count);
    memory_access(disk, true, NULL, count, offset);
    return 0;
}

static inline int memory_discard(struct node *node, uint64_t count, uint64_t offset)
{
    struct memory_node *disk = memory_of(node);
    int err = memory_hook(node, MEMORY_DISCARD, offset, count);
    if (err)
        return err;
    atomic_fetch_add(&disk->discards, 1);
    memory_access(disk, true, NULL, count, offset);
    return 0;
}

static inline int memory_flush(struct node *node)
{
    atomic_fetch_add(&memory_of(node)->flushes, 1);
    return memory_hook(node, MEMORY_FLUSH, 0, 0);
}

static inline int memory_map(struct node *node, uint64_t offset, uint64_t count, struct mapping *out)
{
    struct memory_node *disk = memory_of(node);
    uint64_t block = offset / MEMORY_BLOCK, last = (offset + count - 1) / MEMORY_BLOCK, end = block;
    bool data = atomic_load(&disk->holds_data[block]);
    while (end <= last && atomic_load(&disk->holds_data[end]) == data)
        end++;
    uint64_t stop = end * MEMORY_BLOCK < offset + count ? end * MEMORY_BLOCK : offset + count;
    *out = (struct mapping) {
        .kind = data ? MAP_DATA : disk->absent ? MAP_ABSENT : MAP_ZERO,
        .length = stop - offset,
    };
    return 0;
}

static inline void memory_close(struct node *node)
{
    struct memory_node *disk = memory_of(node);
    for (int i = 0; i < MEMORY_LOCKS; i++)
        pthread_mutex_destroy(&disk->locks[i]);
    free(disk->data);
    free((void *)disk->holds_data);
}

static const struct node_ops memory_ops = {
    .driver = "memory",
    .pread = memory_pread,
    .pwrite = memory_pwrite,
    .zero = memory_zero,
    .discard = memory_discard,
    .flush = memory_flush,
    .map = memory_map,
    .close = memory_close,
};

/* A disk of known zeroes. */
static inline struct memory_node *memory_disk(uint64_t size)
{
    struct memory_node *disk = node_alloc(sizeof *disk, &memory_ops, size, NB_NODE_UNMAP, NULL, NULL);
    CHECK(disk != NULL);
    disk->data = calloc(1, size);
    disk->holds_data = calloc(size / MEMORY_BLOCK + 1, sizeof *disk->holds_data);
    CHECK(disk->data && disk->holds_data);
    for (int i = 0; i < MEMORY_LOCKS; i++)
        pthread_mutex_init(&disk->locks[i], NULL);
    return disk;
}

/* Fill a range with one byte, past hook and counters. */
static inline void memory_fill(struct memory_node *disk, uint8_t byte, uint64_t offset, uint64_t count)
{
    uint8_t *bytes = malloc(count);
    CHECK(bytes != NULL);
    memset(bytes, byte, count);
    memory_access(disk, true, bytes, count, offset);
    free(bytes);
}

#endif
