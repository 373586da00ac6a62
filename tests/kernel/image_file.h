/* A file in memory that grows, for the qcow2 tests: a hook around every request, a log of what was written, and
 * images made in it.
 *
 * Bytes are accessed by sectors of 512 under a lock each: requests that overlap mix by sectors, as on a disk.
 */
#ifndef NB_IMAGE_FILE_H
#define NB_IMAGE_FILE_H

#include <endian.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "node.h"

enum { SECTOR = 512, SECTOR_LOCKS = 64 };

enum file_op { FILE_READ = 1, FILE_WRITE = 2, FILE_FLUSH = 4, FILE_DISCARD = 8 };

struct file_record {
    enum file_op op;
    uint64_t offset, count;
    uint8_t *bytes;                /* FILE_WRITE: what was written */
};

struct image_file {
    struct node node;
    uint8_t *bytes;
    uint64_t capacity;
    _Atomic uint64_t end;          /* of what was ever written */
    /* Called before and after each request (after: what it did is visible); an error before it fails the request,
     * one after it fails it although it was done. */
    int (*hook)(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count);
    void *hook_data;
    atomic_uint reads, writes, flushes, discards;
    bool logging;
    pthread_mutex_t log_lock;
    struct file_record *log;
    size_t log_count, log_capacity;
    pthread_mutex_t locks[SECTOR_LOCKS];
};

static inline struct image_file *image_file_of(struct node *node)
{
    return container_of(node, struct image_file, node);
}

static inline int image_hook(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    return file->hook ? file->hook(file, op, after, offset, count) : 0;
}

static inline void image_access(struct image_file *file, bool write, void *buf, uint64_t count, uint64_t offset)
{
    CHECK(offset <= file->capacity && count <= file->capacity - offset);
    for (uint64_t at = 0, part; at < count; at += part) {
        uint64_t room = SECTOR - (offset + at) % SECTOR;
        part = count - at < room ? count - at : room;
        pthread_mutex_t *lock = &file->locks[(offset + at) / SECTOR % SECTOR_LOCKS];
        uint8_t *place = file->bytes + offset + at;
        pthread_mutex_lock(lock);
        if (!write)
            memcpy((char *)buf + at, place, part);
        else if (buf)
            memcpy(place, (const char *)buf + at, part);
        else
            memset(place, 0, part);
        pthread_mutex_unlock(lock);
    }
}

static inline void image_record(struct image_file *file, enum file_op op, const void *buf, uint64_t count,
                                uint64_t offset)
{
    if (!file->logging)
        return;
    pthread_mutex_lock(&file->log_lock);
    if (file->log_count == file->log_capacity) {
        file->log_capacity = file->log_capacity ? 2 * file->log_capacity : 1024;
        file->log = realloc(file->log, file->log_capacity * sizeof *file->log);
        CHECK(file->log);
    }
    struct file_record *record = &file->log[file->log_count++];
    *record = (struct file_record) { .op = op, .offset = offset, .count = count };
    if (buf) {
        record->bytes = malloc(count);
        CHECK(record->bytes);
        memcpy(record->bytes, buf, count);
    }
    pthread_mutex_unlock(&file->log_lock);
}

static inline int image_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    struct image_file *file = image_file_of(node);
    int err = image_hook(file, FILE_READ, false, offset, count);
    if (err)
        return err;
    atomic_fetch_add(&file->reads, 1);
    image_access(file, false, buf, count, offset);
    return image_hook(file, FILE_READ, true, offset, count);
}

static inline int image_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    struct image_file *file = image_file_of(node);
    int err = image_hook(file, FILE_WRITE, false, offset, count);
    (void)flags;
    if (err)
        return err;
    atomic_fetch_add(&file->writes, 1);
    image_access(file, true, (void *)(uintptr_t)buf, count, offset);
    uint64_t end = atomic_load(&file->end);
    while (end < offset + count && !atomic_compare_exchange_weak(&file->end, &end, offset + count))
        ;
    image_record(file, FILE_WRITE, buf, count, offset);
    return image_hook(file, FILE_WRITE, true, offset, count);
}

static inline int image_discard(struct node *node, uint64_t count, uint64_t offset)
{
    struct image_file *file = image_file_of(node);
    int err = image_hook(file, FILE_DISCARD, false, offset, count);
    if (err)
        return err;
    atomic_fetch_add(&file->discards, 1);
    image_access(file, true, NULL, count, offset);
    image_record(file, FILE_DISCARD, NULL, count, offset);
    return image_hook(file, FILE_DISCARD, true, offset, count);
}

static inline int image_flush(struct node *node)
{
    struct image_file *file = image_file_of(node);
    int err = image_hook(file, FILE_FLUSH, false, 0, 0);
    if (err)
        return err;
    atomic_fetch_add(&file->flushes, 1);
    image_record(file, FILE_FLUSH, NULL, 0, 0);
    return image_hook(file, FILE_FLUSH, true, 0, 0);
}

