/*
 * matcher.c - follows a text through a grammar.
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
#include <math.h>
#include <stdlib.h>

#include "grammar.h"

enum {
    UNKNOWN = -1,
    DEAD = 0,       /* the empty set of pairs: no way to explain the text */
    TEXT_END = -1,  /* in place of a node: the root rule has matched */
    NO_FRAME = -1,
    LARGE_SUBTREE = 256, /* nodes from which on it pays to find out what a state's characters have in common */
    MANY_CLASSES = 256,
    KEPT_MASKS = 64,
    KEPT_TOKENS = 1 << 20,
};

static const int64_t SMALL_MEMORY = 32 << 20, LARGE_MEMORY = 512 << 20;

typedef struct pair {
    int32_t node, frame;
} pair;

typedef struct pairs {
    pair *at;
    int64_t n, room;
} pairs;

/* A frame or a state: the sorted pairs pool[first] .. pool[first + count - 1]. */
typedef struct set {
    int64_t first;
    int32_t count;
    uint32_t hash;
    int32_t row; /* of a state: its moves on ASCII, or UNKNOWN */
} set;

typedef struct row {
    int32_t next[128]; /* states, or UNKNOWN */
    uint64_t groups;   /* of characters that all lead to one and the same state, */
    int32_t onward;    /* this one; UNKNOWN: not looked at yet */
} row;

/* Where a character that is not ASCII leads. */
typedef struct move {
    int32_t state, class, next; /* state UNKNOWN: free */
} move;

/* A rule to be entered at this place of the text. */
typedef struct entry {
    int32_t rank;
    pair from;
} entry;

/* A place in the text. */
typedef struct cursor {
    int32_t state;
    pl_partial partial;
} cursor;

/* The answer of a whole vocabulary: the tokens that are allowed, or the others, whichever are fewer. */
typedef struct mask {
    cursor at;
    bool lists_allowed;
    int32_t *tokens, n_tokens;
} mask;

typedef struct seen {
    pair p;
    uint32_t stamp;
} seen;

typedef struct span {
    int32_t first, end;
} span;

struct pl_matcher {
    const pl_grammar *g;
    cursor *path; /* path[0] is where the text stands; the others are used while it is decided how it may go on */
    int64_t path_room;

    pairs pool;
    set *sets;
    int64_t n_sets, sets_room;
    int32_t *table; /* sets by their hash; UNKNOWN: free */
    int64_t table_size;
    row *rows;
    int64_t n_rows, rows_room;
    move *moves;
    int64_t n_moves, moves_size;
    int64_t memory; /* what these may take */

    pairs work, out, group; /* of closure() */
    entry *entries;
    int64_t n_entries, entries_room;
    seen *visited;
    int64_t n_visited, visited_size;
    uint32_t visited_stamp;
    uint32_t *node_stamps, node_stamp;

    const pl_trie *trie; /* that the masks are of */
    mask masks[KEPT_MASKS];
    int32_t n_masks;
    int64_t n_mask_tokens;
    span *spans;
    int64_t n_spans, spans_room;
    float *values;
    int64_t values_room;
};

static inline bool same_pair(pair a, pair b) { return a.node == b.node && a.frame == b.frame; }

static int compare_pairs(const void *a, const void *b) {
    const pair *x = a, *y = b;
    return x->node != y->node ? (x->node > y->node) - (x->node < y->node) : (x->frame > y->frame) - (x->frame < y->frame);
}

static inline uint32_t mix(uint32_t hash, uint32_t value) {
    hash = (hash ^ value) * 0x9E3779B1u;
    return hash ^ hash >> 15;
}

static inline uint32_t hash_pair(uint32_t hash, pair p) { return mix(mix(hash, (uint32_t)p.node), (uint32_t)p.frame); }

static inline int32_t push(pairs *v, pair p, pl_error *err) {
    if (v->n == v->room && pl_grow(&v->at, &v->room, v->n + 64, sizeof *v->at, err) != 0) {
        return -1;
    }
    v->at[v->n++] = p;
    return 0;
}

/* ---- sets of pairs, each stored once -------------------------------------------------------------------------------- */

/* Puts all sets into a table of another size, a power of two. */
static int32_t rebuild_table(pl_matcher *m, int64_t size, pl_error *err) {
    int32_t *table = malloc((size_t)size * sizeof *table);
    if (!table) {
        return pl_fail(err, "out of memory for a grammar");
    }
    for (int64_t i = 0; i < size; i++) {
        table[i] = UNKNOWN;
    }
    for (int32_t id = 0; id < m->n_sets; id++) {
        int64_t slot = m->sets[id].hash & (size - 1);
        while (table[slot] != UNKNOWN) {
            slot = (slot + 1) & (size - 1);
        }
        table[slot] = id;
    }
    free(m->table);
    m->table = table;
    m->table_size = size;
    return 0;
}

