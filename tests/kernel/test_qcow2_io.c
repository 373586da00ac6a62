/* Requests on a qcow2 layer, with every interleaving that matters held open by a stopped request. */
#include "events.h"
#include "image_file.h"

#define CLUSTER 65536u
#define CLUSTERS 64u

/* ---- a request that stops ---- */

/* Stops the first request of that kind which overlaps [offset, offset + count) of the file. */
struct stop {
    struct gate gate;
    enum file_op op;
    bool after;
    uint64_t offset, count;
    atomic_bool taken;
};

static int stop_once(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    struct stop *stop = file->hook_data;
    if (op == stop->op && after == stop->after && offset < stop->offset + stop->count && stop->offset < offset + count
        && !atomic_exchange(&stop->taken, true))
        gate_pass(&stop->gate);
    return 0;
}

static void stop_at(struct image_file *file, struct stop *stop, enum file_op op, bool after, uint64_t offset,
                    uint64_t count)
{
    *stop = (struct stop) { .gate = GATE_INIT, .op = op, .after = after, .offset = offset, .count = count };
    file->hook_data = stop;
    file->hook = stop_once;
}

struct request {
    struct node *node;
    uint8_t byte;
    bool read;
    uint64_t offset, count;
    uint8_t *buf;
    pthread_t thread;
    atomic_bool ended;
};

static void *do_request(void *arg)
{
    struct request *request = arg;
    request->buf = malloc(request->count);
    memset(request->buf, request->byte, request->count);
    if (request->read)
        CHECK_OK(nb_node_pread(request->node, request->buf, request->count, request->offset));
    else
        CHECK_OK(nb_node_pwrite(request->node, request->buf, request->count, request->offset, 0));
    atomic_store(&request->ended, true);
    return NULL;
}

static void begin(struct request *request)
{
    CHECK_OK(pthread_create(&request->thread, NULL, do_request, request));
}

static void end(struct request *request)
{
    CHECK_OK(pthread_join(request->thread, NULL));
}

/* ---- small helpers ---- */

static void write_bytes(struct node *node, uint8_t byte, uint64_t count, uint64_t offset)
{
    uint8_t *buf = malloc(count);
    memset(buf, byte, count);
    CHECK_OK(nb_node_pwrite(node, buf, count, offset, 0));
    free(buf);
}

static void check_reads(struct node *node, uint8_t byte, uint64_t count, uint64_t offset)
{
    uint8_t *buf = malloc(count);
    CHECK_OK(nb_node_pread(node, buf, count, offset));
    CHECK_FILLED(buf, byte, count);
    free(buf);
}

static struct image make(uint32_t version, uint8_t backing_byte)
{
    struct image image = image_make(UINT64_C(1) << 30, version, 16, CLUSTERS * CLUSTER);
    if (backing_byte) {
        struct image_file *backing = image_file_new(CLUSTERS * CLUSTER);
        backing->node.size = CLUSTERS * CLUSTER;
        memset(backing->bytes, backing_byte, CLUSTERS * CLUSTER);
        image.backing = &backing->node;
    }
    return image;
}

static uint64_t host_of(struct node *node, uint64_t offset)
{
    struct mapping mapping;
    CHECK_OK(node->ops->map(node, offset, 512, &mapping));
    CHECK(mapping.file);
    return mapping.host_offset;
}

static void close_sound(struct image *image, struct node *node)
{
    image->file->hook = NULL;
    nb_node_unref(node);
    struct image_check found = image_check(image->file->bytes, image->file->end, &image->layout);
    CHECK_INT(found.corruptions, 0);
    CHECK_INT(found.leaks, 0);
    image_free(image);
}

/* ---- interleavings ---- */

/* An overwrite in flight is overtaken by a zeroing of its cluster; another write then takes the zero flag away.  What
 * was seen as zeroes after all of these had ended or begun must not turn into the overwrite's data. */
static void an_overtaken_overwrite_stays_overtaken(void)
{
    struct image image = make(3, 0);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    struct stop first, second;
    write_bytes(node, 0x11, CLUSTER, 0);
    uint64_t host = host_of(node, 0);

    stop_at(image.file, &first, FILE_WRITE, false, host + 4096, 512);
    struct request late = { .node = node, .byte = 0x22, .offset = 4096, .count = 512 };
    begin(&late);
    gate_await(&first.gate, 1);
    CHECK_OK(nb_node_zero(node, CLUSTER, 0, 0));

    stop_at(image.file, &second, FILE_WRITE, true, CLUSTER, UINT64_C(1) << 40);
    struct request other = { .node = node, .byte = 0x33, .offset = 0, .count = 512 };
    begin(&other);
    gate_await(&second.gate, 1);      /* its data is in the file, the entry not changed yet */
    gate_open(&first.gate);
    end(&late);
    check_reads(node, 0, 512, 4096);
    gate_open(&second.gate);
    end(&other);
    check_reads(node, 0x33, 512, 0);
    check_reads(node, 0, 512, 4096);
    free(late.buf);
    free(other.buf);
    close_sound(&image, node);
}

