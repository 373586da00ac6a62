/* Compressed clusters: good ones, damaged ones, and files that cannot be read. */
#include <zlib.h>
#include <zstd.h>

#include "events.h"
#include "image_file.h"

enum { CLUSTER = 65536, COMPRESSED_SHIFT = 62 - (16 - 8) };

static void make_content(uint8_t *cluster)
{
    for (size_t i = 0; i < CLUSTER; i++)
        cluster[i] = (uint8_t)(i / 97 * 31);
}

static size_t compress_deflate(uint8_t *out, const uint8_t *cluster)
{
    z_stream stream = { .next_in = (Bytef *)(uintptr_t)cluster, .avail_in = CLUSTER, .next_out = out,
                        .avail_out = CLUSTER };
    CHECK_INT(deflateInit2(&stream, 6, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
    CHECK_INT(deflate(&stream, Z_FINISH), Z_STREAM_END);
    deflateEnd(&stream);
    return CLUSTER - stream.avail_out;
}

/* An image whose first guest cluster is compressed, at an odd byte of a host cluster. */
static struct image make(uint32_t type, uint64_t *data, uint64_t *length)
{
    struct image image = image_make(UINT64_C(1) << 28, 3, 16, 8 * CLUSTER);
    uint8_t *cluster = malloc(CLUSTER), *packed = malloc(CLUSTER);
    image.layout.compression_type = type;
    uint64_t l2 = image_add_l2(&image);
    *data = image_add_cluster(&image) + 1234;
    make_content(cluster);
    *length = type ? ZSTD_compress(packed, CLUSTER, cluster, CLUSTER, 3) : compress_deflate(packed, cluster);
    memcpy(image.file->bytes + *data, packed, *length);
    uint64_t sectors = (*data % 512 + *length - 1) / 512;
    put64(image.file, l2, *data | sectors << COMPRESSED_SHIFT | UINT64_C(1) << 62);
    free(cluster);
    free(packed);
    return image;
}

static void both_kinds_are_read_and_overwritten(void)
{
    for (uint32_t type = 0; type < 2; type++) {
        uint64_t data, length;
        struct image image = make(type, &data, &length);
        uint8_t *expected = malloc(CLUSTER), *found = malloc(CLUSTER);
        struct node *node = image_open(&image, NB_NODE_UNMAP);
        make_content(expected);
        CHECK_OK(nb_node_pread(node, found, CLUSTER, 0));
        CHECK_BYTES(found, expected, CLUSTER);
        CHECK_OK(nb_node_pread(node, found, 700, 4000));
        CHECK_BYTES(found, expected + 4000, 700);
        memset(expected + 512, 0x33, 512);
        CHECK_OK(nb_node_pwrite(node, expected + 512, 512, 512, 0));
        CHECK_OK(nb_node_pread(node, found, CLUSTER, 0));
        CHECK_BYTES(found, expected, CLUSTER);
        nb_node_unref(node);
        struct image_check sound = image_check(image.file->bytes, image.file->end, &image.layout);
        CHECK_INT(sound.corruptions, 0);
        CHECK_INT(sound.leaks, 0);
        free(expected);
        free(found);
        image_free(&image);
    }
}

static void damaged_data_is_reported_and_nothing_guessed(void)
{
    for (uint32_t type = 0; type < 2; type++) {
        uint64_t data, length;
        struct image image = make(type, &data, &length);
        uint8_t *found = malloc(CLUSTER);
        memset(found, 0xee, CLUSTER);
        memset(image.file->bytes + data + length / 2, 0xff, length - length / 2);
        memset(image.file->bytes + data, 0xff, 2);
        struct node *node = image_open(&image, NB_NODE_UNMAP);
        nb_node_set_id(node, 4000 + type);
        CHECK_INT(nb_node_pread(node, found, CLUSTER, 0), -EIO);
        CHECK_FILLED(found, 0xee, CLUSTER);
        CHECK_INT(wait_event(NB_EVENT_CORRUPT, 4000 + type).a, NB_FAULT_COMPRESSED);
        nb_node_unref(node);
        free(found);
        image_free(&image);
    }
}

static void a_stream_cut_short_is_damage(void)
{
    for (uint32_t type = 0; type < 2; type++) {
        uint64_t data, length;
        struct image image = make(type, &data, &length);
        uint8_t *found = malloc(CLUSTER);
        put64(image.file, image.file->node.size - 2 * CLUSTER, data | UINT64_C(1) << 62);      /* one sector */
        struct node *node = image_open(&image, NB_NODE_READ_ONLY);
        nb_node_set_id(node, 4100 + type);
        CHECK_INT(nb_node_pread(node, found, CLUSTER, 0), -EIO);
        CHECK_INT(wait_event(NB_EVENT_CORRUPT, 4100 + type).a, NB_FAULT_COMPRESSED);
        nb_node_unref(node);
        free(found);
        image_free(&image);
    }
}

static uint64_t data_start;

static int fail_data_reads(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    (void)file, (void)count;
    return op == FILE_READ && !after && offset == data_start ? -EIO : 0;
}

/* A disk that fails for a moment must not make the image unusable for ever. */
static void an_unreadable_file_is_no_damage(void)
{
    uint64_t data, length;
    struct image image = make(0, &data, &length);
    uint8_t *found = malloc(CLUSTER);
    data_start = data;
    image.file->hook = fail_data_reads;
    struct node *node = image_open(&image, NB_NODE_UNMAP);
    nb_node_set_id(node, 4200);
    CHECK_INT(nb_node_pread(node, found, CLUSTER, 0), -EIO);
    CHECK(!event_came(NB_EVENT_CORRUPT, 4200));
    image.file->hook = NULL;
    CHECK_OK(nb_node_pread(node, found, CLUSTER, 0));
    CHECK_OK(nb_node_pwrite(node, found, CLUSTER, 0, 0));
    nb_node_unref(node);
    CHECK_INT(get64(image.file, 72), 0);
    free(found);
    image_free(&image);
}

int main(void)
{
    RUN(both_kinds_are_read_and_overwritten);
    RUN(damaged_data_is_reported_and_nothing_guessed);
    RUN(a_stream_cut_short_is_damage);
    RUN(an_unreadable_file_is_no_damage);
    return 0;
}