/* The number of the set of these pairs, which are sorted and without doubles; -1 when there is no memory. */
static int32_t intern(pl_matcher *m, const pairs *v, pl_error *err) {
    uint32_t hash = 0;
    for (int64_t i = 0; i < v->n; i++) {
        hash = hash_pair(hash, v->at[i]);
    }
    int64_t slot = hash & (m->table_size - 1);
    for (; m->table[slot] != UNKNOWN; slot = (slot + 1) & (m->table_size - 1)) {
        const set *s = &m->sets[m->table[slot]];
        if (s->hash == hash && s->count == v->n &&
            memcmp(m->pool.at + s->first, v->at, (size_t)v->n * sizeof *v->at) == 0) {
            return m->table[slot];
        }
    }
    if (v->n > INT32_MAX / 2 || m->n_sets >= INT32_MAX / 2) {
        return pl_fail(err, "the grammar has too many meanings");
    }
    if (pl_grow(&m->pool.at, &m->pool.room, m->pool.n + v->n, sizeof *m->pool.at, err) != 0 ||
        pl_grow(&m->sets, &m->sets_room, m->n_sets + 1, sizeof *m->sets, err) != 0) {
        return -1;
    }
    memcpy(m->pool.at + m->pool.n, v->at, (size_t)v->n * sizeof *v->at);
    m->sets[m->n_sets] = (set){.first = m->pool.n, .count = (int32_t)v->n, .hash = hash, .row = UNKNOWN};
    m->pool.n += v->n;
    m->table[slot] = (int32_t)m->n_sets++;
    const int32_t id = m->table[slot];
    return m->n_sets * 2 > m->table_size && rebuild_table(m, m->table_size * 2, err) != 0 ? -1 : id;
}

/* ---- what can come at a place of the text --------------------------------------------------------------------------- */

/* Marks a pair as visited. 1: it was already, 0: not, -1: no memory. */
static int32_t visit(pl_matcher *m, pair p, pl_error *err) {
    if (m->n_visited * 2 >= m->visited_size) {
        const int64_t size = m->visited_size * 2;
        seen *bigger = calloc((size_t)size, sizeof *bigger); /* stamp 0 is never in use */
        if (!bigger) {
            return pl_fail(err, "out of memory for a grammar");
        }
        for (int64_t i = 0; i < m->visited_size; i++) {
            if (m->visited[i].stamp == m->visited_stamp) {
                int64_t slot = hash_pair(0, m->visited[i].p) & (size - 1);
                while (bigger[slot].stamp == m->visited_stamp) {
                    slot = (slot + 1) & (size - 1);
                }
                bigger[slot] = m->visited[i];
            }
        }
        free(m->visited);
        m->visited = bigger;
        m->visited_size = size;
    }
    int64_t slot = hash_pair(0, p) & (m->visited_size - 1);
    for (; m->visited[slot].stamp == m->visited_stamp; slot = (slot + 1) & (m->visited_size - 1)) {
        if (same_pair(m->visited[slot].p, p)) {
            return 1;
        }
    }
    m->visited[slot] = (seen){p, m->visited_stamp};
    m->n_visited++;
    return 0;
}

static inline bool enters_before(const entry *a, const entry *b) {
    return a->rank != b->rank ? a->rank < b->rank : compare_pairs(&a->from, &b->from) < 0;
}

/* Puts an entry into the heap whose top is the one of the lowest rank. */
static int32_t push_entry(pl_matcher *m, entry e, pl_error *err) {
    if (m->n_entries == m->entries_room &&
        pl_grow(&m->entries, &m->entries_room, m->n_entries + 64, sizeof *m->entries, err) != 0) {
        return -1;
    }
    int64_t i = m->n_entries++;
    for (; i > 0 && enters_before(&e, &m->entries[(i - 1) / 2]); i = (i - 1) / 2) {
        m->entries[i] = m->entries[(i - 1) / 2];
    }
    m->entries[i] = e;
    return 0;
}

