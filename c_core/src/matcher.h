/*
 * matcher.h - what following a text (matcher.c) and answering for a whole vocabulary at once (masks.c) share.
 *
 * The text so far may be explained in several ways. Each is a node that waits for a character together with a stack of
 * the rules that were entered on the way: where to go on in the calling rule once this one has matched. All ways
 * together make a state. Stacks share what they have in common: a frame is the set of all (node to return to, frame
 * below) of one entry into a rule, however many callers there are, so that the number of ways may be exponential but
 * what is stored is not (this is the graph-structured stack of generalized LL parsing, Scott & Johnstone 2010).
 *
 * Frames and states are sets of (node, frame) pairs, and equal sets are stored once. So a state is a number, and where
 * a character leads from a state is remembered: the pushdown automaton is made deterministic while it is used.
 */
#ifndef PL_MATCHER_H
#define PL_MATCHER_H

#include "grammar.h"

enum {
    PL_UNKNOWN = -1,
    PL_DEAD = 0, /* the empty set of pairs: no way to explain the text */
    PL_ENDLESS = INT32_MAX,
};

typedef struct pl_pair {
    int32_t node, frame;
} pl_pair;

typedef struct pl_pairs {
    pl_pair *at;
    int64_t n, room;
} pl_pairs;

typedef struct pl_list {
    int32_t *at;
    int64_t n, room;
} pl_list;

/* A frame or a state: the sorted pairs pool[first] .. pool[first + count - 1]. */
typedef struct pl_set {
    int64_t first;
    int32_t count;
    uint32_t hash;
    int32_t row;  /* of a state: its moves on ASCII, or PL_UNKNOWN */
    int32_t mask; /* the same of its mask */
} pl_set;

/* What may come whatever its characters are, as long as they are of these groups: up to `levels` characters (PL_ENDLESS:
 * any number). After exactly so many, no character of the groups can come but for those in `stop`. */
typedef struct pl_stretch {
    uint64_t groups, stop;
    int32_t levels;
} pl_stretch;

typedef struct pl_row {
    int32_t next[128]; /* states, or PL_UNKNOWN */
    int32_t onward;     /* the state to which many characters lead, if there is one; PL_UNKNOWN: not looked at yet */
    uint64_t uniform;   /* groups of characters that all lead to it */
    pl_stretch stretch; /* levels PL_UNKNOWN: not looked at yet */
} pl_row;

/* Where a character that is not ASCII leads. */
typedef struct pl_move {
    int32_t state, class, next; /* state PL_UNKNOWN: free */
} pl_move;

/* A rule to be entered at this place of the text. */
typedef struct pl_entry {
    int32_t rank;
    pl_pair from;
} pl_entry;

typedef struct pl_seen {
    pl_pair p;
    uint32_t stamp;
} pl_seen;

/* A place in the text. */
typedef struct pl_cursor {
    int32_t state;
    pl_partial partial;
} pl_cursor;

/* The answer for a whole vocabulary: a token that begins at most `limit` characters is allowed, any other is not, but for
 * those that are listed: first tokens that are allowed, then tokens that are not. Last come nodes of the tree of which
 * it depends on more than is known whether they and what is below them are allowed. */
typedef struct pl_mask {
    int32_t *listed;
    int32_t n_allowed, n_banned, n_open;
    int32_t state, limit;
} pl_mask;

/* Tokens first .. end - 1 of the tree's order, as far as they begin at most `limit` characters. */
typedef struct pl_span {
    int32_t first, end, limit;
} pl_span;

/* Where a walk stands in the tree: at a node of which the children from `child` up to `last` are still to be visited. */
typedef struct pl_branch {
    int32_t child, last;
    int32_t end;   /* of the subtree's tokens */
    int32_t chars; /* that begin on the way from the root */
    bool open;     /* on the way the text may have gone on in what is not known of the stack */
    pl_stretch stretch;
} pl_branch;

enum { PL_KEPT_MASKS = 256 };

typedef struct pl_masks {
    const pl_trie *trie; /* that they are of */
    pl_mask at[PL_KEPT_MASKS];
    int32_t n;
    int64_t n_listed; /* in all of them */
    /* of one walk */
    pl_branch *branches;
    int64_t branches_room;
    pl_span *spans;
    int64_t n_spans, spans_room;
    pl_list open, allowed, banned, tried;
    float *values;
    int64_t values_room;
} pl_masks;

struct pl_matcher {
    const pl_grammar *g;
    pl_cursor *path; /* path[0] is where the text stands; the others are used while it is decided how it may go on */
    int64_t path_room;

    pl_pairs pool;
    pl_set *sets;
    int64_t n_sets, sets_room;
    int32_t *table; /* sets by their hash; PL_UNKNOWN: free */
    int64_t table_size;
    pl_row *rows;
    int64_t n_rows, rows_room;
    pl_move *moves;
    int64_t n_moves, moves_size;
    int64_t memory; /* what these may take */

    pl_pairs work, out, group; /* of a step */
    pl_entry *entries;
    int64_t n_entries, entries_room;
    pl_seen *visited;
    int64_t n_visited, visited_size;
    uint32_t visited_stamp;
    uint32_t *node_stamps, node_stamp;

    pl_masks masks;
};

/* Takes one more byte: 1 if it may come, 0 if not, -1 when there is no memory. */
int32_t pl_matcher_advance(pl_matcher *m, pl_cursor *c, uint8_t byte, pl_error *err);
/* Called between steps, when the first `n_path` cursors are all that counts; their states may be renumbered. */
int32_t pl_matcher_bound_memory(pl_matcher *m, int64_t n_path, pl_error *err);
/* What is known of a stretch from there on; it is found out if `wanted`. Not known: one of no characters. */
int32_t pl_matcher_stretch(pl_matcher *m, const pl_cursor *c, bool wanted, pl_stretch *stretch, pl_error *err);
/* A state that is like the given one but for what lies deep in the stack: there it is the same for many states. -1 when
 * there is no memory. */
int32_t pl_matcher_outline(pl_matcher *m, int32_t state, pl_error *err);
/* Whether what an outline leaves out may explain the text; whether anything else does. */
bool pl_matcher_is_open(const pl_matcher *m, int32_t state);
bool pl_matcher_is_alive(const pl_matcher *m, int32_t state);

/* Drops all masks. */
void pl_masks_forget(pl_matcher *m);
void pl_masks_free(pl_matcher *m);

#endif