static void a_stopped_reader_never_sees_who_reuses_its_cluster(void)
{
    struct image image = make(3, 0);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    struct stop stop;
    write_bytes(node, 0x11, CLUSTER, 0);
    CHECK_OK(nb_node_flush(node));
    uint64_t host = host_of(node, 0);
    stop_at(image.file, &stop, FILE_READ, false, host, CLUSTER);
    struct request reader = { .node = node, .read = true, .count = CLUSTER };
    begin(&reader);
    gate_await(&stop.gate, 1);
    CHECK_OK(nb_node_discard(node, CLUSTER, 0));
    for (uint64_t i = 1; i < 8; i++) {
        CHECK_OK(nb_node_flush(node));
        write_bytes(node, 0x22, CLUSTER, i * CLUSTER);
        CHECK(host_of(node, i * CLUSTER) != host);
    }
    gate_open(&stop.gate);
    end(&reader);
    for (uint64_t i = 0; i < CLUSTER; i++)
        CHECK(reader.buf[i] == 0x11 || reader.buf[i] == 0);
    free(reader.buf);

    CHECK_OK(nb_node_flush(node));      /* with the reader gone the cluster is free */
    write_bytes(node, 0x33, CLUSTER, 9 * CLUSTER);
    CHECK_INT(host_of(node, 9 * CLUSTER), host);
    close_sound(&image, node);
}

static void a_late_overwrite_never_lands_in_a_reused_cluster(void)
{
    struct image image = make(3, 0);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    struct stop stop;
    write_bytes(node, 0x11, CLUSTER, 0);
    CHECK_OK(nb_node_flush(node));
    stop_at(image.file, &stop, FILE_WRITE, false, host_of(node, 0), CLUSTER);
    struct request late = { .node = node, .byte = 0x22, .count = 512 };
    begin(&late);
    gate_await(&stop.gate, 1);
    CHECK_OK(nb_node_discard(node, CLUSTER, 0));
    for (uint64_t i = 1; i < 8; i++) {
        CHECK_OK(nb_node_flush(node));
        write_bytes(node, 0x33, CLUSTER, i * CLUSTER);
    }
    gate_open(&stop.gate);
    end(&late);
    for (uint64_t i = 1; i < 8; i++)
        check_reads(node, 0x33, CLUSTER, i * CLUSTER);
    check_reads(node, 0, CLUSTER, 0);
    free(late.buf);
    close_sound(&image, node);
}

/* The loss that a well-known copy-on-write filter has: a small write reads the old cluster, a large one is acknowledged
 * meanwhile, and the small one writes the old cluster back. */
static void a_small_write_never_undoes_an_overlapping_large_one(void)
{
    struct image image = make(3, 0x77);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    struct stop stop;
    stop_at(image_file_of(image.backing), &stop, FILE_READ, true, 0, CLUSTER);
    struct request small = { .node = node, .byte = 0x11, .offset = 8192, .count = 512 };
    struct request large = { .node = node, .byte = 0x22, .offset = 0, .count = CLUSTER };
    begin(&small);
    gate_await(&stop.gate, 1);
    begin(&large);
    pause_ns(20000000);      /* no event tells that it waits, as it should */
    bool overtook = atomic_load(&large.ended);
    gate_open(&stop.gate);
    end(&small);
    end(&large);
    check_reads(node, 0x22, 8192, 0);
    check_reads(node, 0x22, CLUSTER - 8704, 8704);
    check_reads(node, overtook ? 0x11 : 0x22, 512, 8192);
    free(small.buf);
    free(large.buf);
    close_sound(&image, node);
}

/* ---- one request at a time ---- */

static void partial_writes_keep_what_the_backing_file_shows(void)
{
    struct image image = make(3, 0x77);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    write_bytes(node, 0x11, 512, 1024);
    write_bytes(node, 0x22, 2 * CLUSTER + 1024, 5 * CLUSTER - 512);
    check_reads(node, 0x77, 1024, 0);
    check_reads(node, 0x11, 512, 1024);
    check_reads(node, 0x77, 3 * CLUSTER - 1536, 1536);
    check_reads(node, 0x77, CLUSTER - 512, 4 * CLUSTER);
    check_reads(node, 0x22, 2 * CLUSTER + 1024, 5 * CLUSTER - 512);
    check_reads(node, 0x77, CLUSTER - 512, 7 * CLUSTER + 512);
    close_sound(&image, node);
}

