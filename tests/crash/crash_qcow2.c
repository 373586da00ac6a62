/* Crashes at any point, and errors at any point: what the image looks like afterwards.
 *
 * A workload of writes, zeroes, discards and flushes runs on an image whose file logs each write and flush.  A crash
 * at a point of the log leaves: every write before the last flush, and of later ones any sectors.  From such a file
 * must follow: no cluster in use with refcount 0 (leaks are allowed), what a guest's flush covered reads back, and any
 * other sector holds its old value or one that was being written, nothing foreign.
 *
 * Errors: the n-th request of the file fails, before or after it took effect.  Guest requests may then fail, and
 * their sectors hold either value; later ones work, and the image is never damaged, crash or not.
 */
#include <limits.h>

#include "image_file.h"

enum { MOST_OPS = 20000, MOST_FLUSHES = 4000, BACKING_ID = UINT32_MAX };

struct stamp {
    uint32_t id, unused;           /* id: number of the operation + 1; 0: zeroes */
    uint64_t sector;
};

struct operation {
    uint64_t first, count;         /* sectors */
    bool zero;
    atomic_size_t start, end;      /* positions in the log; end: SIZE_MAX while it runs or if it failed */
};

struct flush {
    size_t start, end;
};

struct config {
    uint32_t version, cluster_bits;
    uint64_t clusters;
    bool backed;
    unsigned threads, operations;  /* of each thread */
    unsigned longest;              /* sectors of a request */
    unsigned crashes;              /* points looked at */
};

struct run {
    const struct config *config;
    struct image image;
    uint64_t sectors, cluster_sectors;
    struct node *node;
    pthread_mutex_t lock;
    struct operation *operations;
    size_t operation_count;
    struct flush *flushes;
    size_t flush_count;
    uint64_t seed;
    /* errors */
    atomic_long requests_until_error;      /* counts down; fails when 0 is passed, `errors` times */
    long errors;
    enum file_op error_ops;
    int error;
    bool error_after;
};

static size_t log_position(struct run *run)
{
    struct image_file *file = run->image.file;
    pthread_mutex_lock(&file->log_lock);
    size_t position = file->log_count;
    pthread_mutex_unlock(&file->log_lock);
    return position;
}

static void fill_sectors(uint8_t *buf, uint32_t id, uint64_t first, uint64_t count)
{
    for (uint64_t s = 0; s < count; s++)
        for (size_t i = 0; i < SECTOR / sizeof(struct stamp); i++) {
            struct stamp stamp = { id, 0, first + s };
            memcpy(buf + s * SECTOR + i * sizeof stamp, &stamp, sizeof stamp);
        }
}

/* ---- the workload ---- */

static size_t begin(struct run *run, uint64_t first, uint64_t count, bool zero)
{
    pthread_mutex_lock(&run->lock);
    size_t number = run->operation_count++;
    CHECK(number < MOST_OPS);
    struct operation *op = &run->operations[number];
    op->first = first;
    op->count = count;
    op->zero = zero;
    atomic_store(&op->end, SIZE_MAX);
    atomic_store(&op->start, log_position(run));
    pthread_mutex_unlock(&run->lock);
    return number;
}

static int flush_once(struct run *run)
{
    struct flush flush = { .start = log_position(run) };
    int err = nb_node_flush(run->node);
    if (err)
        return err;
    flush.end = log_position(run);
    pthread_mutex_lock(&run->lock);
    CHECK(run->flush_count < MOST_FLUSHES);
    run->flushes[run->flush_count++] = flush;
    pthread_mutex_unlock(&run->lock);
    return 0;
}