static entry pop_entry(pl_matcher *m) {
    const entry top = m->entries[0], last = m->entries[--m->n_entries];
    int64_t i = 0;
    for (int64_t child = 1; child < m->n_entries; child = 2 * i + 1) {
        child += child + 1 < m->n_entries && enters_before(&m->entries[child + 1], &m->entries[child]);
        if (!enters_before(&m->entries[child], &last)) {
            break;
        }
        m->entries[i] = m->entries[child];
        i = child;
    }
    m->entries[i] = last;
    return top;
}

/* Notes that `call`, a node in the given frame, enters its rule here. A call that is the last thing in its rule returns
 * to where that rule returns to, so that repetition by recursion does not pile up frames. */
static int32_t enter(pl_matcher *m, const pl_grammar_node *call, int32_t frame, pl_error *err) {
    const int32_t rank = m->g->rank[call->argument];
    if (m->g->nodes[call->next].kind != PL_GRAMMAR_END) {
        return push_entry(m, (entry){rank, {call->next, frame}}, err);
    }
    const set *below = &m->sets[frame];
    for (int32_t i = 0; i < below->count; i++) {
        if (push_entry(m, (entry){rank, m->pool.at[below->first + i]}, err) != 0) {
            return -1;
        }
    }
    return 0;
}

/* Goes on from the pairs in m->work, which stand behind something that has matched, over everything that consumes
 * nothing. What consumes something is put into m->out or among the entries. */
static int32_t follow(pl_matcher *m, pl_error *err) {
    if (++m->visited_stamp == 0) { /* once in 2^32 times the old stamps must go */
        memset(m->visited, 0, (size_t)m->visited_size * sizeof *m->visited);
        m->visited_stamp = 1;
    }
    m->n_visited = 0;
    while (m->work.n > 0) {
        const pair p = m->work.at[--m->work.n];
        const int32_t known = visit(m, p, err);
        if (known != 0) {
            if (known < 0) {
                return -1;
            }
            continue;
        }
        const pl_grammar_node *node = p.node == TEXT_END ? NULL : &m->g->nodes[p.node];
        int32_t status = 0;
        if (!node || node->kind == PL_GRAMMAR_CHARS) {
            status = push(&m->out, p, err);
        } else if (node->kind == PL_GRAMMAR_END) {
            const set *frame = &m->sets[p.frame];
            for (int32_t i = 0; i < frame->count && status == 0; i++) {
                status = push(&m->work, m->pool.at[frame->first + i], err);
            }
        } else if (node->kind == PL_GRAMMAR_FORK) {
            status |= push(&m->work, (pair){node->next, p.frame}, err);
            status |= node->argument >= 0 ? push(&m->work, (pair){node->argument, p.frame}, err) : 0;
        } else {
            status |= enter(m, node, p.frame, err);
            status |= m->g->nullable[node->argument] ? push(&m->work, (pair){node->next, p.frame}, err) : 0;
        }
        if (status != 0) {
            return -1;
        }
    }
    return 0;
}

/* Enters a rule in a frame. Its end is of no interest: callers of a rule that can match nothing have gone past it. */
static int32_t begin_rule(pl_matcher *m, int32_t rule, int32_t frame, pl_error *err) {
    if (++m->node_stamp == 0) {
        memset(m->node_stamps, 0, (size_t)m->g->n_nodes * sizeof *m->node_stamps);
        m->node_stamp = 1;
    }
    m->work.n = 0;
    int32_t status = push(&m->work, (pair){m->g->starts[rule], frame}, err);
    while (m->work.n > 0 && status == 0) {
        const pair p = m->work.at[--m->work.n];
        if (m->node_stamps[p.node] == m->node_stamp) {
            continue;
        }
        m->node_stamps[p.node] = m->node_stamp;
        const pl_grammar_node *node = &m->g->nodes[p.node];
        if (node->kind == PL_GRAMMAR_CHARS) {
            status |= push(&m->out, p, err);
        } else if (node->kind == PL_GRAMMAR_FORK) {
            status |= push(&m->work, (pair){node->next, frame}, err);
            status |= node->argument >= 0 ? push(&m->work, (pair){node->argument, frame}, err) : 0;
        } else if (node->kind == PL_GRAMMAR_CALL) {
            status |= enter(m, node, frame, err);
            status |= m->g->nullable[node->argument] ? push(&m->work, (pair){node->next, frame}, err) : 0;
        }
    }
    return status;
}

/* Enters the rules that are to be entered. Ranks grow from caller to callee: when a rule's turn comes, all entries into
 * it are known, and become one frame. */