static void what_reuses_a_cluster_never_shows_its_old_bytes(void)
{
    struct image image = make(3, 0);
    image.file->node.flags = 0;      /* no holes are punched: the old bytes stay in the file */
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    write_bytes(node, 0x11, CLUSTER, 0);
    uint64_t host = host_of(node, 0);
    CHECK_OK(nb_node_discard(node, CLUSTER, 0));
    CHECK_OK(nb_node_flush(node));
    write_bytes(node, 0x22, 512, CLUSTER + 512);
    CHECK_INT(host_of(node, CLUSTER), host);
    check_reads(node, 0, 512, CLUSTER);
    check_reads(node, 0, CLUSTER - 1024, CLUSTER + 1024);
    close_sound(&image, node);
}

static void zeroes_and_discards_hide_data_and_backing(void)
{
    for (int backed = 0; backed < 2; backed++)
        for (uint32_t flags = 0; flags <= NB_REQ_MAY_UNMAP; flags += NB_REQ_MAY_UNMAP) {
            struct image image = make(3, backed ? 0x77 : 0);
            struct node *node = image_open(&image, NB_NODE_UNMAP);
            write_bytes(node, 0x11, 4 * CLUSTER, 0);
            CHECK_OK(nb_node_zero(node, CLUSTER + 1024, CLUSTER - 512, flags));
            CHECK_OK(nb_node_zero(node, CLUSTER, 8 * CLUSTER, flags));
            CHECK_OK(nb_node_zero(node, 512, 9 * CLUSTER + 512, flags));
            CHECK_OK(nb_node_discard(node, CLUSTER, 3 * CLUSTER));
            check_reads(node, 0x11, CLUSTER - 512, 0);
            check_reads(node, 0, CLUSTER + 1024, CLUSTER - 512);
            check_reads(node, 0x11, CLUSTER - 512, 2 * CLUSTER + 512);
            check_reads(node, 0, CLUSTER, 3 * CLUSTER);
            check_reads(node, 0, CLUSTER, 8 * CLUSTER);
            check_reads(node, 0, 512, 9 * CLUSTER + 512);
            check_reads(node, backed ? 0x77 : 0, 512, 9 * CLUSTER);
            close_sound(&image, node);
        }
}

static void zeroes_of_part_of_a_cluster_are_not_fast(void)
{
    struct image image = make(3, 0);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    write_bytes(node, 0x11, CLUSTER, 0);
    CHECK_INT(nb_node_zero(node, 512, 512, NB_REQ_FAST), -EOPNOTSUPP);
    CHECK_OK(nb_node_zero(node, CLUSTER, 0, NB_REQ_FAST));
    CHECK_OK(nb_node_zero(node, 512, 512, NB_REQ_FAST));
    close_sound(&image, node);
}

static void version_2_writes_zeroes_that_it_has_no_flag_for(void)
{
    struct image image = make(2, 0x77);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    CHECK_OK(nb_node_zero(node, CLUSTER, 0, NB_REQ_MAY_UNMAP));
    CHECK_INT(nb_node_zero(node, CLUSTER, CLUSTER, NB_REQ_FAST), -EOPNOTSUPP);
    CHECK_OK(nb_node_discard(node, CLUSTER, 2 * CLUSTER));
    check_reads(node, 0, CLUSTER, 0);
    check_reads(node, 0x77, CLUSTER, 2 * CLUSTER);
    close_sound(&image, node);
}

static void zeroed_space_is_kept_and_used_again(void)
{
    struct image image = make(3, 0);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    write_bytes(node, 0x11, CLUSTER, 0);
    uint64_t host = host_of(node, 0);
    CHECK_OK(nb_node_zero(node, CLUSTER, 0, 0));
    CHECK_INT(host_of(node, 0), host);
    write_bytes(node, 0x22, 512, 512);
    CHECK_INT(host_of(node, 0), host);
    check_reads(node, 0, 512, 0);
    check_reads(node, 0x22, 512, 512);
    close_sound(&image, node);
}