static int operate(struct run *run, uint64_t *seed, uint64_t low, uint64_t high)
{
    uint32_t dice = random_next(seed) % 32;
    uint64_t count = random_next(seed) % (dice < 6 ? run->config->longest : 8) + 1;
    if (dice == 31)
        return flush_once(run);
    if (count > high - low)
        count = high - low;
    uint64_t first = low + random_next(seed) % (high - low - count + 1);
    if (dice >= 24 && high - low > 2 * run->cluster_sectors) {      /* whole clusters */
        first = (first + run->cluster_sectors - 1) / run->cluster_sectors * run->cluster_sectors;
        count = (count + run->cluster_sectors - 1) / run->cluster_sectors * run->cluster_sectors;
        if (first + count > high)
            return 0;
    }
    size_t number = begin(run, first, count, dice >= 18);
    int err;
    if (dice < 18) {
        uint8_t *buf = malloc(count * SECTOR);
        fill_sectors(buf, (uint32_t)number + 1, first, count);
        err = nb_node_pwrite(run->node, buf, count * SECTOR, first * SECTOR, 0);
        free(buf);
    } else if (dice < 28 || first % run->cluster_sectors || count % run->cluster_sectors)
        err = nb_node_zero(run->node, count * SECTOR, first * SECTOR, dice % 2 ? NB_REQ_MAY_UNMAP : 0);
    else
        err = nb_node_discard(run->node, count * SECTOR, first * SECTOR);
    if (!err)
        atomic_store(&run->operations[number].end, log_position(run));
    return err;
}

struct worker {
    struct run *run;
    unsigned number;
    unsigned failed;
};

static void *work(void *arg)
{
    struct worker *worker = arg;
    struct run *run = worker->run;
    uint64_t seed = run->seed * 1000 + worker->number, part = run->sectors / run->config->threads;
    for (unsigned i = 0; i < run->config->operations; i++)
        worker->failed += operate(run, &seed, part * worker->number, part * (worker->number + 1)) != 0;
    return NULL;
}

static unsigned run_workload(struct run *run)
{
    pthread_t threads[8];
    struct worker workers[8];
    unsigned failed = 0;
    for (unsigned i = 0; i < run->config->threads; i++) {
        workers[i] = (struct worker) { .run = run, .number = i };
        CHECK_OK(pthread_create(&threads[i], NULL, work, &workers[i]));
    }
    for (unsigned i = 0; i < run->config->threads; i++) {
        CHECK_OK(pthread_join(threads[i], NULL));
        failed += workers[i].failed;
    }
    return failed;
}

static int inject(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    struct run *run = file->hook_data;
    (void)offset, (void)count;
    if (after != run->error_after || !(op & run->error_ops))
        return 0;
    long left = atomic_fetch_sub(&run->requests_until_error, 1);
    return left <= 0 && left > -run->errors ? run->error : 0;
}

static void start(struct run *run, const struct config *config, uint64_t seed)
{
    uint64_t size = config->clusters << config->cluster_bits;
    *run = (struct run) { .config = config, .seed = seed, .sectors = size / SECTOR,
                          .cluster_sectors = (UINT64_C(1) << config->cluster_bits) / SECTOR };
    run->image = image_make(UINT64_C(1) << 30, config->version, config->cluster_bits, size);
    /* Small caches, so that eviction and relief take part. */
    run->image.layout.l2_cache_bytes = run->image.layout.refcount_cache_bytes = 1;
    pthread_mutex_init(&run->lock, NULL);
    run->operations = calloc(MOST_OPS, sizeof *run->operations);
    run->flushes = calloc(MOST_FLUSHES, sizeof *run->flushes);
    if (config->backed) {
        struct image_file *backing = image_file_new(size);
        backing->node.size = size;
        fill_sectors(backing->bytes, BACKING_ID, 0, run->sectors);
        run->image.backing = &backing->node;
    }
    /* Without punching holes freed clusters keep their bytes: what reuses them must not show these. */
    run->image.file->node.flags = config->backed ? NB_NODE_UNMAP : 0;
    run->image.file->logging = true;
    run->image.file->hook_data = run;
    run->node = image_open(&run->image, NB_NODE_UNMAP);
}