static int32_t enter_rules(pl_matcher *m, pl_error *err) {
    while (m->n_entries > 0) {
        const int32_t rank = m->entries[0].rank;
        m->group.n = 0;
        while (m->n_entries > 0 && m->entries[0].rank == rank) {
            const entry e = pop_entry(m);
            if (m->group.n > 0 && same_pair(m->group.at[m->group.n - 1], e.from)) {
                continue;
            }
            if (push(&m->group, e.from, err) != 0) {
                return -1;
            }
        }
        const int32_t frame = intern(m, &m->group, err);
        if (frame < 0 || begin_rule(m, m->g->ranked[rank], frame, err) != 0) {
            return -1;
        }
    }
    return 0;
}

/* The state of the pairs in m->out. */
static int32_t state_of_out(pl_matcher *m, pl_error *err) {
    pairs *out = &m->out;
    if (out->n <= 16) {
        for (int64_t i = 1; i < out->n; i++) {
            const pair p = out->at[i];
            int64_t j = i;
            for (; j > 0 && compare_pairs(&out->at[j - 1], &p) > 0; j--) {
                out->at[j] = out->at[j - 1];
            }
            out->at[j] = p;
        }
    } else {
        qsort(out->at, (size_t)out->n, sizeof *out->at, compare_pairs);
    }
    int64_t n = 0;
    for (int64_t i = 0; i < out->n; i++) {
        if (n == 0 || !same_pair(out->at[i], out->at[n - 1])) {
            out->at[n++] = out->at[i];
        }
    }
    out->n = n;
    return intern(m, out, err);
}

/* The state to which a character of this class leads; -1 when there is no memory. */
static int32_t step(pl_matcher *m, int32_t state, int32_t class, pl_error *err) {
    const set *s = &m->sets[state];
    m->work.n = m->out.n = m->n_entries = 0;
    for (int32_t i = 0; i < s->count; i++) {
        const pair p = m->pool.at[s->first + i];
        if (p.node != TEXT_END && pl_grammar_set_meets(m->g, m->g->nodes[p.node].argument, class, class) &&
            push(&m->work, (pair){m->g->nodes[p.node].next, p.frame}, err) != 0) {
            return -1;
        }
    }
    return follow(m, err) == 0 && enter_rules(m, err) == 0 ? state_of_out(m, err) : -1;
}

/* The state before the first character. */
static int32_t first_state(pl_matcher *m, pl_error *err) {
    const pair end = {TEXT_END, NO_FRAME};
    m->work.n = m->out.n = m->n_entries = 0;
    if (push_entry(m, (entry){m->g->rank[m->g->root], end}, err) != 0 ||
        (m->g->nullable[m->g->root] && push(&m->out, end, err) != 0)) {
        return -1;
    }
    return enter_rules(m, err) == 0 ? state_of_out(m, err) : -1;
}

/* ---- remembered moves --------------------------------------------------------------------------------------------- */

/* The row of a state; NULL when there is no memory. */
static row *row_of(pl_matcher *m, int32_t state, pl_error *err) {
    if (m->sets[state].row == UNKNOWN) {
        if (pl_grow(&m->rows, &m->rows_room, m->n_rows + 1, sizeof *m->rows, err) != 0) {
            return NULL;
        }
        row *fresh = &m->rows[m->n_rows];
        fresh->onward = UNKNOWN;
        for (int c = 0; c < 128; c++) {
            fresh->next[c] = UNKNOWN;
        }
        m->sets[state].row = (int32_t)m->n_rows++;
    }
    return &m->rows[m->sets[state].row];
}

/* The row of a state of which it is known where most characters lead; NULL for others. */
static inline const row *onward_row(const pl_matcher *m, int32_t state) {
    const int32_t at = m->sets[state].row;
    return at == UNKNOWN || m->rows[at].onward == UNKNOWN ? NULL : &m->rows[at];
}

static int32_t move_ascii(pl_matcher *m, int32_t state, uint8_t character, pl_error *err) {
    row *r = row_of(m, state, err);
    if (!r) {
        return -1;
    }
    if (r->next[character] == UNKNOWN) {
        const int32_t class = m->g->ascii[character], next = step(m, state, class, err);
        if (next < 0) {
            return -1;
        }
        for (int c = 0; c < 128; c++) { /* step() makes no rows: r is still where it was */
            if (m->g->ascii[c] == class) {
                r->next[c] = next;
            }
        }
    }
    return r->next[character];
}