static void reads_and_writes_cross_the_disk_s_ragged_end(void)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 16, CLUSTER + 1536);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    write_bytes(node, 0x11, 1024, CLUSTER + 512);
    check_reads(node, 0, 512, CLUSTER);
    check_reads(node, 0x11, 1024, CLUSTER + 512);
    CHECK_OK(nb_node_zero(node, 1536, CLUSTER, NB_REQ_FAST));
    check_reads(node, 0, 1536, CLUSTER);
    CHECK_INT(nb_node_pwrite(node, "x", 1, CLUSTER + 1536, 0), -ENOSPC);
    close_sound(&image, node);
}

/* ---- damage ---- */

/* A cluster whose entry is damaged is not freed: what lies there may belong to another. */
static void a_damaged_entry_is_never_dropped(void)
{
    struct image image = make(3, 0);
    uint64_t l2 = image_add_l2(&image), entry = l2 | UINT64_C(1) << 63 | 512;
    put64(image.file, l2, entry);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    nb_node_set_id(node, 501);
    CHECK_INT(nb_node_discard(node, CLUSTER, 0), -EIO);
    struct nb_event event = wait_event(NB_EVENT_CORRUPT, 501);
    CHECK_INT(event.a, NB_FAULT_L2_ENTRY);
    CHECK_INT(event.c, entry);
    CHECK_INT(nb_node_zero(node, CLUSTER, 0, 0), -EIO);
    CHECK_INT(nb_node_pwrite(node, "x", 1, CLUSTER, 0), -EIO);
    CHECK_OK(nb_node_flush(node));
    nb_node_unref(node);
    CHECK_INT(get64(image.file, l2), entry);
    CHECK_INT(get64(image.file, 72), 2);      /* the corrupt bit */
    image_free(&image);
}

static void damage_stops_writes_and_goes_on_reading(void)
{
    struct image image = make(3, 0);
    uint64_t l2 = image_add_l2(&image), data = image_add_cluster(&image);
    put64(image.file, l2, data | UINT64_C(1) << 63);
    put64(image.file, l2 + 8, UINT64_C(1) << 63);
    memset(image.file->bytes + data, 0x11, CLUSTER);
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    nb_node_set_id(node, 502);
    uint8_t buf[512];
    CHECK_INT(nb_node_pread(node, buf, 512, CLUSTER), -EIO);
    wait_event(NB_EVENT_CORRUPT, 502);
    CHECK_INT(nb_node_pread(node, buf, 512, CLUSTER), -EIO);
    CHECK(!event_came(NB_EVENT_CORRUPT, 502));      /* told once */
    check_reads(node, 0x11, CLUSTER, 0);
    CHECK_INT(nb_node_pwrite(node, buf, 512, 0, 0), -EIO);
    CHECK_INT(nb_node_discard(node, CLUSTER, 0), -EIO);
    nb_node_unref(node);
    image_free(&image);
}

static void a_read_only_image_is_never_written(void)
{
    struct image image = make(3, 0);
    uint64_t l2 = image_add_l2(&image);
    put64(image.file, l2, UINT64_C(1) << 63);
    struct node *node = image_open(&image, NB_NODE_READ_ONLY);
    nb_node_set_id(node, 503);
    uint8_t buf[512];
    CHECK_INT(nb_node_pread(node, buf, 512, 0), -EIO);
    wait_event(NB_EVENT_CORRUPT, 503);
    CHECK_INT(nb_node_pwrite(node, buf, 512, 0, 0), -EROFS);
    CHECK_INT(nb_node_zero(node, 512, 0, 0), -EROFS);
    CHECK_INT(nb_node_discard(node, 512, 0), -EROFS);
    nb_node_unref(node);
    CHECK_INT(image.file->writes, 0);
    image_free(&image);
}

int main(void)
{
    RUN(an_overtaken_overwrite_stays_overtaken);
    RUN(a_stopped_reader_never_sees_who_reuses_its_cluster);
    RUN(a_late_overwrite_never_lands_in_a_reused_cluster);
    RUN(a_small_write_never_undoes_an_overlapping_large_one);
    RUN(partial_writes_keep_what_the_backing_file_shows);
    RUN(what_reuses_a_cluster_never_shows_its_old_bytes);
    RUN(zeroes_and_discards_hide_data_and_backing);
    RUN(zeroes_of_part_of_a_cluster_are_not_fast);
    RUN(version_2_writes_zeroes_that_it_has_no_flag_for);
    RUN(zeroed_space_is_kept_and_used_again);
    RUN(reads_and_writes_cross_the_disk_s_ragged_end);
    RUN(a_damaged_entry_is_never_dropped);
    RUN(damage_stops_writes_and_goes_on_reading);
    RUN(a_read_only_image_is_never_written);
    return 0;
}
