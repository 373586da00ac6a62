/* Concurrent writes, zeroes, trims and reads on shared clusters, through an export, against a model.
 *
 * OWNERS threads own interleaved sectors: thread t those with number % OWNERS == t.  In the quiet half of the clusters
 * only owners work: what an owner's acknowledged request left must be there, exactly.  The stormy half one more
 * thread zeroes, trims and overwrites by whole clusters: an owner's sector then holds what it wrote last or what the
 * storm left; and once the owner has seen it overwritten it must never come back.
 * Others flush (so that freed clusters are reused) and drain.  The file below delays requests to widen every window.
 */
#include "events.h"
#include "image_file.h"

#ifdef __SANITIZE_THREAD__
enum { ROUNDS = 250 };      /* each takes ten times as long */
#else
enum { ROUNDS = 1200 };
#endif

enum { OWNERS = 8, BACKING_ID = 100, STORM_ID = 200, MOST_SECTORS = 16384 };

struct stamp {
    uint32_t id, sequence;
    uint64_t sector;
};

struct race {
    struct image image;
    struct node *root;
    struct export *exp;
    uint64_t sectors, cluster_sectors;
    bool backed;
    atomic_bool stop;
    uint32_t rounds;
    struct stamp expected[MOST_SECTORS];    /* each written by its owner only; id 0: zeroes */
};

struct worker {
    struct race *race;
    unsigned number;
    uint64_t seed;
};

static int random_delay(struct image_file *file, enum file_op op, bool after, uint64_t offset, uint64_t count)
{
    static _Thread_local uint64_t seed;
    (void)file, (void)op, (void)after, (void)count;
    if (!seed)
        seed = (uintptr_t)&seed ^ offset;
    uint32_t dice = random_next(&seed);
    if (dice % 16 == 0)
        pause_ns(dice % 200000);
    else if (dice % 4 == 0)
        sched_yield();
    return 0;
}

static void fill_sectors(uint8_t *buf, uint32_t id, uint32_t sequence, uint64_t first, uint64_t count)
{
    for (uint64_t s = 0; s < count; s++)
        for (size_t i = 0; i < SECTOR / sizeof(struct stamp); i++) {
            struct stamp stamp = { id, sequence, first + s };
            memcpy(buf + s * SECTOR + i * sizeof stamp, &stamp, sizeof stamp);
        }
}

/* The sector's stamp; the sector must be of one piece. */
static struct stamp stamp_of(const uint8_t *buf, uint64_t sector)
{
    struct stamp stamp;
    memcpy(&stamp, buf, sizeof stamp);
    for (size_t i = 1; i < SECTOR / sizeof stamp; i++)
        CHECK(!memcmp(buf, buf + i * sizeof stamp, sizeof stamp));
    if (stamp.id)
        CHECK_INT(stamp.sector, sector);
    else
        CHECK_INT(stamp.sequence | stamp.sector, 0);
    return stamp;
}

static bool is_stormy(const struct race *race, uint64_t sector)
{
    return sector / race->cluster_sectors % 2;
}

/* A sector that somebody else owns may hold anything that was ever written there, nothing foreign. */
static void check_foreign(const struct race *race, struct stamp stamp, uint64_t sector)
{
    bool storm = stamp.id == STORM_ID && is_stormy(race, sector);
    bool backing = stamp.id == BACKING_ID && race->backed;
    CHECK(!stamp.id || storm || backing || stamp.id == sector % OWNERS + 1);
}

static void check_own(struct race *race, struct stamp found, uint64_t sector)
{
    struct stamp *expected = &race->expected[sector];
    if (!memcmp(&found, expected, sizeof found))
        return;
    if (!is_stormy(race, sector) || (found.id && found.id != STORM_ID))
        check_failed(__FILE__, __LINE__, "sector %ju holds %u.%u, its owner left %u.%u", (uintmax_t)sector, found.id,
                     found.sequence, expected->id, expected->sequence);
    *expected = found;      /* the storm came later; what it overwrote must stay so */
}

static void read_and_check(struct worker *worker, uint64_t first, uint64_t count)
{
    struct race *race = worker->race;
    uint8_t *buf = malloc(count * SECTOR);
    CHECK_OK(nb_export_pread(race->exp, buf, (uint32_t)(count * SECTOR), first * SECTOR));
    for (uint64_t s = 0; s < count; s++) {
        struct stamp found = stamp_of(buf + s * SECTOR, first + s);
        if ((first + s) % OWNERS == worker->number)
            check_own(race, found, first + s);
        else
            check_foreign(race, found, first + s);
    }
    free(buf);
}