static int32_t move_other(pl_matcher *m, int32_t state, int32_t class, pl_error *err) {
    if (m->n_moves * 2 >= m->moves_size) {
        const int64_t size = m->moves_size * 2;
        move *bigger = malloc((size_t)size * sizeof *bigger);
        if (!bigger) {
            return pl_fail(err, "out of memory for a grammar");
        }
        for (int64_t i = 0; i < size; i++) {
            bigger[i].state = UNKNOWN;
        }
        for (int64_t i = 0; i < m->moves_size; i++) {
            if (m->moves[i].state != UNKNOWN) {
                int64_t slot = hash_pair(0, (pair){m->moves[i].state, m->moves[i].class}) & (size - 1);
                while (bigger[slot].state != UNKNOWN) {
                    slot = (slot + 1) & (size - 1);
                }
                bigger[slot] = m->moves[i];
            }
        }
        free(m->moves);
        m->moves = bigger;
        m->moves_size = size;
    }
    int64_t slot = hash_pair(0, (pair){state, class}) & (m->moves_size - 1);
    for (; m->moves[slot].state != UNKNOWN; slot = (slot + 1) & (m->moves_size - 1)) {
        if (m->moves[slot].state == state && m->moves[slot].class == class) {
            return m->moves[slot].next;
        }
    }
    const int32_t next = step(m, state, class, err);
    if (next >= 0) {
        m->moves[slot] = (move){state, class, next};
        m->n_moves++;
    }
    return next;
}

/* Whether one of the characters first..last may come. */
static bool may_come(const pl_matcher *m, int32_t state, int32_t first, int32_t last) {
    const int32_t first_class = pl_grammar_class(m->g, first), last_class = pl_grammar_class(m->g, last);
    const set *s = &m->sets[state];
    for (int32_t i = 0; i < s->count; i++) {
        const pair p = m->pool.at[s->first + i];
        if (p.node != TEXT_END && pl_grammar_set_meets(m->g, m->g->nodes[p.node].argument, first_class, last_class)) {
            return true;
        }
    }
    return false;
}

/* Takes one more byte: 1 if it may come, 0 if not, -1 when there is no memory. */
static int32_t advance(pl_matcher *m, cursor *c, uint8_t byte, pl_error *err) {
    if (byte < 0x80 && c->partial.missing == 0) {
        c->state = move_ascii(m, c->state, byte, err);
        return c->state < 0 ? -1 : c->state != DEAD;
    }
    if (!pl_partial_push(&c->partial, byte)) {
        return 0;
    }
    const row *r = onward_row(m, c->state);
    if (r && r->groups & PL_GROUP_OTHERS) { /* any of them leads there */
        c->state = c->partial.missing > 0 ? c->state : r->onward;
        return 1;
    }
    int32_t first, last;
    pl_partial_range(&c->partial, &first, &last);
    if (c->partial.missing > 0) {
        return may_come(m, c->state, first, last);
    }
    c->state = move_other(m, c->state, pl_grammar_class(m->g, first), err);
    return c->state < 0 ? -1 : c->state != DEAD;
}

/* ---- bounded memory ----------------------------------------------------------------------------------------------- */

static void forget_masks(pl_matcher *m) {
    for (int32_t i = 0; i < m->n_masks; i++) {
        free(m->masks[i].tokens);
    }
    m->n_masks = 0;
    m->n_mask_tokens = 0;
}

static int64_t memory_in_use(const pl_matcher *m) {
    return m->pool.n * (int64_t)sizeof *m->pool.at + m->n_sets * (int64_t)sizeof *m->sets +
           m->n_rows * (int64_t)sizeof *m->rows + m->n_moves * (int64_t)sizeof *m->moves;
}

/* Drops the sets that the first `n_path` cursors do not need, and all remembered moves. Pairs speak of older sets only,
 * and numbers keep their order: sorted pairs stay sorted. */
