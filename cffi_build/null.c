/* The null driver: a disk of any size that costs nothing, to measure and test what lies above it.
 *
 * Writes are forgotten.  Reads give zeroes or, without read_zeroes, leave the buffer as it was: the fastest read there
 * is, and one that shows a guest whatever memory the buffer held, so only for measuring.  Every request that a disk
 * would work for takes latency_ns; block status, which a disk does not know, takes none.
 */
#include <string.h>

#include "delay.h"
#include "node.h"

struct null_node {
    struct node node;
    uint64_t latency_ns;
    bool read_zeroes;
};

static struct null_node *null_of(struct node *node)
{
    return container_of(node, struct null_node, node);
}

static int null_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    (void)offset;
    if (null_of(node)->read_zeroes)
        memset(buf, 0, count);
    delay_ns(null_of(node)->latency_ns);
    return 0;
}

static int null_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    (void)buf, (void)count, (void)offset, (void)flags;
    delay_ns(null_of(node)->latency_ns);
    return 0;
}

static int null_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)count, (void)offset, (void)flags;
    delay_ns(null_of(node)->latency_ns);
    return 0;
}

static int null_discard(struct node *node, uint64_t count, uint64_t offset)
{
    (void)count, (void)offset;
    delay_ns(null_of(node)->latency_ns);
    return 0;
}

static int null_flush(struct node *node)
{
    delay_ns(null_of(node)->latency_ns);
    return 0;
}

static int null_map(struct node *node, uint64_t offset, uint64_t count, struct mapping *out)
{
    (void)offset;
    *out = (struct mapping) {
        .kind = null_of(node)->read_zeroes ? MAP_ZERO : MAP_DATA,
        .length = count,
    };
    return 0;
}

static int64_t null_allocated(struct node *node)
{
    (void)node;
    return 0;
}

static void null_close(struct node *node)
{
    (void)node;
}

static const struct node_ops null_ops = {
    .driver = "null-co",
    .pread = null_pread,
    .pwrite = null_pwrite,
    .zero = null_zero,
    .discard = null_discard,
    .flush = null_flush,
    .map = null_map,
    .allocated = null_allocated,
    .close = null_close,
};

int nb_null_open(uint64_t size, uint64_t latency_ns, bool read_zeroes, uint32_t flags, struct node **out)
{
    struct null_node *null = node_alloc(sizeof(*null), &null_ops, size, flags, NULL, NULL);

    if (!null)
        return -ENOMEM;
    null->latency_ns = latency_ns;
    null->read_zeroes = read_zeroes;
    *out = &null->node;
    return 0;
}
