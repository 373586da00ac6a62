/* The range lock: who waits for whom, fairness, and exclusion under load. */
#include <stdatomic.h>
#include <time.h>

#include "check.h"
#include "rangelock.h"

static struct range_lock lock;

struct locker {
    uint64_t start, end;
    bool exclusive;
    atomic_bool held, leave;
    pthread_t thread;
};

static void *hold_until_told(void *arg)
{
    struct locker *locker = arg;
    struct range_hold hold;
    range_lock(&lock, &hold, locker->start, locker->end, locker->exclusive);
    atomic_store(&locker->held, true);
    while (!atomic_load(&locker->leave))
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
    range_unlock(&lock, &hold);
    return NULL;
}

static unsigned waiting(void)
{
    pthread_mutex_lock(&lock.lock);
    unsigned count = lock.waiting;
    pthread_mutex_unlock(&lock.lock);
    return count;
}

/* Start a locker and return once it holds or waits. */
static void begin(struct locker *locker)
{
    unsigned before = waiting();
    CHECK_INT(pthread_create(&locker->thread, NULL, hold_until_told, locker), 0);
    while (!atomic_load(&locker->held) && waiting() == before)
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
}

static void end(struct locker *locker)
{
    atomic_store(&locker->leave, true);
    CHECK_INT(pthread_join(locker->thread, NULL), 0);
}

static void check_pair(struct locker first, struct locker second, bool waits)
{
    begin(&first);
    begin(&second);
    CHECK_INT(atomic_load(&second.held), !waits);
    end(&first);
    end(&second);
    CHECK(!lock.first && !lock.last);
}

static void only_overlapping_holds_conflict_unless_both_are_shared(void)
{
    range_lock_init(&lock);
    check_pair((struct locker) { .start = 0, .end = 10, .exclusive = true },
               (struct locker) { .start = 9, .end = 20, .exclusive = true }, true);
    check_pair((struct locker) { .start = 0, .end = 10, .exclusive = true },
               (struct locker) { .start = 10, .end = 20, .exclusive = true }, false);
    check_pair((struct locker) { .start = 10, .end = 20, .exclusive = true },
               (struct locker) { .start = 0, .end = 10, .exclusive = true }, false);
    check_pair((struct locker) { .start = 0, .end = 10 }, (struct locker) { .start = 5, .end = 20 }, false);
    check_pair((struct locker) { .start = 0, .end = 10 }, (struct locker) { .start = 5, .end = 20, .exclusive = true },
               true);
    check_pair((struct locker) { .start = 0, .end = 10, .exclusive = true }, (struct locker) { .start = 5, .end = 20 },
               true);
    range_lock_destroy(&lock);
}

/* A reader that comes after a waiting writer waits behind it: writers do not starve. */
static void first_come_is_first_served(void)
{
    range_lock_init(&lock);
    struct locker reader = { .start = 0, .end = 10 }, writer = { .start = 0, .end = 10, .exclusive = true };
    struct locker late = { .start = 0, .end = 10 };
    begin(&reader);
    begin(&writer);
    begin(&late);
    CHECK(!atomic_load(&writer.held) && !atomic_load(&late.held));
    end(&reader);
    while (!atomic_load(&writer.held))
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
    CHECK(!atomic_load(&late.held));
    end(&writer);
    end(&late);
    range_lock_destroy(&lock);
}

enum { THREADS = 8, CELLS = 32, ROUNDS = 2000 };

static struct {
    unsigned exclusive, plain;     /* plain: unprotected but by the lock */
    atomic_uint readers;
} cells[CELLS];

static void *lock_at_random(void *arg)
{
    uint64_t seed = (uintptr_t)arg + 1;
    for (int i = 0; i < ROUNDS; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t start = (seed >> 33) % CELLS, end = start + 1 + (seed >> 40) % (CELLS - start);
        bool exclusive = seed >> 60 & 1;
        struct range_hold hold;
        range_lock(&lock, &hold, start, end, exclusive);
        for (uint64_t c = start; c < end; c++) {
            if (exclusive) {
                CHECK_INT(atomic_load(&cells[c].readers), 0);
                CHECK_INT(cells[c].exclusive++, 0);
                cells[c].plain++;
            } else {
                atomic_fetch_add(&cells[c].readers, 1);
            }
        }
        for (uint64_t c = start; c < end; c++) {
            if (exclusive)
                cells[c].exclusive--;
            else
                atomic_fetch_sub(&cells[c].readers, 1);
        }
        range_unlock(&lock, &hold);
    }
    return NULL;
}

static void exclusive_holds_exclude_under_load(void)
{
    pthread_t threads[THREADS];
    range_lock_init(&lock);
    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK_INT(pthread_create(&threads[i], NULL, lock_at_random, (void *)i), 0);
    for (int i = 0; i < THREADS; i++)
        CHECK_INT(pthread_join(threads[i], NULL), 0);
    CHECK(!lock.first && !lock.last && !lock.waiting);
    range_lock_destroy(&lock);
}

int main(void)
{
    RUN(only_overlapping_holds_conflict_unless_both_are_shared);
    RUN(first_come_is_first_served);
    RUN(exclusive_holds_exclude_under_load);
    return 0;
}