static int32_t collect(pl_matcher *m, int64_t n_path, pl_error *err) {
    int32_t *moved = malloc((size_t)m->n_sets * sizeof *moved); /* new numbers; until then 1 marks what is needed */
    if (!moved) {
        return pl_fail(err, "out of memory for a grammar");
    }
    memset(moved, 0, (size_t)m->n_sets * sizeof *moved);
    moved[DEAD] = 1;
    for (int64_t i = 0; i < n_path; i++) {
        moved[m->path[i].state] = 1;
    }
    for (int64_t id = m->n_sets - 1; id >= 0; id--) {
        for (int32_t i = 0; moved[id] && i < m->sets[id].count; i++) {
            const int32_t frame = m->pool.at[m->sets[id].first + i].frame;
            if (frame != NO_FRAME) {
                moved[frame] = 1;
            }
        }
    }
    int64_t n_sets = 0, n_pairs = 0;
    for (int64_t id = 0; id < m->n_sets; id++) {
        if (!moved[id]) {
            continue;
        }
        set s = {.first = n_pairs, .count = m->sets[id].count, .hash = 0, .row = UNKNOWN};
        for (int32_t i = 0; i < s.count; i++) {
            pair p = m->pool.at[m->sets[id].first + i];
            p.frame = p.frame == NO_FRAME ? NO_FRAME : moved[p.frame];
            s.hash = hash_pair(s.hash, p);
            m->pool.at[n_pairs++] = p;
        }
        moved[id] = (int32_t)n_sets;
        m->sets[n_sets++] = s;
    }
    for (int64_t i = 0; i < n_path; i++) {
        m->path[i].state = moved[m->path[i].state];
    }
    free(moved);
    m->n_sets = n_sets;
    m->pool.n = n_pairs;
    m->n_rows = 0;
    m->n_moves = 0;
    for (int64_t i = 0; i < m->moves_size; i++) {
        m->moves[i].state = UNKNOWN;
    }
    forget_masks(m);
    return rebuild_table(m, m->table_size, err);
}

/* Called between steps, when the first `n_path` cursors are all that counts. */
static int32_t bound_memory(pl_matcher *m, int64_t n_path, pl_error *err) {
    if (memory_in_use(m) <= m->memory) {
        return 0;
    }
    if (collect(m, n_path, err) != 0) {
        return -1;
    }
    if (memory_in_use(m) > m->memory / 2) { /* nearly all of it is needed: another collection would soon follow */
        if (m->memory >= LARGE_MEMORY) {
            return pl_fail(err, "the grammar has too many meanings for this text: following them takes more than %d MB",
                           (int)(LARGE_MEMORY >> 20));
        }
        m->memory *= 2;
    }
    return 0;
}

/* ---- the matcher -------------------------------------------------------------------------------------------------- */

PL_API pl_matcher *pl_matcher_new(const pl_grammar *grammar, pl_error *err) {
    pl_matcher *m = pl_alloc(sizeof *m, err);
    if (!m) {
        return NULL;
    }
    m->g = grammar;
    m->memory = SMALL_MEMORY;
    m->moves_size = m->visited_size = 64;
    m->moves = malloc((size_t)m->moves_size * sizeof *m->moves);
    m->visited = calloc((size_t)m->visited_size, sizeof *m->visited);
    m->node_stamps = calloc((size_t)grammar->n_nodes, sizeof *m->node_stamps);
    if (!m->moves || !m->visited || !m->node_stamps) {
        pl_fail(err, "out of memory for a grammar");
        pl_matcher_free(m);
        return NULL;
    }
    for (int64_t i = 0; i < m->moves_size; i++) {
        m->moves[i].state = UNKNOWN;
    }
    if (pl_grow(&m->path, &m->path_room, 2, sizeof *m->path, err) == 0 && rebuild_table(m, 256, err) == 0 &&
        pl_grow(&m->pool.at, &m->pool.room, 64, sizeof *m->pool.at, err) == 0 &&
        pl_grow(&m->out.at, &m->out.room, 64, sizeof *m->out.at, err) == 0 && intern(m, &m->out, err) == DEAD) {
        m->path[0] = (cursor){.state = first_state(m, err)};
        if (m->path[0].state >= 0) {
            return m;
        }
    }
    pl_matcher_free(m);
    return NULL;
}

PL_API void pl_matcher_free(pl_matcher *m) {
    if (m) {
        forget_masks(m);
        free(m->path);
        free(m->pool.at);
        free(m->sets);
        free(m->table);
        free(m->rows);
        free(m->moves);
        free(m->work.at);
        free(m->out.at);
        free(m->group.at);
        free(m->entries);
        free(m->visited);
        free(m->node_stamps);
        free(m->spans);
        free(m->values);
        pl_free(m);
    }
}

PL_API int32_t pl_matcher_allows(pl_matcher *m, const uint8_t *bytes, int64_t n_bytes, pl_error *err) {
    m->path[1] = m->path[0];
    int32_t fine = 1;
    for (int64_t i = 0; i < n_bytes && fine == 1; i++) {
        fine = bound_memory(m, 2, err) == 0 ? advance(m, &m->path[1], bytes[i], err) : -1;
    }
    return fine;
}

