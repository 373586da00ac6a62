/* Nodes: checked requests, block status through a chain, life times. */
#include "image_file.h"

enum { CLUSTER = 65536 };

static void requests_outside_the_node_are_refused(void)
{
    struct image_file *disk = image_file_new(65536);
    uint8_t buf[512] = { 0 };
    static const uint64_t offsets[] = { 32768 - 511, 32768, UINT64_MAX, UINT64_MAX - 511 };
    disk->node.size = 32768;
    for (int i = 0; i < 4; i++) {
        CHECK_INT(nb_node_pread(&disk->node, buf, 512, offsets[i]), -EINVAL);
        CHECK_INT(nb_node_pwrite(&disk->node, buf, 512, offsets[i], 0), -ENOSPC);
        CHECK_INT(nb_node_zero(&disk->node, 512, offsets[i], 0), -ENOSPC);
        CHECK_INT(nb_node_discard(&disk->node, 512, offsets[i]), -ENOSPC);
    }
    disk->node.flags |= NB_NODE_READ_ONLY;
    CHECK_INT(nb_node_pwrite(&disk->node, buf, 512, 0, 0), -EROFS);
    CHECK_INT(nb_node_zero(&disk->node, 512, 0, 0), -EROFS);
    CHECK_INT(nb_node_discard(&disk->node, 512, 0), -EROFS);
    CHECK_INT(disk->reads + disk->writes + disk->discards, 0);
    nb_node_unref(&disk->node);
}

static void zeroes_are_written_where_the_driver_knows_no_other_way(void)
{
    struct image_file *disk = image_file_new(1 << 20);
    disk->node.size = 1 << 20;
    memset(disk->bytes, 0x11, 1 << 20);
    CHECK_INT(nb_node_zero(&disk->node, 200000, 1000, NB_REQ_FAST), -EOPNOTSUPP);
    CHECK_OK(nb_node_zero(&disk->node, 200000, 1000, 0));
    CHECK_FILLED(disk->bytes, 0x11, 1000);
    CHECK_FILLED(disk->bytes + 1000, 0, 200000);
    CHECK_FILLED(disk->bytes + 201000, 0x11, 1000);
    nb_node_unref(&disk->node);
}

static void flags_turn_discards_and_flushes_off(void)
{
    struct image_file *disk = image_file_new(65536);
    disk->node.size = 65536;
    disk->node.flags = NB_NODE_NO_FLUSH;
    CHECK_OK(nb_node_discard(&disk->node, 512, 0));
    CHECK_OK(nb_node_flush(&disk->node));
    CHECK_INT(disk->discards + disk->flushes, 0);
    nb_node_unref(&disk->node);
}

static void block_status_names_the_layer_that_answers(void)
{
    struct image bottom = image_make(UINT64_C(1) << 28, 3, 16, 4 * CLUSTER);
    struct image top = image_make(UINT64_C(1) << 28, 3, 16, 8 * CLUSTER);
    struct nb_extent extents[8];
    struct node *low = image_open(&bottom, NB_NODE_UNMAP);
    nb_node_set_id(low, 1);
    top.backing = low;
    struct node *high = image_open(&top, NB_NODE_UNMAP);
    nb_node_set_id(high, 2);
    CHECK_OK(nb_node_pwrite(low, "x", 1, 0, 0));
    CHECK_OK(nb_node_pwrite(low, "x", 1, CLUSTER, 0));
    CHECK_OK(nb_node_pwrite(high, "y", 1, CLUSTER, 0));
    CHECK_OK(nb_node_zero(high, CLUSTER, 2 * CLUSTER, 0));
    CHECK_INT(nb_node_block_status(high, NULL, 0, 8 * CLUSTER, extents, 8), 5);      /* what both lack, and what lies beyond the lower */
    CHECK_INT(extents[0].flags, NB_EXTENT_DATA | NB_EXTENT_OFFSET);
    CHECK_INT(extents[0].node_id, 1);
    CHECK_INT(extents[0].depth, 1);
    CHECK_INT(extents[1].node_id, 2);
    CHECK_INT(extents[1].offset, CLUSTER);
    CHECK_INT(extents[1].length, CLUSTER);
    CHECK_INT(extents[2].flags, NB_EXTENT_ZERO | NB_EXTENT_HOLE);
    CHECK_INT(extents[2].depth, 0);
    CHECK_INT(extents[3].flags, NB_EXTENT_ZERO | NB_EXTENT_HOLE);
    CHECK_INT(extents[3].length + extents[3].offset <= 8 * CLUSTER, 1);
    CHECK_INT(nb_node_block_status(high, low, 0, CLUSTER, extents, 8), 1);
    CHECK_INT(extents[0].flags, NB_EXTENT_ZERO | NB_EXTENT_HOLE);
    CHECK_INT(nb_node_block_status(high, NULL, 0, 8 * CLUSTER, extents, 1), 1);
    CHECK_INT(extents[0].length, CLUSTER);
    CHECK_INT(nb_node_block_status(high, NULL, CLUSTER, 8 * CLUSTER, extents, 8), -EINVAL);
    CHECK_INT(nb_node_block_status(high, NULL, 0, 0, extents, 8), -EINVAL);
    nb_node_unref(high);
    image_free(&top);
    image_free(&bottom);
}

static void a_long_chain_is_dropped_without_recursion(void)
{
    struct image_file *disk = image_file_new(4096);
    struct node *top = nb_node_ref(&disk->node);
    for (int i = 0; i < 20000; i++) {
        struct node *next = node_alloc(sizeof *next, disk->node.ops, 512, 0, NULL, top);
        static const struct node_ops nothing = { .driver = "nothing" };
        next->ops = &nothing;
        nb_node_unref(top);
        top = next;
    }
    nb_node_unref(top);
    CHECK_INT(disk->node.refs, 1);
    nb_node_unref(&disk->node);
}

int main(void)
{
    RUN(requests_outside_the_node_are_refused);
    RUN(zeroes_are_written_where_the_driver_knows_no_other_way);
    RUN(flags_turn_discards_and_flushes_off);
    RUN(block_status_names_the_layer_that_answers);
    RUN(a_long_chain_is_dropped_without_recursion);
    return 0;
}