static inline void image_forget_log(struct image_file *file)
{
    for (size_t i = 0; i < file->log_count; i++)
        free(file->log[i].bytes);
    free(file->log);
    file->log = NULL;
    file->log_count = file->log_capacity = 0;
}

static inline void image_close(struct node *node)
{
    struct image_file *file = image_file_of(node);
    image_forget_log(file);
    munmap(file->bytes, file->capacity);
    pthread_mutex_destroy(&file->log_lock);
    for (int i = 0; i < SECTOR_LOCKS; i++)
        pthread_mutex_destroy(&file->locks[i]);
}

static const struct node_ops image_file_ops = {
    .driver = "image_file",
    .pread = image_pread,
    .pwrite = image_pwrite,
    .discard = image_discard,
    .flush = image_flush,
    .close = image_close,
};

/* An empty file; it may grow to `capacity` bytes, which cost memory only where they were written. */
static inline struct image_file *image_file_new(uint64_t capacity)
{
    struct image_file *file = node_alloc(sizeof *file, &image_file_ops, 0, NB_NODE_UNMAP, NULL, NULL);
    CHECK(file);
    file->capacity = capacity;
    file->bytes = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(file->bytes != MAP_FAILED);
    pthread_mutex_init(&file->log_lock, NULL);
    for (int i = 0; i < SECTOR_LOCKS; i++)
        pthread_mutex_init(&file->locks[i], NULL);
    return file;
}

/* ---- images ---- */

struct image {
    struct image_file *file;
    struct nb_qcow2_layout layout;
    struct node *backing;
};

static inline uint64_t image_cluster(const struct image *image)
{
    return UINT64_C(1) << image->layout.cluster_bits;
}

static inline void put64(struct image_file *file, uint64_t offset, uint64_t value)
{
    uint64_t be = htobe64(value);
    image_access(file, true, &be, 8, offset);
}

static inline uint64_t get64(struct image_file *file, uint64_t offset)
{
    uint64_t be;
    image_access(file, false, &be, 8, offset);
    return be64toh(be);
}

static inline void put32(struct image_file *file, uint64_t offset, uint32_t value)
{
    uint32_t be = htobe32(value);
    image_access(file, true, &be, 4, offset);
}

static inline void put16(struct image_file *file, uint64_t offset, uint16_t value)
{
    uint16_t be = htobe16(value);
    image_access(file, true, &be, 2, offset);
}

/* Clusters in order: header, refcount table, first refcount block, L1. */
static inline struct image image_make(uint64_t capacity, uint32_t version, uint32_t cluster_bits, uint64_t size)
{
    uint64_t cluster = UINT64_C(1) << cluster_bits;
    uint64_t l1_entries = (size + (cluster * (cluster / 8)) - 1) / (cluster * (cluster / 8));
    uint64_t l1_clusters = (l1_entries * 8 + cluster - 1) / cluster;
    struct image image = { .file = image_file_new(capacity) };
    image.layout = (struct nb_qcow2_layout) {
        .version = version, .cluster_bits = cluster_bits, .refcount_order = 4, .l1_entries = (uint32_t)l1_entries,
        .reftable_clusters = 1, .size = size, .l1_offset = 3 * cluster, .reftable_offset = cluster,
        .l2_cache_bytes = 1 << 20, .refcount_cache_bytes = 1 << 18,
    };
    CHECK(3 + l1_clusters < cluster / 2);
    struct image_file *file = image.file;
    put32(file, 0, 0x514649fb);
    put32(file, 4, version);
    put32(file, 20, cluster_bits);
    put64(file, 24, size);
    put32(file, 36, (uint32_t)l1_entries);
    put64(file, 40, 3 * cluster);
    put64(file, 48, cluster);
    put32(file, 56, 1);
    if (version >= 3) {
        put32(file, 96, 4);
        put32(file, 100, 104);
    }
    put64(file, cluster, 2 * cluster);
    for (uint64_t i = 0; i < 3 + l1_clusters; i++)
        put16(file, 2 * cluster + 2 * i, 1);
    file->end = file->node.size = (3 + l1_clusters) * cluster;
    return image;
}

/* Take one more cluster at the end of an image that is not open, with refcount 1; returns its offset. */
static inline uint64_t image_add_cluster(struct image *image)
{
    uint64_t host = image->file->node.size;
    image->file->end = image->file->node.size = host + image_cluster(image);
    put16(image->file, 2 * image_cluster(image) + 2 * (host >> image->layout.cluster_bits), 1);
    return host;
}

