/* Copy before write as the copy engine sees it: what is still to copy, and the store.  Any thread; only
 * cbw_saved_read, cbw_saved_written and cbw_detach do I/O or system calls. */
#ifndef NB_INTERCEPT_H
#define NB_INTERCEPT_H

#include "node.h"

struct cbw;

/* Old data that a guest's request put into the store; taken out by cbw_take, it belongs to the taker until
 * cbw_saved_written or cbw_saved_keep. */
struct saved {
    struct saved *next;
    uint64_t offset, length;      /* bytes of the disk */
    enum { SAVED_MEMORY, SAVED_SCRATCH, SAVED_ZERO } place;
    uint64_t at;                  /* bytes into that place */
};

/* The filter behind a node, or NULL if the node is something else. */
struct cbw *cbw_of(struct node *node);
/* Granules whose old data is only in the source.  Granularity: the cluster size. */
struct bitmap *cbw_todo(struct cbw *cbw);
/* 0 while the point in time is kept; -ECANCELED once released, otherwise why it broke. */
int cbw_error(struct cbw *cbw);

/* After a read of the source: the first area in [offset, offset+count) that no guest's request had saved by now, so
 * that what was read of it is the old data.  1: *start, *length; 0: none; else cbw_error. */
int cbw_still_old(struct cbw *cbw, uint64_t offset, uint64_t count, uint64_t *start, uint64_t *length);
/* The clusters wholly in the range are in the target: guests need not save them. */
void cbw_copied(struct cbw *cbw, uint64_t offset, uint64_t count);

/* Oldest entry of the store, or NULL. */
struct saved *cbw_take(struct cbw *cbw);
/* The bytes [skip, skip+count) of an entry that is not SAVED_ZERO: *data points to them, in buf (which has room for
 * count) or in the store.  0 or -errno. */
int cbw_saved_read(struct cbw *cbw, const struct saved *saved, uint64_t skip, size_t count, void *buf,
                   const void **data);
/* The entry is in the target: its room is free again. */
void cbw_saved_written(struct cbw *cbw, struct saved *saved);
/* It is not: it goes back to the head of the store. */
void cbw_saved_keep(struct cbw *cbw, struct saved *saved);
/* Bytes of the disk that the store holds, entries that are taken included. */
uint64_t cbw_stored(struct cbw *cbw);
/* The store is filling up, or a guest waits for room. */
bool cbw_urgent(struct cbw *cbw);

/* A slice that drains the store begins and ends; between, NB_EVENT_CBW_STORED is not posted.  A store that is not empty
 * with no slice attached has been announced. */
void cbw_attach(struct cbw *cbw);
void cbw_detach(struct cbw *cbw);

#endif
