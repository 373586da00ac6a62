/* Nodes: life time, the checked public requests, and the walk down a backing chain. */
#include "node.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- life time ---- */

struct node *nb_node_ref(struct node *node)
{
    atomic_fetch_add_explicit(&node->refs, 1, memory_order_relaxed);
    return node;
}

void *node_alloc(size_t whole_size, const struct node_ops *ops, uint64_t size, uint32_t flags, struct node *file,
                 struct node *backing)
{
    size_t rounded = (whole_size + 63) / 64 * 64;      /* drivers keep counters on cache lines of their own */
    struct node *node = aligned_alloc(64, rounded);
    if (!node)
        return NULL;
    memset(node, 0, rounded);
    node->ops = ops;
    node->size = size;
    node->flags = flags;
    node->file = file ? nb_node_ref(file) : NULL;
    node->backing = backing ? nb_node_ref(backing) : NULL;
    atomic_init(&node->refs, 1);
    return node;
}

/* A loop over the chain, not a recursion: a chain may be thousands of layers deep. */
void nb_node_unref(struct node *node)
{
    while (node && atomic_fetch_sub_explicit(&node->refs, 1, memory_order_acq_rel) == 1) {
        struct node *backing = node->backing;
        if (node->ops->close)
            node->ops->close(node);
        nb_node_unref(node->file);
        free(node);
        node = backing;
    }
}

void nb_node_set_id(struct node *node, uint64_t id)
{
    node->id = id;
}

uint64_t nb_node_size(const struct node *node)
{
    return node->size;
}

const char *nb_node_driver(const struct node *node)
{
    return node->ops->driver;
}

bool nb_node_read_only(const struct node *node)
{
    return node->flags & NB_NODE_READ_ONLY;
}

int64_t nb_node_allocated(struct node *node)
{
    while (!node->ops->allocated) {
        if (!node->file)
            return -ENOTSUP;
        node = node->file;
    }
    return node->ops->allocated(node);
}

int nb_node_set_backing(struct node *node, struct node *backing)
{
    struct node *old = node->backing;
    node->backing = backing ? nb_node_ref(backing) : NULL;
    nb_node_unref(old);
    return 0;
}

/* ---- requests, bounds checked by the caller ---- */

int node_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    return node->ops->pread(node, buf, count, offset);
}

int node_pread_padded(struct node *node, void *buf, size_t count, uint64_t offset)
{
    size_t inside = 0;
    if (node && offset < node->size)
        inside = count < node->size - offset ? count : node->size - offset;
    memset((char *)buf + inside, 0, count - inside);
    return inside ? node_pread(node, buf, inside, offset) : 0;
}

int node_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    return node->ops->pwrite(node, buf, count, offset, flags);
}

/* Zeroes written as data, for drivers that know no other way. */
static int zero_by_writing(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    static const char zeroes[65536];
    while (count) {
        size_t part = count < sizeof zeroes ? count : sizeof zeroes;
        int err = node_pwrite(node, zeroes, part, offset, part == count ? flags & NB_REQ_FUA : 0);
        if (err)
            return err;
        count -= part;
        offset += part;
    }
    return 0;
}

int node_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    int err = node->ops->zero ? node->ops->zero(node, count, offset, flags) : -EOPNOTSUPP;
    if (err == -EOPNOTSUPP && !(flags & NB_REQ_FAST))
        err = zero_by_writing(node, count, offset, flags);
    return err;
}

int node_discard(struct node *node, uint64_t count, uint64_t offset)
{
    if (!(node->flags & NB_NODE_UNMAP) || !node->ops->discard)
        return 0;
    return node->ops->discard(node, count, offset);
}

int node_flush(struct node *node)
{
    if ((node->flags & (NB_NODE_NO_FLUSH | NB_NODE_READ_ONLY)) || !node->ops->flush)
        return 0;
    return node->ops->flush(node);
}

/* ---- block status ---- */