static void finish(struct run *run)
{
    image_free(&run->image);
    pthread_mutex_destroy(&run->lock);
    free(run->operations);
    free(run->flushes);
}

/* ---- what may be found ---- */

struct truth {
    long durable;                  /* last operation that a flush covered; -1: none, the first content */
    long zero;                     /* last operation begun before the crash that zeroes; -1: none */
};

static struct truth *truth_at(const struct run *run, size_t crash)
{
    struct truth *truth = malloc(run->sectors * sizeof *truth);
    size_t covered = 0;
    for (size_t i = 0; i < run->flush_count; i++)
        if (run->flushes[i].end <= crash && run->flushes[i].start > covered)
            covered = run->flushes[i].start;
    for (uint64_t s = 0; s < run->sectors; s++)
        truth[s] = (struct truth) { -1, -1 };
    for (size_t i = 0; i < run->operation_count; i++) {
        const struct operation *op = &run->operations[i];
        for (uint64_t s = op->first; s < op->first + op->count; s++) {
            if (atomic_load(&op->end) <= covered)
                truth[s].durable = (long)i;
            if (op->zero && atomic_load(&op->start) <= crash)
                truth[s].zero = (long)i;
        }
    }
    return truth;
}

static bool is_allowed(const struct run *run, const struct truth *truth, struct stamp found, uint64_t sector,
                       size_t crash)
{
    if (found.id == BACKING_ID)
        return run->config->backed && truth->durable < 0 && found.sector == sector;
    if (!found.id)
        return (truth->durable < 0 && !run->config->backed) || (truth->zero >= 0 && truth->zero >= truth->durable);
    if (found.id > run->operation_count || found.sector != sector)
        return false;
    const struct operation *op = &run->operations[found.id - 1];
    return !op->zero && sector - op->first < op->count && (long)found.id - 1 >= truth->durable
        && atomic_load(&op->start) <= crash;
}

static void check_content(const struct run *run, struct node *node, size_t crash)
{
    struct truth *truth = truth_at(run, crash);
    uint8_t *disk = malloc(run->sectors * SECTOR);
    CHECK_OK(nb_node_pread(node, disk, run->sectors * SECTOR, 0));
    for (uint64_t s = 0; s < run->sectors; s++) {
        struct stamp found;
        memcpy(&found, disk + s * SECTOR, sizeof found);
        for (size_t i = 1; i < SECTOR / sizeof found; i++)
            CHECK(!memcmp(disk + s * SECTOR, disk + s * SECTOR + i * sizeof found, sizeof found));
        if (!is_allowed(run, &truth[s], found, s, crash))
            check_failed(__FILE__, __LINE__, "seed %ju, crash at %zu: sector %ju holds %u (of sector %ju), durable was %ld",
                         (uintmax_t)run->seed, crash, (uintmax_t)s, found.id, (uintmax_t)found.sector,
                         truth[s].durable);
    }
    free(disk);
    free(truth);
}

/* ---- crashes ---- */

struct wreck {
    uint8_t *bytes;
    uint64_t end;
};

static void apply(struct wreck *wreck, const struct file_record *record, uint64_t *tear)
{
    for (uint64_t at = 0, part; at < record->count; at += part) {
        uint64_t room = SECTOR - (record->offset + at) % SECTOR;
        part = record->count - at < room ? record->count - at : room;
        if (tear && random_next(tear) % 2)
            continue;
        if (record->op == FILE_WRITE)
            memcpy(wreck->bytes + record->offset + at, record->bytes + at, part);
        else
            memset(wreck->bytes + record->offset + at, 0, part);
    }
    if (record->op == FILE_WRITE && wreck->end < record->offset + record->count)
        wreck->end = record->offset + record->count;
}