static void own_one(struct worker *worker, uint32_t sequence)
{
    struct race *race = worker->race;
    uint64_t sector = random_next(&worker->seed) % (race->sectors / OWNERS) * OWNERS + worker->number;
    struct stamp *expected = &race->expected[sector];
    uint32_t dice = random_next(&worker->seed) % 16, fua = dice == 15 ? NB_REQ_FUA : 0;
    uint8_t buf[SECTOR];
    if (dice < 9 || dice == 15) {
        fill_sectors(buf, worker->number + 1, sequence, sector, 1);
        CHECK_OK(nb_export_pwrite(race->exp, buf, SECTOR, sector * SECTOR, fua));
        *expected = (struct stamp) { worker->number + 1, sequence, sector };
    } else if (dice < 13) {
        CHECK_OK(nb_export_zero(race->exp, SECTOR, sector * SECTOR, dice % 2 ? NB_REQ_MAY_UNMAP : 0));
        *expected = (struct stamp) { 0 };
    } else {
        CHECK_OK(nb_export_trim(race->exp, SECTOR, sector * SECTOR, 0));
        if (race->cluster_sectors == 1)
            *expected = (struct stamp) { 0 };
    }
    read_and_check(worker, sector, 1);
    if (dice % 4 == 0) {
        uint64_t count = random_next(&worker->seed) % 40 + 1;
        read_and_check(worker, sector, count < race->sectors - sector ? count : race->sectors - sector);
    } else {
        read_and_check(worker, sector, 1);
    }
}

static void *own(void *arg)
{
    struct worker *worker = arg;
    for (uint32_t i = 1; i <= worker->race->rounds; i++)
        own_one(worker, i);
    return NULL;
}

static void *storm(void *arg)
{
    struct worker *worker = arg;
    struct race *race = worker->race;
    uint64_t clusters = race->sectors / race->cluster_sectors, bytes = race->cluster_sectors * SECTOR;
    uint8_t *buf = malloc(bytes);
    for (uint32_t i = 1; !atomic_load(&race->stop); i++) {
        uint64_t cluster = random_next(&worker->seed) % (clusters / 2) * 2 + 1;
        uint32_t dice = random_next(&worker->seed) % 4;
        if (dice == 0)
            CHECK_OK(nb_export_trim(race->exp, (uint32_t)bytes, cluster * bytes, 0));
        else if (dice == 1)
            CHECK_OK(nb_export_zero(race->exp, (uint32_t)bytes, cluster * bytes, NB_REQ_MAY_UNMAP));
        else if (dice == 2)
            CHECK_OK(nb_export_zero(race->exp, (uint32_t)bytes, cluster * bytes, 0));
        else {
            fill_sectors(buf, STORM_ID, i, cluster * race->cluster_sectors, race->cluster_sectors);
            CHECK_OK(nb_export_pwrite(race->exp, buf, (uint32_t)bytes, cluster * bytes, 0));
        }
    }
    free(buf);
    return NULL;
}

static void *flush_often(void *arg)
{
    struct worker *worker = arg;
    while (!atomic_load(&worker->race->stop)) {
        CHECK_OK(nb_export_flush(worker->race->exp));
        pause_ns(random_next(&worker->seed) % 500000);
    }
    return NULL;
}

static unsigned requests_so_far(struct image_file *file)
{
    return atomic_load(&file->reads) + atomic_load(&file->writes) + atomic_load(&file->flushes)
        + atomic_load(&file->discards);
}

/* Drain, look that nothing moves any more, set a root, reopen. */
static void *drain_often(void *arg)
{
    struct worker *worker = arg;
    struct race *race = worker->race;
    for (uint64_t token = 1; !atomic_load(&race->stop); token++) {
        pause_ns(3000000);
        nb_export_close_gate(race->exp, token);
        wait_event(NB_EVENT_DRAINED, token);
        unsigned before = requests_so_far(race->image.file);
        pause_ns(300000);
        CHECK_INT(requests_so_far(race->image.file), before);
        CHECK_OK(nb_export_set_root(race->exp, race->root));
        nb_export_open_gate(race->exp);
    }
    return NULL;
}