PL_API int32_t pl_matcher_accept(pl_matcher *m, const uint8_t *bytes, int64_t n_bytes, pl_error *err) {
    const int32_t fine = pl_matcher_allows(m, bytes, n_bytes, err);
    if (fine == 1) {
        m->path[0] = m->path[1];
    }
    return fine;
}

PL_API int32_t pl_matcher_can_end(const pl_matcher *m) {
    const set *s = &m->sets[m->path[0].state];
    return m->path[0].partial.missing == 0 && s->count > 0 && m->pool.at[s->first].node == TEXT_END;
}

PL_API int32_t pl_matcher_must_end(const pl_matcher *m) {
    return pl_matcher_can_end(m) && m->sets[m->path[0].state].count == 1;
}

/* ---- all tokens at once ------------------------------------------------------------------------------------------- */

/* The state to which the largest number of ASCII characters leads. -1 when there is no memory. */
static int32_t common_move(pl_matcher *m, int32_t state, pl_error *err) {
    int32_t candidate = DEAD, votes = 0; /* the majority vote of Boyer and Moore, among those that may come at all */
    for (int c = 0; c < 128; c++) {
        const int32_t next = move_ascii(m, state, (uint8_t)c, err);
        if (next < 0) {
            return -1;
        }
        if (next != DEAD) {
            candidate = votes == 0 ? next : candidate;
            votes += next == candidate ? 1 : -1;
        }
    }
    return candidate;
}

/* Finds row.onward and row.groups of a state; NULL when there is no memory. */
static const row *look_onward(pl_matcher *m, int32_t state, pl_error *err) {
    const row *known = row_of(m, state, err);
    if (!known || known->onward != UNKNOWN) {
        return known;
    }
    const int32_t onward = common_move(m, state, err), first = pl_grammar_class(m->g, 128);
    if (onward < 0) {
        return NULL;
    }
    uint64_t groups = ~PL_GROUP_BROKEN;
    for (int c = 0; c < 128; c++) {
        if (m->rows[m->sets[state].row].next[c] != onward) {
            groups &= ~((uint64_t)1 << pl_trie_group((uint8_t)c));
        }
    }
    bool others = m->g->n_classes - first <= MANY_CLASSES;
    for (int32_t class = first; class < m->g->n_classes && others; class++) {
        if (m->g->bounds[class] >= 0xD800 && m->g->bounds[class] < 0xE000) {
            continue; /* no character */
        }
        const int32_t next = move_other(m, state, class, err);
        if (next < 0) {
            return NULL;
        }
        others = next == onward;
    }
    row *r = &m->rows[m->sets[state].row];
    r->groups = onward == DEAD ? 0 : others ? groups : groups & ~PL_GROUP_OTHERS;
    r->onward = onward;
    return r;
}

/* Whether everything in the subtree of node `i` is allowed after `c`, because all its characters lead onward in the
 * same way: 1, 0 (not so, or not known), -1 when there is no memory. */
static int32_t all_lead_onward(pl_matcher *m, const cursor *c, const pl_trie *trie, int32_t i, pl_error *err) {
    const pl_trie_node *node = &trie->nodes[i];
    const bool large = node->end - i >= LARGE_SUBTREE;
    int32_t state = c->state;
    if (c->partial.missing > 0 || node->groups & PL_GROUP_BROKEN) {
        return 0;
    }
    for (int32_t level = 0; level < node->height; level++) { /* a level is one character, or less */
        const row *r = onward_row(m, state);
        if (!r) {
            r = large ? look_onward(m, state, err) : NULL;
            if (!r) {
                return large ? -1 : 0;
            }
        }
        if (node->groups & ~r->groups) {
            return 0;
        }
        if (r->onward == state) {
            break;
        }
        state = r->onward;
    }
    return 1;
}

static int32_t allow(pl_matcher *m, int32_t first, int32_t end, pl_error *err) {
    if (first == end) {
        return 0;
    }
    if (m->n_spans > 0 && m->spans[m->n_spans - 1].end == first) {
        m->spans[m->n_spans - 1].end = end;
        return 0;
    }
    if (pl_grow(&m->spans, &m->spans_room, m->n_spans + 1, sizeof *m->spans, err) != 0) {
        return -1;
    }
    m->spans[m->n_spans++] = (span){first, end};
    return 0;
}

/* Walks the tree, leaving subtrees as soon as nothing in them can come, and collects the allowed tokens as spans of the
 * trie's order. */