/* Check the wreck, let it be used again, check once more. */
static void check_wreck(struct run *run, const struct wreck *wreck, size_t crash, bool by_qemu)
{
    struct image_check found = image_check(wreck->bytes, wreck->end, &run->image.layout);
    if (found.corruptions)
        check_failed(__FILE__, __LINE__, "seed %ju, crash at %zu: %ju corruptions", (uintmax_t)run->seed, crash,
                     (uintmax_t)found.corruptions);
    if (by_qemu) {
        image_save(wreck->bytes, wreck->end, "wreck.qcow2");
        int status = qemu_img_check("wreck.qcow2");
        CHECK(status == 0 || status == 3);
    }
    struct image again = { .file = image_file_new(UINT64_C(1) << 30), .layout = run->image.layout };
    memcpy(again.file->bytes, wreck->bytes, wreck->end);
    again.file->end = wreck->end;
    again.backing = run->image.backing ? nb_node_ref(run->image.backing) : NULL;
    struct node *node = image_open(&again, NB_NODE_UNMAP);
    check_content(run, node, crash);
    uint8_t sector[SECTOR] = { 1 };
    for (uint64_t s = 0; s < run->sectors; s += run->sectors / 16 + 1)
        CHECK_OK(nb_node_pwrite(node, sector, SECTOR, s * SECTOR, 0));
    CHECK_OK(nb_node_flush(node));
    nb_node_unref(node);
    found = image_check(again.file->bytes, again.file->end, &again.layout);
    CHECK_INT(found.corruptions, 0);
    image_free(&again);
}

static void crash_everywhere(struct run *run)
{
    struct image_file *file = run->image.file;
    uint64_t seed = run->seed + 77, capacity = UINT64_C(1) << 30;
    struct image fresh = image_make(capacity, run->config->version, run->config->cluster_bits, run->sectors * SECTOR);
    struct wreck settled = { fresh.file->bytes, fresh.file->end };
    struct image_file *scratch = image_file_new(capacity);
    size_t step = file->log_count / run->config->crashes + 1, last_flush = 0;
    unsigned points = 0;
    for (size_t crash = 0; crash <= file->log_count; crash++) {
        bool after_flush = crash && file->log[crash - 1].op == FILE_FLUSH;
        if (after_flush) {
            for (size_t i = last_flush; i < crash - 1; i++)
                if (file->log[i].op != FILE_FLUSH)
                    apply(&settled, &file->log[i], NULL);
            last_flush = crash;
        }
        if (random_next(&seed) % step && crash != file->log_count)
            continue;
        struct wreck wreck = { scratch->bytes, settled.end };
        memcpy(wreck.bytes, settled.bytes, settled.end);
        for (size_t i = last_flush; i < crash; i++)
            apply(&wreck, &file->log[i], &seed);
        check_wreck(run, &wreck, crash, points++ % 16 == 0);
    }
    nb_node_unref(&scratch->node);
    image_free(&fresh);
}

static void close_cleanly(struct run *run, bool leaks_allowed)
{
    struct image_file *file = run->image.file;
    file->hook = NULL;
    CHECK_OK(flush_once(run));
    check_content(run, run->node, SIZE_MAX - 1);
    nb_node_unref(run->node);
    struct image_check found = image_check(file->bytes, file->end, &run->image.layout);
    CHECK_INT(found.corruptions, 0);
    if (!leaks_allowed)
        CHECK_INT(found.leaks, 0);
    image_save(file->bytes, file->end, "closed.qcow2");
    int status = qemu_img_check("closed.qcow2");
    CHECK(status == 0 || (leaks_allowed && status == 3));
}

static void crash_run(const struct config *config, uint64_t seeds)
{
    for (uint64_t seed = 1; seed <= (is_nightly() ? 40 * seeds : seeds); seed++) {
        struct run run;
        start(&run, config, seed);
        CHECK_INT(run_workload(&run), 0);
        close_cleanly(&run, false);
        crash_everywhere(&run);
        finish(&run);
    }
}

static void crashes_leave_sound_images_with_512_byte_clusters(void)
{
    crash_run(&(struct config) { 3, 9, 1024, false, 1, 600, 64, 60 }, 2);
    crash_run(&(struct config) { 3, 9, 1024, true, 3, 250, 64, 60 }, 2);
}