/* Give an image that is not open its first L2 table; returns its offset. */
static inline uint64_t image_add_l2(struct image *image)
{
    uint64_t host = image_add_cluster(image);
    put64(image->file, image->layout.l1_offset, host | UINT64_C(1) << 63);
    return host;
}

static inline int image_try_open(struct image *image, uint32_t flags, struct node **out, struct nb_fault *fault)
{
    struct image_file *file = image->file;
    if (file->node.size < atomic_load(&file->end))
        file->node.size = atomic_load(&file->end);
    image->layout.reftable_offset = get64(file, 48);
    uint32_t clusters;
    image_access(file, false, &clusters, 4, 56);
    image->layout.reftable_clusters = be32toh(clusters);
    return nb_qcow2_open(&file->node, image->backing, &image->layout, flags, out, fault);
}

static inline struct node *image_open(struct image *image, uint32_t flags)
{
    struct node *node;
    struct nb_fault fault;
    CHECK_OK(image_try_open(image, flags, &node, &fault));
    return node;
}

static inline void image_free(struct image *image)
{
    nb_node_unref(&image->file->node);
    nb_node_unref(image->backing);
}

/* ---- an independent check: every reference counted anew, as `qemu-img check` does ---- */

struct image_check {
    uint64_t corruptions, leaks;
};

static inline struct image_check image_check(const uint8_t *bytes, uint64_t end, const struct nb_qcow2_layout *layout)
{
    uint64_t cluster = UINT64_C(1) << layout->cluster_bits, count = (end + cluster - 1) / cluster + 1;
    uint16_t *references = calloc(count, 2);
    struct image_check result = { 0 };
    CHECK(references);
#define WORD(at) be64toh(*(const uint64_t *)(const void *)(bytes + (at)))
#define REFER(host) \
    do { \
        if ((host) % cluster || (host) / cluster >= count) \
            result.corruptions++; \
        else \
            references[(host) / cluster]++; \
    } while (0)
    uint64_t reftable = WORD(48), reftable_clusters = be32toh(*(const uint32_t *)(const void *)(bytes + 56));
    REFER(UINT64_C(0));
    for (uint64_t i = 0; i < (layout->l1_entries * UINT64_C(8) + cluster - 1) / cluster; i++)
        REFER(layout->l1_offset + i * cluster);
    for (uint64_t i = 0; i < reftable_clusters; i++)
        REFER(reftable + i * cluster);
    for (uint64_t i = 0; i < reftable_clusters * cluster / 8; i++)
        if (WORD(reftable + i * 8))
            REFER(WORD(reftable + i * 8));
    for (uint64_t i = 0; i < layout->l1_entries; i++) {
        uint64_t table = WORD(layout->l1_offset + i * 8) & UINT64_C(0x00fffffffffffe00);
        if (!table)
            continue;
        REFER(table);
        for (uint64_t j = 0; j < cluster / 8 && table + cluster <= end + cluster; j++) {
            uint64_t host = WORD(table + j * 8) & UINT64_C(0x00fffffffffffe00);
            if (host)
                REFER(host);
        }
    }
    for (uint64_t i = 0; i < count; i++) {
        uint64_t per_block = cluster / 2, entry = i / per_block, block = 0;
        if (entry < reftable_clusters * cluster / 8)
            block = WORD(reftable + entry * 8);
        unsigned refcount = block && block + cluster <= end + cluster
            ? be16toh(*(const uint16_t *)(const void *)(bytes + block + i % per_block * 2)) : 0;
        if (refcount < references[i])
            result.corruptions++;
        else if (refcount > references[i])
            result.leaks++;
    }
#undef REFER
#undef WORD
    free(references);
    return result;
}

/* Write the file out, for qemu-img. */
static inline void image_save(const uint8_t *bytes, uint64_t end, const char *path)
{
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    for (uint64_t at = 0; at < end;) {
        ssize_t put = write(fd, bytes + at, end - at);
        CHECK(put > 0);
        at += (uint64_t)put;
    }
    CHECK_INT(close(fd), 0);
}

/* qemu-img check of an image file: 0 clean, 2 corruption, 3 leaks. */
static inline int qemu_img_check(const char *path)
{
    char command[512];
    snprintf(command, sizeof command, "qemu-img check -q -f qcow2 '%s' >check.log 2>&1", path);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static inline void pause_ns(long ns)
{
    nanosleep(&(struct timespec) { .tv_nsec = ns }, NULL);
}

/* A small generator of numbers, one per thread. */
static inline uint32_t random_next(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    uint64_t x = *state ^ *state >> 33;
    return (uint32_t)((x * UINT64_C(0xff51afd7ed558ccd)) >> 32);
}

/* True for the long variants (`make nightly`). */
static inline bool is_nightly(void)
{
    const char *profile = getenv("HYPOTHESIS_PROFILE");
    return profile && !strcmp(profile, "nightly");
}

#endif
