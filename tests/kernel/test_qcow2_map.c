/* Lookups: every kind of damaged entry is refused before it is used; sound ones give the right runs. */
#include "events.h"
#include "image_file.h"

#define CLUSTER 65536u
#define CLUSTERS 64u
#define COPIED (UINT64_C(1) << 63)
#define COMPRESSED (UINT64_C(1) << 62)

static struct image make(uint32_t version)
{
    return image_make(UINT64_C(1) << 28, version, 16, CLUSTERS * CLUSTER);
}

/* An image with an L2 table, two data clusters and this entry first in the table: it must be refused before anything
 * but the table (and, to mark it corrupt, the header) is read. */
static void check_l2_refused(uint32_t version, uint64_t entry, uint32_t fault)
{
    static uint64_t id = 1000;
    struct image image = make(version);
    uint64_t l2 = image_add_l2(&image);
    uint8_t buf[512];
    memset(image.file->bytes + image_add_cluster(&image), 0x11, CLUSTER);
    image_add_cluster(&image);
    put64(image.file, l2, entry);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    nb_node_set_id(node, ++id);
    memset(buf, 0xee, sizeof buf);
    unsigned reads = image.file->reads;
    CHECK_INT(nb_node_pread(node, buf, sizeof buf, 0), -EIO);
    CHECK_INT(image.file->reads, reads + (version >= 3 ? 2 : 1));
    CHECK_FILLED(buf, 0xee, sizeof buf);      /* nothing of the file reached the guest */
    struct nb_event event = wait_event(NB_EVENT_CORRUPT, id);
    CHECK_INT(event.a, fault);
    CHECK_INT(event.b, fault == NB_FAULT_L2_ENTRY ? l2 : event.b);
    CHECK_INT(event.c, entry);
    CHECK_INT(nb_node_pwrite(node, buf, sizeof buf, 0, 0), -EIO);
    CHECK_INT(nb_node_pwrite(node, buf, sizeof buf, CLUSTER, 0), -EIO);
    nb_node_unref(node);
    CHECK_INT(get64(image.file, 72), version >= 3 ? 2 : 0);
    CHECK_INT(get64(image.file, l2), entry);
    image_free(&image);
}

static void damaged_l2_entries_are_refused(void)
{
    struct image probe = make(3);
    image_add_l2(&probe);
    uint64_t data = image_add_cluster(&probe), end = data + 2 * CLUSTER;
    image_free(&probe);
    check_l2_refused(3, (data + 512) | COPIED, NB_FAULT_L2_ENTRY);                    /* unaligned */
    check_l2_refused(3, end | COPIED, NB_FAULT_L2_ENTRY);                             /* beyond the end */
    check_l2_refused(3, UINT64_C(0x00ffffffffff0000) | COPIED, NB_FAULT_L2_ENTRY);    /* far beyond it */
    check_l2_refused(3, COPIED, NB_FAULT_L2_ENTRY);                                   /* COPIED without a cluster */
    check_l2_refused(3, COPIED | 1, NB_FAULT_L2_ENTRY);
    for (unsigned bit = 1; bit <= 8; bit++)
        check_l2_refused(3, data | COPIED | UINT64_C(1) << bit, NB_FAULT_L2_ENTRY);
    for (unsigned bit = 56; bit <= 61; bit++)
        check_l2_refused(3, data | COPIED | UINT64_C(1) << bit, NB_FAULT_L2_ENTRY);
    check_l2_refused(2, data | COPIED | 1, NB_FAULT_L2_ENTRY);                        /* version 2 has no zero flag */
    check_l2_refused(3, (data + 512) | 1, NB_FAULT_L2_ENTRY);                         /* preallocated zeroes, unaligned */
    check_l2_refused(3, end | 1, NB_FAULT_L2_ENTRY);
    check_l2_refused(3, COMPRESSED | COPIED | data, NB_FAULT_COMPRESSED);
    check_l2_refused(3, COMPRESSED | end, NB_FAULT_COMPRESSED);
    check_l2_refused(3, COMPRESSED | 512, NB_FAULT_COMPRESSED);                       /* inside the header */
    check_l2_refused(3, COMPRESSED | (3 * CLUSTER + 512), NB_FAULT_COMPRESSED);       /* inside the L1 table */
}

