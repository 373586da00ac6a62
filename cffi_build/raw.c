/* The raw format: a window on its child, byte for byte. */
#include "node.h"

#include <errno.h>

struct raw {
    struct node node;
    uint64_t start;      /* first byte of the child; immutable */
};

static uint64_t in_child(const struct node *node, uint64_t offset)
{
    return container_of(node, struct raw, node)->start + offset;
}

static int raw_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    return node_pread(node->file, buf, count, in_child(node, offset));
}

static int raw_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    return node_pwrite(node->file, buf, count, in_child(node, offset), flags);
}

static int raw_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    return node_zero(node->file, count, in_child(node, offset), flags);
}

static int raw_discard(struct node *node, uint64_t count, uint64_t offset)
{
    return node_discard(node->file, count, in_child(node, offset));
}

static int raw_flush(struct node *node)
{
    return node_flush(node->file);
}

/* Raw holds all of its disk: what the child lacks is zeroes here, never the backing file. */
static int raw_map(struct node *node, uint64_t offset, uint64_t count, struct mapping *out)
{
    struct node *child = node->file;
    if (!child->ops->map) {
        *out = (struct mapping) { .kind = MAP_DATA, .allocated = true, .length = count };
        return 0;
    }
    int err = child->ops->map(child, in_child(node, offset), count, out);
    if (!err && out->kind == MAP_ABSENT)
        out->kind = MAP_ZERO;
    return err;
}

static const struct node_ops raw_ops = {
    .driver = "raw",
    .pread = raw_pread,
    .pwrite = raw_pwrite,
    .zero = raw_zero,
    .discard = raw_discard,
    .flush = raw_flush,
    .map = raw_map,
};

int nb_raw_open(struct node *child, uint64_t offset, uint64_t size, uint32_t flags, struct node **out)
{
    if (offset > child->size || size > child->size - offset)
        return -ERANGE;
    struct raw *raw = node_alloc(sizeof *raw, &raw_ops, size ? size : child->size - offset, flags, child, NULL);
    if (!raw)
        return -ENOMEM;
    raw->start = offset;
    *out = &raw->node;
    return 0;
}