static void crashes_leave_sound_images_with_4_kib_clusters(void)
{
    crash_run(&(struct config) { 3, 12, 128, false, 2, 300, 64, 50 }, 1);
    crash_run(&(struct config) { 3, 12, 128, true, 3, 250, 64, 50 }, 2);
}

static void crashes_leave_sound_images_with_64_kib_clusters(void)
{
    crash_run(&(struct config) { 3, 16, 24, true, 3, 200, 200, 40 }, 1);
}

static void crashes_leave_sound_version_2_images(void)
{
    crash_run(&(struct config) { 2, 9, 1024, false, 2, 250, 64, 40 }, 1);
}

/* 512-byte clusters: the table that fits in one cluster counts 8 MiB. */
static void crashes_leave_sound_images_while_the_refcount_table_grows(void)
{
    crash_run(&(struct config) { 3, 9, 24000, false, 3, 500, 1000, 50 }, 1);
}

/* ---- errors ---- */

static long count_requests(const struct config *config, enum file_op ops)
{
    struct run run;
    start(&run, config, 1);
    run.error_ops = ops;
    atomic_store(&run.requests_until_error, LONG_MAX);
    run.image.file->hook = inject;
    run_workload(&run);
    long count = LONG_MAX - atomic_load(&run.requests_until_error);
    close_cleanly(&run, false);
    finish(&run);
    return count;
}

static void error_run(const struct config *config, enum file_op ops, int error, bool after, unsigned points)
{
    long requests = count_requests(config, ops);
    if (is_nightly())
        points *= 50;
    if (points > requests)
        points = (unsigned)requests;
    for (unsigned i = 0; i < points; i++) {
        struct run run;
        start(&run, config, 1);
        run.error_ops = ops;
        run.error = error;
        run.error_after = after;
        run.errors = i % 3 == 2 ? 20 : 1;
        atomic_store(&run.requests_until_error, requests * i / points);
        run.image.file->hook = inject;
        run_workload(&run);
        close_cleanly(&run, true);
        crash_everywhere(&run);
        finish(&run);
    }
}

static const struct config small = { 3, 9, 1024, true, 2, 150, 64, 6 }, growing = { 3, 9, 24000, false, 2, 450, 1000, 8 };

static void write_errors_damage_nothing(void)
{
    error_run(&small, FILE_WRITE, -ENOSPC, false, 40);
    error_run(&small, FILE_WRITE, -EIO, true, 40);
}

static void flush_errors_damage_nothing(void)
{
    error_run(&small, FILE_FLUSH, -EIO, false, 30);
    error_run(&small, FILE_FLUSH, -EIO, true, 30);
}

static void read_and_discard_errors_damage_nothing(void)
{
    error_run(&small, FILE_READ, -EIO, false, 30);
    error_run(&small, FILE_DISCARD, -EIO, false, 20);
}

static void errors_while_the_refcount_table_grows_damage_nothing(void)
{
    error_run(&growing, FILE_FLUSH, -EIO, false, 12);
    error_run(&growing, FILE_FLUSH, -EIO, true, 12);
    error_run(&growing, FILE_WRITE, -ENOSPC, false, 6);
}

int main(void)
{
    RUN(crashes_leave_sound_images_with_512_byte_clusters);
    RUN(crashes_leave_sound_images_with_4_kib_clusters);
    RUN(crashes_leave_sound_images_with_64_kib_clusters);
    RUN(crashes_leave_sound_version_2_images);
    RUN(crashes_leave_sound_images_while_the_refcount_table_grows);
    RUN(write_errors_damage_nothing);
    RUN(flush_errors_damage_nothing);
    RUN(read_and_discard_errors_damage_nothing);
    RUN(errors_while_the_refcount_table_grows_damage_nothing);
    return 0;
}