static void entries_that_point_to_metadata_are_refused(void)
{
    struct image probe = make(3);
    uint64_t l2 = image_add_l2(&probe);
    image_free(&probe);
    check_l2_refused(3, l2 | COPIED, NB_FAULT_L2_ENTRY);                  /* the table itself */
    check_l2_refused(3, CLUSTER | COPIED, NB_FAULT_L2_ENTRY);             /* refcount table */
    check_l2_refused(3, 2 * CLUSTER | COPIED, NB_FAULT_L2_ENTRY);         /* refcount block */
    check_l2_refused(3, 3 * CLUSTER | COPIED, NB_FAULT_L2_ENTRY);         /* L1 table */
}

static void check_open_refused(struct image *image, uint32_t kind, uint64_t index, uint64_t value)
{
    struct nb_fault fault;
    struct node *node;
    unsigned writes = image->file->writes;
    CHECK_INT(image_try_open(image, NB_NODE_UNMAP, &node, &fault), -EUCLEAN);
    CHECK_INT(fault.kind, kind);
    CHECK_INT(fault.index, index);
    CHECK_INT(fault.value, value);
    CHECK_INT(image->file->writes, writes);
    image_free(image);
}

static void check_l1_refused(uint64_t entry)
{
    struct image image = image_make(UINT64_C(1) << 30, 3, 9, UINT64_C(1) << 20);
    put64(image.file, image.layout.l1_offset + 8 * 5, entry);
    check_open_refused(&image, NB_FAULT_L1_ENTRY, 5, entry);
}

static void damaged_l1_entries_are_refused_at_open(void)
{
    struct image probe = image_make(UINT64_C(1) << 30, 3, 9, UINT64_C(1) << 20);
    uint64_t end = probe.file->node.size;
    image_free(&probe);
    check_l1_refused(end | COPIED);
    check_l1_refused(COPIED);
    check_l1_refused(512 | COPIED | 1);
    check_l1_refused(512 | COPIED | UINT64_C(1) << 56);
    check_l1_refused(512 | COPIED | UINT64_C(1) << 62);
    struct image unaligned = make(3);
    put64(unaligned.file, unaligned.layout.l1_offset, (CLUSTER + 512) | COPIED);
    check_open_refused(&unaligned, NB_FAULT_L1_ENTRY, 0, (CLUSTER + 512) | COPIED);
}

static void tables_beyond_the_end_of_the_file_are_refused_at_open(void)
{
    struct image image = make(3);
    uint64_t end = image.file->node.size;
    image.layout.l1_offset = end;
    check_open_refused(&image, NB_FAULT_TRUNCATED, 0, end);
    image = make(3);
    image.layout.l1_offset = UINT64_C(0x7fffffffffff0000);
    check_open_refused(&image, NB_FAULT_TRUNCATED, 0, end);
    image = make(3);
    put64(image.file, 48, end);
    check_open_refused(&image, NB_FAULT_TRUNCATED, 0, end);
    image = make(3);
    put64(image.file, 48, end + CLUSTER);
    check_open_refused(&image, NB_FAULT_TRUNCATED, 0, end);
    image = make(3);
    put32(image.file, 56, 100);
    check_open_refused(&image, NB_FAULT_TRUNCATED, 0, end);
}

static void damaged_refcount_table_entries_are_refused_at_open(void)
{
    struct image image = make(3);
    uint64_t end = image.file->node.size;
    put64(image.file, CLUSTER + 8, end);
    check_open_refused(&image, NB_FAULT_REFTABLE_ENTRY, 1, end);
    image = make(3);
    put64(image.file, CLUSTER + 8, CLUSTER + 512);
    check_open_refused(&image, NB_FAULT_REFTABLE_ENTRY, 1, CLUSTER + 512);
    image = make(3);
    put64(image.file, CLUSTER + 8, 1);
    check_open_refused(&image, NB_FAULT_REFTABLE_ENTRY, 1, 1);
}

static void an_unreadable_table_fails_only_the_request(void)
{
    struct image image = make(3);
    uint64_t l2 = image_add_l2(&image);
    put64(image.file, l2, image_add_cluster(&image) | COPIED);
    struct node *node = image_open(&image, NB_NODE_UNMAP), *injected;
    uint8_t buf[512];
    nb_node_unref(node);
    CHECK_OK(nb_error_inject_open(&image.file->node, 0, &injected));
    struct nb_fault fault;
    CHECK_OK(nb_qcow2_open(injected, NULL, &image.layout, 0, &node, &fault));
    CHECK_OK(nb_error_inject_rule(injected, 1, l2, CLUSTER, ENXIO, 0, 0, 1));
    CHECK_INT(nb_node_pread(node, buf, sizeof buf, 0), -ENXIO);
    CHECK_OK(nb_node_pread(node, buf, sizeof buf, 0));
    CHECK_OK(nb_node_pwrite(node, buf, sizeof buf, 0, 0));
    nb_node_unref(node);
    nb_node_unref(injected);
    image_free(&image);
}

