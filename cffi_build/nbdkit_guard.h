/* See nbdkit_guard.c. */
#ifndef NB_NBDKIT_GUARD_H
#define NB_NBDKIT_GUARD_H

/* Once, from the filter's load callback. */
void nbdkit_guard_install(void);

#endif
