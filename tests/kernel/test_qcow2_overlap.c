/* The set of metadata clusters: exact through growth and removal, and readable meanwhile. */
#include "image_file.h"
#include "qcow2.h"

enum { CLUSTERS = 100000 };

static struct qcow2 *open_empty(struct image *image)
{
    *image = image_make(UINT64_C(1) << 28, 3, 16, 1 << 20);
    return qcow2_of(image_open(image, 0));
}

static void close_empty(struct image *image, struct qcow2 *q)
{
    nb_node_unref(&q->node);
    image_free(image);
}

static bool belongs(uint64_t cluster)
{
    return cluster * 2654435761u >> 7 & 1;
}

static void it_begins_with_what_the_image_has(void)
{
    struct image image;
    struct qcow2 *q = open_empty(&image);
    for (uint64_t c = 0; c < 100; c++)
        CHECK_INT(metadata_has(q, c), c < 4);
    close_empty(&image, q);
}

static void it_knows_exactly_what_was_added_and_removed(void)
{
    struct image image;
    struct qcow2 *q = open_empty(&image);
    for (uint64_t c = 4; c < CLUSTERS; c++)
        if (belongs(c))
            CHECK_OK(metadata_add(q, c << q->cluster_bits, 1));
    for (uint64_t c = 4; c < CLUSTERS; c++)
        CHECK_INT(metadata_has(q, c), belongs(c));
    for (uint64_t c = 4; c < CLUSTERS; c += 3)
        metadata_remove(q, c);
    for (uint64_t c = 4; c < CLUSTERS; c++)
        CHECK_INT(metadata_has(q, c), belongs(c) && c % 3 != 1);
    close_empty(&image, q);
}

static void *look(void *arg)
{
    struct qcow2 *q = arg;
    for (int round = 0; round < 50; round++)
        for (uint64_t c = 0; c < 1000; c++)
            CHECK(metadata_has(q, c) == (c < 4) || belongs(c));
    return NULL;
}

static void readers_never_miss_what_is_there_while_it_grows(void)
{
    struct image image;
    struct qcow2 *q = open_empty(&image);
    pthread_t threads[3];
    for (int i = 0; i < 3; i++)
        CHECK_OK(pthread_create(&threads[i], NULL, look, q));
    for (uint64_t c = 4; c < CLUSTERS; c++)
        if (belongs(c))
            CHECK_OK(metadata_add(q, c << q->cluster_bits, 1));
    for (int i = 0; i < 3; i++)
        CHECK_OK(pthread_join(threads[i], NULL));
    close_empty(&image, q);
}

int main(void)
{
    RUN(it_begins_with_what_the_image_has);
    RUN(it_knows_exactly_what_was_added_and_removed);
    RUN(readers_never_miss_what_is_there_while_it_grows);
    return 0;
}