static void fill_backing(struct race *race)
{
    struct image_file *backing = image_file_new(race->sectors * SECTOR);
    race->image.backing = &backing->node;
    backing->node.size = race->sectors * SECTOR;
    for (uint64_t s = 0; s < race->sectors; s++) {
        fill_sectors(backing->bytes + s * SECTOR, BACKING_ID, 0, s, 1);
        race->expected[s] = (struct stamp) { BACKING_ID, 0, s };
    }
}

static void run_workers(struct race *race)
{
    void *(*others[])(void *) = { storm, storm, flush_often, drain_often };
    enum { OTHERS = sizeof others / sizeof *others };
    pthread_t threads[OWNERS + OTHERS];
    struct worker workers[OWNERS + OTHERS];
    for (unsigned i = 0; i < OWNERS + OTHERS; i++) {
        workers[i] = (struct worker) { .race = race, .number = i, .seed = i + 1 };
        CHECK_OK(pthread_create(&threads[i], NULL, i < OWNERS ? own : others[i - OWNERS], &workers[i]));
    }
    for (unsigned i = 0; i < OWNERS + OTHERS; i++) {
        CHECK_OK(pthread_join(threads[i], NULL));
        if (i == OWNERS - 1)
            atomic_store(&race->stop, true);
    }
    for (unsigned i = 0; i < OWNERS; i++)
        read_and_check(&workers[i], 0, race->sectors);
}

static void close_and_check(struct race *race)
{
    struct image_file *file = race->image.file;
    file->hook = NULL;
    nb_export_unregister(race->exp);
    nb_export_unref(race->exp);
    nb_node_unref(race->root);
    struct image_check found = image_check(file->bytes, file->end, &race->image.layout);
    CHECK_INT(found.corruptions, 0);
    CHECK_INT(found.leaks, 0);

    race->root = image_open(&race->image, NB_NODE_READ_ONLY);
    CHECK_OK(nb_export_new("race", race->root, false, &race->exp));
    struct worker worker = { .race = race };
    for (worker.number = 0; worker.number < OWNERS; worker.number++)
        read_and_check(&worker, 0, race->sectors);
    nb_export_unregister(race->exp);
    nb_export_unref(race->exp);
    nb_node_unref(race->root);
}

static void race_on(uint32_t cluster_bits, uint64_t clusters, bool backed)
{
    struct race *race = calloc(1, sizeof *race);
    race->cluster_sectors = (UINT64_C(1) << cluster_bits) / SECTOR;
    race->sectors = clusters * race->cluster_sectors;
    race->backed = backed;
    race->rounds = is_nightly() ? 20000 : ROUNDS;
    CHECK(race->sectors <= MOST_SECTORS);
    race->image = image_make(UINT64_C(4) << 30, 3, cluster_bits, race->sectors * SECTOR);
    /* Without punching holes freed clusters keep their bytes: what reuses them must not show these. */
    race->image.file->node.flags = backed ? NB_NODE_UNMAP : 0;
    if (backed)
        fill_backing(race);
    race->root = image_open(&race->image, NB_NODE_UNMAP);
    race->image.file->hook = random_delay;
    CHECK_OK(nb_export_new("race", race->root, true, &race->exp));
    run_workers(race);
    close_and_check(race);
    image_free(&race->image);
    free(race);
}

static void owners_sectors_survive_in_clusters_of_512_bytes(void)
{
    race_on(9, 256, false);
    race_on(9, 256, true);
}

static void owners_sectors_survive_in_clusters_of_4_kib(void)
{
    race_on(12, 16, false);
    race_on(12, 16, true);
}

static void owners_sectors_survive_in_clusters_of_64_kib(void)
{
    race_on(16, 6, false);
    race_on(16, 6, true);
}

static void owners_sectors_survive_in_clusters_of_2_mib(void)
{
    race_on(21, 4, false);
    race_on(21, 4, true);
}

int main(void)
{
    RUN(owners_sectors_survive_in_clusters_of_512_bytes);
    RUN(owners_sectors_survive_in_clusters_of_4_kib);
    RUN(owners_sectors_survive_in_clusters_of_64_kib);
    RUN(owners_sectors_survive_in_clusters_of_2_mib);
    return 0;
}
