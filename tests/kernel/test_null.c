/* The null driver. */
#include <time.h>

#include "check.h"
#include "node.h"

#define SIZE (UINT64_C(1) << 40)

static struct node *open_null(uint64_t latency_ns, bool read_zeroes)
{
    struct node *node;

    CHECK_OK(nb_null_open(SIZE, latency_ns, read_zeroes, NB_NODE_UNMAP, &node));
    return node;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void reads_zeroes_and_forgets_writes(void)
{
    struct node *node = open_null(0, true);
    char buf[4096];

    memset(buf, 0x5a, sizeof buf);
    CHECK_OK(nb_node_pwrite(node, buf, sizeof buf, SIZE - sizeof buf, NB_REQ_FUA));
    CHECK_OK(nb_node_pread(node, buf, sizeof buf, SIZE - sizeof buf));
    CHECK_FILLED(buf, 0, sizeof buf);
    nb_node_unref(node);
}

static void leaves_the_buffer_alone_without_read_zeroes(void)
{
    struct node *node = open_null(0, false);
    char buf[512];

    memset(buf, 0x5a, sizeof buf);
    CHECK_OK(nb_node_pread(node, buf, sizeof buf, 0));
    CHECK_FILLED(buf, 0x5a, sizeof buf);
    nb_node_unref(node);
}

static void block_status_is_a_hole_only_with_read_zeroes(void)
{
    struct node *zeroes = open_null(0, true), *unknown = open_null(0, false);
    struct nb_extent extent;

    CHECK_INT(nb_node_block_status(zeroes, NULL, 4096, SIZE - 4096, &extent, 1), 1);
    CHECK_INT(extent.length, SIZE - 4096);
    CHECK_INT(extent.flags, NB_EXTENT_ZERO | NB_EXTENT_HOLE);
    CHECK_INT(nb_node_block_status(unknown, NULL, 0, SIZE, &extent, 1), 1);
    CHECK_INT(extent.flags, NB_EXTENT_DATA);
    nb_node_unref(zeroes);
    nb_node_unref(unknown);
}

static void every_request_takes_the_latency(void)
{
    const uint64_t latency = 20000000;
    struct node *node = open_null(latency, true);
    char byte = 0;
    uint64_t begin = now_ns();

    CHECK_OK(nb_node_pread(node, &byte, 1, 0));
    CHECK_OK(nb_node_pwrite(node, &byte, 1, 0, 0));
    CHECK_OK(nb_node_zero(node, SIZE, 0, 0));
    CHECK_OK(nb_node_discard(node, SIZE, 0));
    CHECK_OK(nb_node_flush(node));
    CHECK(now_ns() - begin >= 5 * latency);
    nb_node_unref(node);
}

static void takes_no_space(void)
{
    struct node *node = open_null(0, true);

    CHECK_INT(nb_node_size(node), SIZE);
    CHECK_INT(nb_node_allocated(node), 0);
    CHECK(strcmp(nb_node_driver(node), "null-co") == 0);
    nb_node_unref(node);
}

int main(void)
{
    RUN(reads_zeroes_and_forgets_writes);
    RUN(leaves_the_buffer_alone_without_read_zeroes);
    RUN(block_status_is_a_hole_only_with_read_zeroes);
    RUN(every_request_takes_the_latency);
    RUN(takes_no_space);
    return EXIT_SUCCESS;
}
