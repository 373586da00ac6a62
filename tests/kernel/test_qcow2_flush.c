/* The order in which a flush writes, seen in the file's log. */
#include "events.h"
#include "image_file.h"

enum { CLUSTER = 65536 };

static struct node *open_logged(struct image *image)
{
    struct node *node = image_open(image, NB_NODE_UNMAP);
    image->file->logging = true;
    return node;
}

/* Position in the log of the first write that overlaps [offset, offset + count); fails if there is none. */
static size_t write_at(const struct image_file *file, uint64_t offset, uint64_t count)
{
    for (size_t i = 0; i < file->log_count; i++) {
        const struct file_record *record = &file->log[i];
        if (record->op == FILE_WRITE && record->offset < offset + count && offset < record->offset + record->count)
            return i;
    }
    check_failed(__FILE__, __LINE__, "nothing was written at %ju", (uintmax_t)offset);
}

static unsigned flushes_between(const struct image_file *file, size_t from, size_t to)
{
    unsigned count = 0;
    for (size_t i = from; i < to; i++)
        count += file->log[i].op == FILE_FLUSH;
    return count;
}

static void data_and_refcounts_then_l2_then_l1(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 16, 8 * CLUSTER);
    struct node *node = open_logged(&image);
    struct image_file *file = image.file;
    CHECK_OK(nb_node_pwrite(node, "x", 1, 0, 0));
    CHECK_OK(nb_node_flush(node));
    uint64_t table = get64(file, image.layout.l1_offset) & ~(UINT64_C(1) << 63);
    size_t block = write_at(file, 2 * CLUSTER, CLUSTER), l1 = write_at(file, image.layout.l1_offset, 8), l2 = 0;
    for (size_t i = block; i < file->log_count; i++)
        if (file->log[i].op == FILE_WRITE && file->log[i].offset == table)
            l2 = i;
    CHECK(block < l2 && l2 < l1);
    CHECK_INT(flushes_between(file, block, l2), 1);
    CHECK_INT(flushes_between(file, l2, l1), 1);
    CHECK_INT(flushes_between(file, l1, file->log_count), 1);
    nb_node_unref(node);
    image_free(&image);
}

static void an_overwrite_costs_one_flush(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 16, 8 * CLUSTER);
    struct node *node = open_logged(&image);
    CHECK_OK(nb_node_pwrite(node, "x", 1, 0, 0));
    CHECK_OK(nb_node_flush(node));
    unsigned flushes = image.file->flushes, writes = image.file->writes;
    CHECK_OK(nb_node_pwrite(node, "y", 1, 0, NB_REQ_FUA));
    CHECK_INT(image.file->flushes, flushes + 1);
    CHECK_INT(image.file->writes, writes + 1);
    nb_node_unref(node);
    image_free(&image);
}

static void a_new_cluster_in_a_known_table_costs_two_flushes(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 16, 8 * CLUSTER);
    struct node *node = open_logged(&image);
    CHECK_OK(nb_node_pwrite(node, "x", 1, 0, NB_REQ_FUA));
    unsigned flushes = image.file->flushes;
    CHECK_OK(nb_node_pwrite(node, "x", 1, CLUSTER, NB_REQ_FUA));
    CHECK_INT(image.file->flushes, flushes + 2);
    nb_node_unref(node);
    image_free(&image);
}

/* 512-byte clusters, 8 MiB: the refcount table moves. */
static void a_moved_refcount_table_is_durable_before_the_header_names_it(void)
{
    struct image image = image_make(UINT64_C(1) << 30, 3, 9, UINT64_C(12) << 20);
    struct node *node = open_logged(&image);
    struct image_file *file = image.file;
    uint8_t *buf = calloc(1, UINT64_C(12) << 20);
    CHECK_OK(nb_node_pwrite(node, buf, UINT64_C(12) << 20, 0, NB_REQ_FUA));
    size_t header = write_at(file, 48, 12), l1 = write_at(file, image.layout.l1_offset, 8), table = 0;
    uint64_t host = get64(file, 48);
    for (size_t i = 0; i < header; i++)
        if (file->log[i].op == FILE_WRITE && file->log[i].offset == host)
            table = i;
    CHECK(table);
    CHECK_INT(flushes_between(file, table, header), 1);
    for (size_t i = header + 1; i < file->log_count && file->log[i].op != FILE_FLUSH; i++)
        CHECK(file->log[i].op != FILE_WRITE);
    CHECK(header < l1 || l1 < table);
    free(buf);
    nb_node_unref(node);
    image_free(&image);
}

