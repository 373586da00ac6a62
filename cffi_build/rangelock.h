/* The one overlap primitive: shared and exclusive holds on ranges of bytes, first come first served.
 *
 * A hold waits for every earlier hold, held or still waiting, that overlaps it, unless both are shared; so neither
 * readers nor writers starve.  A thread must not take two overlapping holds.  Holds live on the caller's stack.
 */
#ifndef NB_RANGELOCK_H
#define NB_RANGELOCK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct range_hold {
    uint64_t start, end;           /* [start, end) */
    bool exclusive;
    struct range_hold *previous, *next;
};

struct range_lock {
    pthread_mutex_t lock;
    pthread_cond_t released;
    struct range_hold *first, *last;   /* in order of arrival */
    unsigned waiting;
};

void range_lock_init(struct range_lock *lock);
void range_lock_destroy(struct range_lock *lock);
/* Wait for [start, end) and hold it until range_unlock with the same hold. */
void range_lock(struct range_lock *lock, struct range_hold *hold, uint64_t start, uint64_t end, bool exclusive);
void range_unlock(struct range_lock *lock, struct range_hold *hold);

#endif
