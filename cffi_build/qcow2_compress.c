/* Reading compressed clusters: raw deflate (window of 4 KiB) or one zstd frame.
 *
 * The entry gives a byte offset and a number of 512-byte sectors, an upper bound of the compressed length; whatever
 * follows the stream inside it belongs to others.  Damaged data is the image's damage: reported, never guessed.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

enum { DEFLATE_WINDOW = -12 };      /* negative: raw, without zlib's header */

static int inflate_cluster(void *out, size_t out_size, const void *in, size_t in_size)
{
    z_stream stream = { .next_in = (Bytef *)(uintptr_t)in, .avail_in = (uInt)in_size, .next_out = out,
                        .avail_out = (uInt)out_size };
    if (inflateInit2(&stream, DEFLATE_WINDOW) != Z_OK)
        return -ENOMEM;
    int result = inflate(&stream, Z_FINISH);
    bool whole = (result == Z_STREAM_END || result == Z_BUF_ERROR) && stream.avail_out == 0;
    inflateEnd(&stream);
    return whole ? 0 : -EIO;
}

static int unpack_zstd(void *out, size_t out_size, const void *in, size_t in_size)
{
    ZSTD_DStream *stream = ZSTD_createDStream();
    ZSTD_outBuffer to = { out, out_size, 0 };
    ZSTD_inBuffer from = { in, in_size, 0 };
    if (!stream)
        return -ENOMEM;
    int err = 0;
    while (!err && to.pos < to.size) {
        size_t before = to.pos + from.pos;
        size_t result = ZSTD_decompressStream(stream, &to, &from);
        if (ZSTD_isError(result) || to.pos + from.pos == before)
            err = -EIO;
    }
    ZSTD_freeDStream(stream);
    return err;
}

int qcow2_read_compressed(struct qcow2 *q, uint64_t entry, uint64_t offset, void *cluster)
{
    uint64_t host = entry & ((UINT64_C(1) << q->compressed_shift) - 1);
    uint64_t sectors = ((entry & ~(FLAG_COMPRESSED | FLAG_COPIED)) >> q->compressed_shift) + 1;
    size_t length = sectors * 512 - (host & 511);
    /* The last stream of a file may end before its last sector does; what lies beyond reads as zeroes. */
    void *packed = malloc(length);
    int err = packed ? node_pread(q->node.file, packed, length, host) : -ENOMEM;
    if (!err) {
        err = q->layout.compression_type == 1 ? unpack_zstd(cluster, q->cluster_size, packed, length)
                                              : inflate_cluster(cluster, q->cluster_size, packed, length);
        if (err == -EIO)      /* not so when the file could not be read: that is no fault of the image */
            err = qcow2_damaged(q, NB_FAULT_COMPRESSED, offset, entry);
    }
    free(packed);
    return err;
}
