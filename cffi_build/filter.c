/* nbdkit's filter: guest requests go from nbdkit's threads straight into the kernel.
 *
 * The same shared object is the Python module nbd_backend._kernel; nbdkit loads it once more under the same inode, so
 * both see the same exports.  open asks the Python plugin first (does the export exist, may this client have it) and
 * then looks the export up here; sizes and data never go back to Python.
 *
 * Errors: a callback returns -1 and sets *err to the positive errno.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"
#include "nbdkit_guard.h"
#include "nbdkit_import.h"

enum { EXTENTS_AT_ONCE = 256 };

static bool loaded;      /* owner: nbdkit's main thread, before any other runs */

const char *nb_nbdkit_version(void)
{
    return NBDKIT_VERSION_STRING;
}

bool nb_filter_loaded(void)
{
    return loaded;
}

static void backend_load(void)
{
    loaded = true;
    nbdkit_guard_install();
}

static void *backend_open(nbdkit_next_open *next, nbdkit_context *context, int readonly, const char *name, int is_tls)
{
    (void)is_tls;
    if (next(context, readonly, name) == -1)
        return NULL;
    struct export *exp = nb_export_find(name);
    if (!exp) {
        nbdkit_error("export \"%s\" is gone", name);
        return NULL;
    }
    nb_export_client(exp, 1);
    return exp;
}

static void backend_close(void *handle)
{
    struct export *exp = handle;
    nb_export_client(exp, -1);
    nb_export_unref(exp);
}

/* Turn 0 or -errno into nbdkit's convention. */
static int reply(int result, int *err)
{
    if (result >= 0)
        return 0;
    *err = -result;
    return -1;
}

static uint32_t request_flags(uint32_t flags)
{
    return (flags & NBDKIT_FLAG_FUA ? NB_REQ_FUA : 0) | (flags & NBDKIT_FLAG_MAY_TRIM ? NB_REQ_MAY_UNMAP : 0)
         | (flags & NBDKIT_FLAG_FAST_ZERO ? NB_REQ_FAST : 0);
}

static int64_t backend_get_size(nbdkit_next *next, void *handle)
{
    (void)next;
    return (int64_t)nb_export_size(handle);
}

static int backend_can_write(nbdkit_next *next, void *handle)
{
    (void)next;
    return nb_export_writable(handle);
}

static int yes(nbdkit_next *next, void *handle)
{
    (void)next;
    (void)handle;
    return 1;
}

static int no(nbdkit_next *next, void *handle)
{
    (void)next;
    (void)handle;
    return 0;
}

static int native_fua(nbdkit_next *next, void *handle)
{
    (void)next;
    (void)handle;
    return NBDKIT_FUA_NATIVE;
}

static int native_cache(nbdkit_next *next, void *handle)
{
    (void)next;
    (void)handle;
    return NBDKIT_CACHE_NATIVE;
}

static int native_zero(nbdkit_next *next, void *handle)
{
    (void)next;
    (void)handle;
    return NBDKIT_ZERO_NATIVE;
}

static int backend_pread(nbdkit_next *next, void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags,
                         int *err)
{
    (void)next;
    (void)flags;
    return reply(nb_export_pread(handle, buf, count, offset), err);
}

static int backend_pwrite(nbdkit_next *next, void *handle, const void *buf, uint32_t count, uint64_t offset,
                          uint32_t flags, int *err)
{
    (void)next;
    return reply(nb_export_pwrite(handle, buf, count, offset, request_flags(flags)), err);
}

static int backend_flush(nbdkit_next *next, void *handle, uint32_t flags, int *err)
{
    (void)next;
    (void)flags;
    return reply(nb_export_flush(handle), err);
}

static int backend_trim(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    (void)next;
    return reply(nb_export_trim(handle, count, offset, request_flags(flags)), err);
}

static int backend_zero(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    (void)next;
    return reply(nb_export_zero(handle, count, offset, request_flags(flags)), err);
}

static int backend_cache(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    (void)next;
    (void)flags;
    return reply(nb_export_cache(handle, count, offset), err);
}

static uint32_t extent_type(uint32_t flags)
{
    return (flags & NB_EXTENT_HOLE ? NBDKIT_EXTENT_HOLE : 0) | (flags & NB_EXTENT_ZERO ? NBDKIT_EXTENT_ZERO : 0);
}

static int backend_extents(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                           struct nbdkit_extents *extents, int *err)
{
    struct nb_extent *found = malloc(EXTENTS_AT_ONCE * sizeof *found);
    int used = found ? nb_export_extents(handle, count, offset, found,
                                         flags & NBDKIT_FLAG_REQ_ONE ? 1 : EXTENTS_AT_ONCE) : -ENOMEM;
    int result = reply(used, err);
    (void)next;
    for (int i = 0; i < used && !result; i++) {
        result = nbdkit_add_extent(extents, found[i].offset, found[i].length, extent_type(found[i].flags));
        if (result == -1)
            *err = errno;
    }
    free(found);
    return result;
}

static struct nbdkit_filter filter = {
    .name = "nbd-backend",
    .longname = "nbd-backend's data path",
    .load = backend_load,
    .open = backend_open,
    .close = backend_close,
    .get_size = backend_get_size,
    .can_write = backend_can_write,
    .can_flush = yes,
    .is_rotational = no,
    .can_trim = yes,
    .can_zero = native_zero,
    .can_fast_zero = yes,
    .can_extents = yes,
    .can_fua = native_fua,
    .can_multi_conn = yes,
    .can_cache = native_cache,
    .pread = backend_pread,
    .pwrite = backend_pwrite,
    .flush = backend_flush,
    .trim = backend_trim,
    .zero = backend_zero,
    .extents = backend_extents,
    .cache = backend_cache,
};

NBDKIT_REGISTER_FILTER(filter)