static int node_map(struct node *node, uint64_t offset, uint64_t count, struct mapping *out)
{
    if (node->ops->map)
        return node->ops->map(node, offset, count, out);
    *out = (struct mapping) { .kind = MAP_DATA, .allocated = true, .length = count };
    return 0;
}

int node_status(struct node *node, struct node *base, uint64_t offset, uint64_t count, struct nb_extent *extent)
{
    uint64_t limit = count;
    uint32_t depth = 0;
    *extent = (struct nb_extent) { .offset = offset, .flags = NB_EXTENT_ZERO | NB_EXTENT_HOLE };
    for (; node && node != base; depth += !node->filter, node = node->filter ? node->file : node->backing) {
        struct mapping mapping;
        if (offset >= node->size)
            break;      /* beyond a shorter layer: zeroes, from this layer on */
        if (limit > node->size - offset)
            limit = node->size - offset;
        if (node->filter && node->file)
            continue;
        int err = node_map(node, offset, limit, &mapping);
        if (err)
            return err;
        limit = mapping.length < limit ? mapping.length : limit;
        if (mapping.kind == MAP_ABSENT)
            continue;
        extent->node_id = node->id;
        if (mapping.kind == MAP_ZERO) {
            extent->flags = NB_EXTENT_ZERO | (mapping.allocated ? 0 : NB_EXTENT_HOLE);
        } else if (mapping.kind == MAP_COMPRESSED) {
            extent->flags = NB_EXTENT_DATA | NB_EXTENT_COMPRESSED;
        } else {
            extent->flags = NB_EXTENT_DATA;
        }
        if (mapping.file) {
            extent->flags |= NB_EXTENT_OFFSET;
            extent->host_offset = mapping.host_offset;
        }
        break;
    }
    extent->length = limit;
    extent->depth = depth;
    return 0;
}

static bool says_the_same(const struct nb_extent *a, const struct nb_extent *b)
{
    return a->flags == b->flags && a->depth == b->depth && a->node_id == b->node_id
        && (!(a->flags & NB_EXTENT_OFFSET) || a->host_offset + a->length == b->host_offset);
}

int nb_node_block_status(struct node *node, struct node *base, uint64_t offset, uint64_t count,
                         struct nb_extent *extents, size_t capacity)
{
    size_t used = 0;
    if (!count || offset > node->size || count > node->size - offset)
        return -EINVAL;
    while (count) {
        struct nb_extent extent;
        int err = node_status(node, base, offset, count, &extent);
        if (err)
            return err;
        if (used && says_the_same(&extents[used - 1], &extent))
            extents[used - 1].length += extent.length;
        else if (used < capacity)
            extents[used++] = extent;
        else
            break;
        offset += extent.length;
        count -= extent.length;
    }
    return (int)used;
}

/* ---- checked requests ---- */

static bool outside(const struct node *node, uint64_t count, uint64_t offset)
{
    return offset > node->size || count > node->size - offset;
}

int nb_node_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    if (outside(node, count, offset))
        return -EINVAL;
    return count ? node_pread(node, buf, count, offset) : 0;
}

static int check_write(const struct node *node, uint64_t count, uint64_t offset)
{
    if (node->flags & NB_NODE_READ_ONLY)
        return -EROFS;
    return outside(node, count, offset) ? -ENOSPC : 0;
}

int nb_node_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    int err = check_write(node, count, offset);
    if (err || !count)
        return err;
    return node_pwrite(node, buf, count, offset, flags);
}

int nb_node_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    int err = check_write(node, count, offset);
    if (err || !count)
        return err;
    return node_zero(node, count, offset, flags);
}

int nb_node_discard(struct node *node, uint64_t count, uint64_t offset)
{
    int err = check_write(node, count, offset);
    if (err || !count)
        return err;
    return node_discard(node, count, offset);
}

int nb_node_flush(struct node *node)
{
    return node_flush(node);
}

int nb_node_write_back(struct node *node)
{
    while (node && !node->ops->write_back)
        node = node->file;
    return node && !(node->flags & NB_NODE_READ_ONLY) ? node->ops->write_back(node) : 0;
}
