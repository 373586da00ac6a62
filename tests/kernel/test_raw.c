/* The raw format: a window on its child, and nothing outside of it. */
#include "image_file.h"

static struct image_file *make_child(void)
{
    struct image_file *child = image_file_new(65536);
    child->node.size = 65536;
    return child;
}

static void a_window_that_does_not_fit_is_refused(void)
{
    struct image_file *child = make_child();
    struct node *raw;
    CHECK_INT(nb_raw_open(&child->node, 65537, 0, 0, &raw), -ERANGE);
    CHECK_INT(nb_raw_open(&child->node, 512, 65536, 0, &raw), -ERANGE);
    CHECK_INT(nb_raw_open(&child->node, 512, UINT64_MAX, 0, &raw), -ERANGE);
    nb_node_unref(&child->node);
}

static void requests_land_inside_the_window(void)
{
    struct image_file *child = make_child();
    struct node *raw;
    struct mapping mapping;
    uint8_t buf[1024];
    memset(child->bytes, 0x77, 65536);
    CHECK_OK(nb_raw_open(&child->node, 4096, 8192, NB_NODE_UNMAP, &raw));
    CHECK_INT(nb_node_size(raw), 8192);
    memset(buf, 0x11, sizeof buf);
    CHECK_OK(nb_node_pwrite(raw, buf, 1024, 7168, 0));
    CHECK_INT(nb_node_pwrite(raw, buf, 1024, 7169, 0), -ENOSPC);
    CHECK_INT(nb_node_pread(raw, buf, 1024, 7169), -EINVAL);
    CHECK_FILLED(child->bytes + 4096 + 7168, 0x11, 1024);
    CHECK_FILLED(child->bytes + 12288, 0x77, 4096);
    CHECK_OK(nb_node_zero(raw, 512, 0, 0));
    CHECK_FILLED(child->bytes + 4096, 0, 512);
    CHECK_OK(nb_node_discard(raw, 512, 512));
    CHECK_FILLED(child->bytes + 4608, 0, 512);
    CHECK_FILLED(child->bytes, 0x77, 4096);
    CHECK_OK(raw->ops->map(raw, 0, 512, &mapping));
    CHECK_INT(mapping.kind, MAP_DATA);
    CHECK_OK(nb_node_flush(raw));
    CHECK_INT(child->flushes, 1);
    nb_node_unref(raw);
    nb_node_unref(&child->node);
}

static void size_0_reaches_to_the_child_s_end(void)
{
    struct image_file *child = make_child();
    struct node *raw;
    CHECK_OK(nb_raw_open(&child->node, 4096, 0, 0, &raw));
    CHECK_INT(nb_node_size(raw), 61440);
    nb_node_unref(raw);
    nb_node_unref(&child->node);
}

int main(void)
{
    RUN(a_window_that_does_not_fit_is_refused);
    RUN(requests_land_inside_the_window);
    RUN(size_0_reaches_to_the_child_s_end);
    return 0;
}