static int32_t walk(pl_matcher *m, const pl_trie *trie, pl_error *err) {
    if (pl_grow(&m->path, &m->path_room, trie->depth + 2, sizeof *m->path, err) != 0) {
        return -1;
    }
    m->n_spans = 0;
    for (int32_t i = 1; i < trie->n_nodes;) {
        const pl_trie_node *node = &trie->nodes[i];
        if (bound_memory(m, node->depth, err) != 0) {
            return -1;
        }
        const cursor *parent = &m->path[node->depth - 1];
        const int32_t all = all_lead_onward(m, parent, trie, i, err);
        if (all != 0) {
            if (all < 0 || allow(m, node->first, trie->nodes[node->end].first, err) != 0) {
                return -1;
            }
            i = node->end;
            continue;
        }
        cursor c = *parent;
        const int32_t fine = advance(m, &c, node->byte, err);
        if (fine < 0 || (fine == 1 && allow(m, node->first, trie->nodes[i + 1].first, err) != 0)) {
            return -1;
        }
        m->path[node->depth] = c;
        i = fine ? i + 1 : node->end;
    }
    return 0;
}

/* Makes a list of the spans' tokens, or of the others. */
static int32_t list_tokens(const pl_matcher *m, const pl_trie *trie, mask *result, pl_error *err) {
    int32_t allowed = 0;
    for (int64_t i = 0; i < m->n_spans; i++) {
        allowed += m->spans[i].end - m->spans[i].first;
    }
    result->lists_allowed = allowed <= trie->n_tokens / 2;
    result->n_tokens = result->lists_allowed ? allowed : trie->n_tokens - allowed;
    result->tokens = malloc((size_t)PL_MAX(result->n_tokens, 1) * sizeof *result->tokens);
    if (!result->tokens) {
        return pl_fail(err, "out of memory for a grammar");
    }
    int32_t n = 0, before = 0;
    for (int64_t i = 0; i <= m->n_spans; i++) {
        const span s = i < m->n_spans ? m->spans[i] : (span){trie->n_tokens, trie->n_tokens};
        const int32_t from = result->lists_allowed ? s.first : before, to = result->lists_allowed ? s.end : s.first;
        memcpy(result->tokens + n, trie->order + from, (size_t)(to - from) * sizeof *result->tokens);
        n += to - from;
        before = s.end;
    }
    return 0;
}

static inline bool same_place(const cursor *a, const cursor *b) {
    return a->state == b->state && a->partial.missing == b->partial.missing &&
           (a->partial.missing == 0 || (a->partial.value == b->partial.value && a->partial.length == b->partial.length));
}

/* The mask at path[0], remembered or made; NULL when there is no memory. */
static const mask *mask_here(pl_matcher *m, const pl_trie *trie, pl_error *err) {
    if (trie != m->trie) {
        forget_masks(m);
        m->trie = trie;
    }
    for (int32_t i = 0; i < m->n_masks; i++) {
        if (same_place(&m->masks[i].at, &m->path[0])) {
            return &m->masks[i];
        }
    }
    mask fresh;
    if (walk(m, trie, err) != 0 || list_tokens(m, trie, &fresh, err) != 0) {
        return NULL;
    }
    if (m->n_masks == KEPT_MASKS || m->n_mask_tokens > KEPT_TOKENS) {
        forget_masks(m);
    }
    fresh.at = m->path[0];
    m->n_mask_tokens += fresh.n_tokens;
    m->masks[m->n_masks] = fresh;
    return &m->masks[m->n_masks++];
}

PL_API int32_t pl_matcher_mask(pl_matcher *m, const pl_trie *trie, float *logits, int32_t n_logits, pl_error *err) {
    if (n_logits != trie->n_tokens) {
        return pl_fail(err, "%d logits for a vocabulary of %d tokens", n_logits, trie->n_tokens);
    }
    const mask *here = mask_here(m, trie, err);
    if (!here) {
        return -1;
    }
    if (!here->lists_allowed) {
        for (int32_t i = 0; i < here->n_tokens; i++) {
            logits[here->tokens[i]] = -INFINITY;
        }
        return 0;
    }
    if (pl_grow(&m->values, &m->values_room, here->n_tokens, sizeof *m->values, err) != 0) {
        return -1;
    }
    for (int32_t i = 0; i < here->n_tokens; i++) {
        m->values[i] = logits[here->tokens[i]];
    }
    for (int32_t i = 0; i < n_logits; i++) {
        logits[i] = -INFINITY;
    }
    for (int32_t i = 0; i < here->n_tokens; i++) {
        logits[here->tokens[i]] = m->values[i];
    }
    return 0;
}
