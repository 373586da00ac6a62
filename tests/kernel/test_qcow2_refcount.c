/* Refcounts: growth of blocks and table, allocation, freeing, and what damage in them means. */
#include "events.h"
#include "image_file.h"

enum { CLUSTER = 512 };

static void write_range(struct node *node, uint8_t byte, uint64_t count, uint64_t offset)
{
    uint8_t *buf = malloc(count);
    memset(buf, byte, count);
    CHECK_OK(nb_node_pwrite(node, buf, count, offset, 0));
    free(buf);
}

static void check_sound(struct image *image, uint64_t leaks)
{
    struct image_check found = image_check(image->file->bytes, image->file->end, &image->layout);
    CHECK_INT(found.corruptions, 0);
    CHECK_INT(found.leaks, leaks);
}

static void the_table_grows_and_frees_its_former_place(void)
{
    struct image image = image_make(UINT64_C(1) << 30, 3, 9, UINT64_C(24) << 20);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    write_range(node, 0x11, UINT64_C(24) << 20, 0);
    CHECK_OK(nb_node_flush(node));
    CHECK(get64(image.file, 48) != CLUSTER);
    CHECK_INT(get64(image.file, get64(image.file, 48)), 2 * CLUSTER);
    nb_node_unref(node);
    check_sound(&image, 0);
    image_free(&image);
}

/* ---- the header's write fails when the table has moved ---- */

struct header_fault {
    bool on_flush;                 /* fail the flush after the header's write, else the write */
    bool written, failed;
};

static int fail_header(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    struct header_fault *fault = file->hook_data;
    (void)count;
    bool header = op == FILE_WRITE && offset == 48;
    if (header && after)
        fault->written = true;
    bool here = fault->on_flush ? op == FILE_FLUSH && fault->written && !after : header && !after;
    if (!here || fault->failed)
        return 0;
    fault->failed = true;
    return -EIO;
}

/* Whichever table the header names on disk, it stays true: nothing it refers to is given away. */
static void a_failure_at_the_header_leaves_both_tables_valid(void)
{
    for (int on_flush = 0; on_flush < 2; on_flush++) {
        struct image image = image_make(UINT64_C(1) << 30, 3, 9, UINT64_C(24) << 20);
        struct node *node = image_open(&image, NB_NODE_UNMAP);
        struct header_fault fault = { .on_flush = on_flush };
        image.file->hook_data = &fault;
        image.file->hook = fail_header;
        uint8_t *buf = calloc(1, 65536);
        for (uint64_t at = 0; at < UINT64_C(16) << 20; at += 65536) {
            (void)nb_node_pwrite(node, buf, 65536, at, 0);
            (void)nb_node_flush(node);
            check_sound(&image, image_check(image.file->bytes, image.file->end, &image.layout).leaks);
        }
        CHECK(fault.failed);
        free(buf);
        CHECK_OK(nb_node_flush(node));
        nb_node_unref(node);
        check_sound(&image, image_check(image.file->bytes, image.file->end, &image.layout).leaks);
        image_free(&image);
    }
}

static void freed_clusters_are_used_again(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 9, UINT64_C(1) << 20);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    write_range(node, 0x11, 65536, 0);
    uint64_t end = 0;
    for (int round = 0; round < 10; round++) {
        CHECK_OK(nb_node_discard(node, 65536, 0));
        CHECK_OK(nb_node_flush(node));
        write_range(node, 0x22, 65536, 0);
        if (round == 1)
            end = image.file->end;
        if (round > 1)
            CHECK_INT(image.file->end, end);
    }
    nb_node_unref(node);
    check_sound(&image, 0);
    image_free(&image);
}

static void a_dropped_cluster_is_not_reused_before_a_flush(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 16, UINT64_C(4) << 20);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    write_range(node, 0x11, 65536, 0);
    CHECK_OK(nb_node_flush(node));
    struct mapping old, new;
    CHECK_OK(node->ops->map(node, 0, 512, &old));
    CHECK_OK(nb_node_discard(node, 65536, 0));
    CHECK_OK(nb_node_write_back(node));      /* not durable: not free either */
    write_range(node, 0x22, 65536, 65536);
    CHECK_OK(node->ops->map(node, 65536, 512, &new));
    CHECK(new.host_offset != old.host_offset);
    CHECK_OK(nb_node_flush(node));
    write_range(node, 0x33, 65536, 131072);
    CHECK_OK(node->ops->map(node, 131072, 512, &new));
    CHECK_INT(new.host_offset, old.host_offset);
    nb_node_unref(node);
    check_sound(&image, 0);
    image_free(&image);
}

static void metadata_that_counts_as_free_is_not_given_away(void)
{
    static uint64_t id = 2000;
    for (uint64_t cluster = 0; cluster < 4; cluster++) {      /* header, table, block, L1 */
        struct image image = image_make(UINT64_C(1) << 28, 3, 16, UINT64_C(4) << 20);
        put16(image.file, 2 * 65536 + 2 * cluster, 0);
        struct node *node = image_open(&image, NB_NODE_UNMAP);
        nb_node_set_id(node, ++id);
        uint8_t before[65536], after[65536];
        image_access(image.file, false, before, 65536, cluster << 16);
        CHECK_INT(nb_node_pwrite(node, "x", 1, 0, 0), -EIO);
        CHECK_INT(wait_event(NB_EVENT_CORRUPT, id).a, NB_FAULT_REFCOUNT);
        nb_node_unref(node);
        image_access(image.file, false, after, 65536, cluster << 16);
        if (cluster)      /* the header got its corrupt bit */
            CHECK_BYTES(after, before, 65536);
        image_free(&image);
    }
}

static void freeing_what_counts_as_free_is_damage(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 16, UINT64_C(4) << 20);
    uint64_t l2 = image_add_l2(&image), data = image_add_cluster(&image);
    put64(image.file, l2, data | UINT64_C(1) << 63);
    put16(image.file, 2 * 65536 + 2 * (data >> 16), 0);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    nb_node_set_id(node, 3000);
    CHECK_OK(nb_node_discard(node, 65536, 0));
    CHECK_INT(nb_node_flush(node), -EIO);
    CHECK_INT(wait_event(NB_EVENT_CORRUPT, 3000).b, data);
    nb_node_unref(node);
    image_free(&image);
}

int main(void)
{
    RUN(the_table_grows_and_frees_its_former_place);
    RUN(a_failure_at_the_header_leaves_both_tables_valid);
    RUN(freed_clusters_are_used_again);
    RUN(a_dropped_cluster_is_not_reused_before_a_flush);
    RUN(metadata_that_counts_as_free_is_not_given_away);
    RUN(freeing_what_counts_as_free_is_damage);
    return 0;
}
