/* Fault injection: a filter that delays and fails requests to its child as its rules say.
 *
 * Each request walks the rules in the order they were added, in one critical section, so that `skip` and `count` are
 * exact whatever the number of threads.  A rule that matches spends one of its `skip`, or else acts and spends one of
 * its `count`.  Delays of all rules that act add up; the first rule with an error ends the walk, and rules after it
 * have not seen the request.  The waiting is done outside the lock; a request that fails never reaches the child.
 *
 * A flush has no range: every rule for flushes matches it.  Block status is never delayed or failed, because it passes
 * to the child through the node's `filter` flag.
 *
 * Locks: rules_lock protects the rules and their counters; nothing else is locked while it is held.
 */
#include <pthread.h>
#include <stdlib.h>

#include "delay.h"
#include "node.h"

enum { OPERATION_READ = 1, OPERATION_WRITE = 2, OPERATION_FLUSH = 4, OPERATION_ZERO = 8, OPERATION_ALL = 15 };

struct rule {
    /* immutable */
    uint32_t operations;
    int error;                  /* positive errno, 0: none */
    uint64_t offset, length;
    uint64_t delay;             /* nanoseconds */
    bool limited;               /* acts `left` times only */
    /* protected by rules_lock */
    uint64_t skip;              /* matching requests that still pass */
    uint64_t left;              /* requests it still acts on */
};

struct inject_node {
    struct node node;
    pthread_mutex_t rules_lock;
    struct rule *rules;         /* protected by rules_lock, as is their number */
    size_t rule_count;
};

struct verdict {
    uint64_t delay;             /* nanoseconds */
    int error;                  /* 0 or -errno */
};

static struct inject_node *inject_of(struct node *node)
{
    return container_of(node, struct inject_node, node);
}

static bool ranges_overlap(uint64_t offset, uint64_t count, uint64_t other_offset, uint64_t other_count)
{
    return offset < other_offset ? other_offset - offset < count : offset - other_offset < other_count;
}

static bool rule_matches(const struct rule *rule, uint32_t operation, uint64_t count, uint64_t offset)
{
    return (rule->operations & operation) &&
           (operation == OPERATION_FLUSH || ranges_overlap(offset, count, rule->offset, rule->length));
}

/* Whether the rule acts on a request that matches it; counts the request. */
static bool rule_spend_locked(struct rule *rule)
{
    if (rule->skip > 0) {
        rule->skip--;
        return false;
    }
    if (rule->limited && rule->left == 0)
        return false;
    rule->left -= rule->limited;
    return true;
}

static struct verdict judge(struct inject_node *inject, uint32_t operation, uint64_t count, uint64_t offset)
{
    struct verdict verdict = {0};

    pthread_mutex_lock(&inject->rules_lock);
    for (size_t i = 0; i < inject->rule_count && !verdict.error; i++) {
        struct rule *rule = &inject->rules[i];

        if (rule_matches(rule, operation, count, offset) && rule_spend_locked(rule)) {
            verdict.delay += rule->delay;
            verdict.error = -rule->error;
        }
    }
    pthread_mutex_unlock(&inject->rules_lock);
    return verdict;
}

/* Delay the request as the rules say; the error that it shall fail with, or 0. */
static int inject_fault(struct node *node, uint32_t operation, uint64_t count, uint64_t offset)
{
    struct verdict verdict = judge(inject_of(node), operation, count, offset);

    delay_ns(verdict.delay);
    return verdict.error;
}

static int inject_pread(struct node *node, void *buf, size_t count, uint64_t offset)
{
    int error = inject_fault(node, OPERATION_READ, count, offset);

    return error ? error : node_pread(node->file, buf, count, offset);
}

static int inject_pwrite(struct node *node, const void *buf, size_t count, uint64_t offset, uint32_t flags)
{
    int error = inject_fault(node, OPERATION_WRITE, count, offset);

    return error ? error : node_pwrite(node->file, buf, count, offset, flags);
}

static int inject_zero(struct node *node, uint64_t count, uint64_t offset, uint32_t flags)
{
    int error = inject_fault(node, OPERATION_ZERO, count, offset);

    return error ? error : node_zero(node->file, count, offset, flags);
}

static int inject_discard(struct node *node, uint64_t count, uint64_t offset)
{
    int error = inject_fault(node, OPERATION_ZERO, count, offset);

    return error ? error : node_discard(node->file, count, offset);
}

static int inject_flush(struct node *node)
{
    int error = inject_fault(node, OPERATION_FLUSH, 0, 0);

    return error ? error : node_flush(node->file);
}

static int inject_map(struct node *node, uint64_t offset, uint64_t count, struct mapping *out)
{
    const struct node_ops *child = node->file->ops;

    if (child->map)
        return child->map(node->file, offset, count, out);
    *out = (struct mapping) { .kind = MAP_DATA, .allocated = true, .length = count };
    return 0;
}

static void inject_close(struct node *node)
{
    struct inject_node *inject = inject_of(node);

    pthread_mutex_destroy(&inject->rules_lock);
    free(inject->rules);
}

static const struct node_ops inject_ops = {
    .driver = "error-inject",
    .pread = inject_pread,
    .pwrite = inject_pwrite,
    .zero = inject_zero,
    .discard = inject_discard,
    .flush = inject_flush,
    .map = inject_map,
    .close = inject_close,
};

int nb_error_inject_open(struct node *child, uint32_t flags, struct node **out)
{
    struct inject_node *inject = node_alloc(sizeof(*inject), &inject_ops, child->size, flags, child, NULL);

    if (!inject)
        return -ENOMEM;
    inject->node.filter = true;
    pthread_mutex_init(&inject->rules_lock, NULL);
    *out = &inject->node;
    return 0;
}

static int rules_append_locked(struct inject_node *inject, const struct rule *rule)
{
    struct rule *rules = realloc(inject->rules, (inject->rule_count + 1) * sizeof(*rules));

    if (!rules)
        return -ENOMEM;
    rules[inject->rule_count++] = *rule;
    inject->rules = rules;
    return 0;
}

int nb_error_inject_rule(struct node *node, uint32_t operations, uint64_t offset, uint64_t length, int error,
                         uint64_t delay, uint64_t skip, uint64_t count)
{
    struct rule rule = {
        .operations = operations,
        .error = error,
        .offset = offset,
        .length = length,
        .delay = delay,
        .limited = count > 0,
        .skip = skip,
        .left = count,
    };
    int result;

    if (node->ops != &inject_ops || !operations || operations & ~(uint32_t)OPERATION_ALL || error < 0)
        return -EINVAL;
    pthread_mutex_lock(&inject_of(node)->rules_lock);
    result = rules_append_locked(inject_of(node), &rule);
    pthread_mutex_unlock(&inject_of(node)->rules_lock);
    return result;
}