struct failing {
    enum file_op op;
    int left;                      /* requests that fail */
};

static int fail_some(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    struct failing *failing = file->hook_data;
    (void)offset, (void)count;
    return !after && op == failing->op && failing->left-- > 0 ? -ENOSPC : 0;
}

static void a_failed_flush_is_told_and_the_next_one_writes_everything(void)
{
    static const enum file_op ops[] = { FILE_WRITE, FILE_FLUSH };
    for (int i = 0; i < 2; i++) {
        struct image image = image_make(UINT64_C(1) << 28, 3, 16, 8 * CLUSTER);
        struct node *node = open_logged(&image);
        CHECK_OK(nb_node_pwrite(node, "x", 1, 0, 0));
        struct failing failing = { ops[i], 1 };
        image.file->hook_data = &failing;
        image.file->hook = fail_some;
        CHECK_INT(nb_node_flush(node), -ENOSPC);
        CHECK_INT(get64(image.file, image.layout.l1_offset), 0);
        CHECK_OK(nb_node_flush(node));
        CHECK(get64(image.file, image.layout.l1_offset));
        nb_node_unref(node);
        struct image_check found = image_check(image.file->bytes, image.file->end, &image.layout);
        CHECK_INT(found.corruptions, 0);
        CHECK_INT(found.leaks, 0);
        image_free(&image);
    }
}

static void write_back_makes_the_file_consistent_without_a_flush(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 16, 8 * CLUSTER);
    struct node *node = open_logged(&image);
    CHECK_OK(nb_node_pwrite(node, "x", 1, 0, 0));
    CHECK_OK(nb_node_write_back(node));
    CHECK_INT(image.file->flushes, 0);
    struct image_check found = image_check(image.file->bytes, image.file->end, &image.layout);
    CHECK_INT(found.corruptions, 0);
    CHECK(get64(image.file, image.layout.l1_offset));
    nb_node_unref(node);
    image_free(&image);
}

/* Callers that come while one flush runs are served together by the next. */
enum { CALLERS = 8 };

static struct gate first_flush = GATE_INIT;

static int stop_first_flush(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    (void)offset, (void)count;
    if (op == FILE_FLUSH && !after && !atomic_load(&file->flushes))
        gate_pass(&first_flush);
    return 0;
}

static void *flush_it(void *node)
{
    CHECK_OK(nb_node_flush(node));
    return NULL;
}

static void flushes_asked_together_are_one(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 16, 8 * CLUSTER);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    pthread_t threads[CALLERS];
    image.file->hook = stop_first_flush;
    CHECK_OK(pthread_create(&threads[0], NULL, flush_it, node));
    gate_await(&first_flush, 1);
    for (int i = 1; i < CALLERS; i++)
        CHECK_OK(pthread_create(&threads[i], NULL, flush_it, node));
    pause_ns(50000000);      /* no event tells that they wait; more flushes, were they late, would still be right */
    gate_open(&first_flush);
    for (int i = 0; i < CALLERS; i++)
        CHECK_OK(pthread_join(threads[i], NULL));
    CHECK(image.file->flushes < CALLERS);
    nb_node_unref(node);
    image_free(&image);
}

int main(void)
{
    RUN(data_and_refcounts_then_l2_then_l1);
    RUN(an_overwrite_costs_one_flush);
    RUN(a_new_cluster_in_a_known_table_costs_two_flushes);
    RUN(a_moved_refcount_table_is_durable_before_the_header_names_it);
    RUN(a_failed_flush_is_told_and_the_next_one_writes_everything);
    RUN(write_back_makes_the_file_consistent_without_a_flush);
    RUN(flushes_asked_together_are_one);
    return 0;
}