static struct mapping map_at(struct node *node, uint64_t offset)
{
    struct mapping mapping;
    CHECK_OK(node->ops->map(node, offset, node->size - offset, &mapping));
    return mapping;
}

static void neighbouring_clusters_are_one_run(void)
{
    struct image image = make(3);
    uint64_t l2 = image_add_l2(&image), data = image_add_cluster(&image);
    image_add_cluster(&image);
    uint64_t third = image_add_cluster(&image);
    image_add_cluster(&image);
    put64(image.file, l2, data | COPIED);
    put64(image.file, l2 + 8, (data + CLUSTER) | COPIED);
    put64(image.file, l2 + 16, (third + CLUSTER) | COPIED);      /* a gap in the file */
    put64(image.file, l2 + 24, 1);
    put64(image.file, l2 + 32, 1);
    put64(image.file, l2 + 40, third | COPIED | 1);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    struct mapping run = map_at(node, 512);
    CHECK_INT(run.kind, MAP_DATA);
    CHECK_INT(run.length, 2 * CLUSTER - 512);
    CHECK_INT(run.host_offset, data + 512);
    run = map_at(node, 2 * CLUSTER);
    CHECK_INT(run.length, CLUSTER);
    run = map_at(node, 3 * CLUSTER);
    CHECK_INT(run.kind, MAP_ZERO);
    CHECK(!run.allocated);
    CHECK_INT(run.length, 2 * CLUSTER);
    run = map_at(node, 5 * CLUSTER + 1024);
    CHECK_INT(run.kind, MAP_ZERO);
    CHECK(run.allocated);
    CHECK_INT(run.host_offset, third + 1024);
    run = map_at(node, 6 * CLUSTER);
    CHECK_INT(run.kind, MAP_ABSENT);
    CHECK_INT(run.length, (CLUSTERS - 6) * CLUSTER);
    nb_node_unref(node);
    image_free(&image);
}

static void spans_without_a_table_are_one_run(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 9, UINT64_C(4) << 20);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    struct mapping run = map_at(node, 1024);
    CHECK_INT(run.kind, MAP_ABSENT);
    CHECK_INT(run.length, (UINT64_C(4) << 20) - 1024);
    CHECK_OK(nb_node_pwrite(node, "x", 1, UINT64_C(1) << 20, 0));
    run = map_at(node, 0);
    CHECK_INT(run.length, UINT64_C(1) << 20);
    nb_node_unref(node);
    image_free(&image);
}

static void a_shared_table_is_copied_before_it_is_changed(void)
{
    struct image image = make(3);
    uint64_t l2 = image_add_l2(&image), data = image_add_cluster(&image);
    put64(image.file, l2, data | COPIED);
    put64(image.file, image.layout.l1_offset, l2);                                   /* not COPIED */
    put16(image.file, 2 * CLUSTER + 2 * (l2 / CLUSTER), 2);
    memset(image.file->bytes + data, 0x11, CLUSTER);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    uint8_t buf[512];
    CHECK_OK(nb_node_pwrite(node, "x", 1, CLUSTER, 0));
    CHECK_OK(nb_node_pread(node, buf, sizeof buf, 0));
    CHECK_FILLED(buf, 0x11, sizeof buf);
    nb_node_unref(node);
    CHECK(get64(image.file, image.layout.l1_offset) != (l2 | COPIED));
    CHECK_INT(get64(image.file, l2 + 8), 0);
    image_free(&image);
}

int main(void)
{
    RUN(damaged_l2_entries_are_refused);
    RUN(entries_that_point_to_metadata_are_refused);
    RUN(damaged_l1_entries_are_refused_at_open);
    RUN(tables_beyond_the_end_of_the_file_are_refused_at_open);
    RUN(damaged_refcount_table_entries_are_refused_at_open);
    RUN(an_unreadable_table_fails_only_the_request);
    RUN(neighbouring_clusters_are_one_run);
    RUN(spans_without_a_table_are_one_run);
    RUN(a_shared_table_is_copied_before_it_is_changed);
    return 0;
}
