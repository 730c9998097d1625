/* matcher.c - follows a text through a grammar. What states and frames are stands in matcher.h. */
#include "matcher.h"

#include <stdlib.h>

enum {
    TEXT_END = -1, /* in place of a node: the root rule has matched */
    REST = -2,     /* the same in an outline: a rule has matched whose frame is left out */
    NO_FRAME = -1,
    REST_FRAME = 1, /* the set of REST alone */
    OUTLINED_FRAMES = 2,
    MANY_CALLERS = 8, /* frames with more are not part of outlines */
    MANY_ALIKE = 20,  /* from so many characters on it pays to look where they lead */
    MANY_CLASSES = 256,
    MANY_LEVELS = 32, /* few tokens are longer */
    LAST_CODE_POINT = 0x10FFFF,
};

static const int64_t SMALL_MEMORY = 32 << 20, LARGE_MEMORY = 512 << 20;

static inline bool same_pair(pl_pair a, pl_pair b) { return a.node == b.node && a.frame == b.frame; }

static int compare_pairs(const void *a, const void *b) {
    const pl_pair *x = a, *y = b;
    return x->node != y->node ? (x->node > y->node) - (x->node < y->node) : (x->frame > y->frame) - (x->frame < y->frame);
}

static inline uint32_t mix(uint32_t hash, uint32_t value) {
    hash = (hash ^ value) * 0x9E3779B1u;
    return hash ^ hash >> 15;
}

static inline uint32_t hash_pair(uint32_t hash, pl_pair p) { return mix(mix(hash, (uint32_t)p.node), (uint32_t)p.frame); }

static inline int32_t push(pl_pairs *v, pl_pair p, pl_error *err) {
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
        table[i] = PL_UNKNOWN;
    }
    for (int32_t id = 0; id < m->n_sets; id++) {
        int64_t slot = m->sets[id].hash & (size - 1);
        while (table[slot] != PL_UNKNOWN) {
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
static int32_t intern(pl_matcher *m, const pl_pair *at, int64_t n, pl_error *err) {
    uint32_t hash = 0;
    for (int64_t i = 0; i < n; i++) {
        hash = hash_pair(hash, at[i]);
    }
    int64_t slot = hash & (m->table_size - 1);
    for (; m->table[slot] != PL_UNKNOWN; slot = (slot + 1) & (m->table_size - 1)) {
        const pl_set *s = &m->sets[m->table[slot]];
        if (s->hash == hash && s->count == n && memcmp(m->pool.at + s->first, at, (size_t)n * sizeof *at) == 0) {
            return m->table[slot];
        }
    }
    if (n > INT32_MAX / 2 || m->n_sets >= INT32_MAX / 2) {
        return pl_fail(err, "the grammar has too many meanings");
    }
    if (pl_grow(&m->pool.at, &m->pool.room, m->pool.n + n, sizeof *m->pool.at, err) != 0 ||
        pl_grow(&m->sets, &m->sets_room, m->n_sets + 1, sizeof *m->sets, err) != 0) {
        return -1;
    }
    memcpy(m->pool.at + m->pool.n, at, (size_t)n * sizeof *at);
    m->sets[m->n_sets] = (pl_set){m->pool.n, (int32_t)n, hash, .row = PL_UNKNOWN, .mask = PL_UNKNOWN};
    m->pool.n += n;
    m->table[slot] = (int32_t)m->n_sets++;
    const int32_t id = m->table[slot];
    return m->n_sets * 2 > m->table_size && rebuild_table(m, m->table_size * 2, err) != 0 ? -1 : id;
}

/* The same of pairs in any order, which may be there twice; they are sorted. */
static int32_t intern_unsorted(pl_matcher *m, pl_pair *at, int64_t n, pl_error *err) {
    if (n <= 16) {
        for (int64_t i = 1; i < n; i++) {
            const pl_pair p = at[i];
            int64_t j = i;
            for (; j > 0 && compare_pairs(&at[j - 1], &p) > 0; j--) {
                at[j] = at[j - 1];
            }
            at[j] = p;
        }
    } else {
        qsort(at, (size_t)n, sizeof *at, compare_pairs);
    }
    int64_t unique = 0;
    for (int64_t i = 0; i < n; i++) {
        if (unique == 0 || !same_pair(at[i], at[unique - 1])) {
            at[unique++] = at[i];
        }
    }
    return intern(m, at, unique, err);
}

/* ---- what can come at a place of the text --------------------------------------------------------------------------- */

/* Marks a pair as visited. 1: it was already, 0: not, -1: no memory. */
static int32_t visit(pl_matcher *m, pl_pair p, pl_error *err) {
    if (m->n_visited * 2 >= m->visited_size) {
        const int64_t size = m->visited_size * 2;
        pl_seen *bigger = calloc((size_t)size, sizeof *bigger); /* stamp 0 is never in use */
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
    m->visited[slot] = (pl_seen){p, m->visited_stamp};
    m->n_visited++;
    return 0;
}

static inline bool enters_before(const pl_entry *a, const pl_entry *b) {
    return a->rank != b->rank ? a->rank < b->rank : compare_pairs(&a->from, &b->from) < 0;
}

/* Puts an entry into the heap whose top is the one of the lowest rank. */
static int32_t push_entry(pl_matcher *m, pl_entry e, pl_error *err) {
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

static pl_entry pop_entry(pl_matcher *m) {
    const pl_entry top = m->entries[0], last = m->entries[--m->n_entries];
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
        return push_entry(m, (pl_entry){rank, {call->next, frame}}, err);
    }
    const pl_set *below = &m->sets[frame];
    for (int32_t i = 0; i < below->count; i++) {
        if (push_entry(m, (pl_entry){rank, m->pool.at[below->first + i]}, err) != 0) {
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
        const pl_pair p = m->work.at[--m->work.n];
        const int32_t known = visit(m, p, err);
        if (known != 0) {
            if (known < 0) {
                return -1;
            }
            continue;
        }
        const pl_grammar_node *node = p.node < 0 ? NULL : &m->g->nodes[p.node];
        int32_t status = 0;
        if (!node || node->kind == PL_GRAMMAR_CHARS) {
            status = push(&m->out, p, err);
        } else if (node->kind == PL_GRAMMAR_END) {
            const pl_set *frame = &m->sets[p.frame];
            for (int32_t i = 0; i < frame->count && status == 0; i++) {
                status = push(&m->work, m->pool.at[frame->first + i], err);
            }
        } else if (node->kind == PL_GRAMMAR_FORK) {
            status |= push(&m->work, (pl_pair){node->next, p.frame}, err);
            status |= node->argument >= 0 ? push(&m->work, (pl_pair){node->argument, p.frame}, err) : 0;
        } else {
            status |= enter(m, node, p.frame, err);
            status |= m->g->nullable[node->argument] ? push(&m->work, (pl_pair){node->next, p.frame}, err) : 0;
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
    int32_t status = push(&m->work, (pl_pair){m->g->starts[rule], frame}, err);
    while (m->work.n > 0 && status == 0) {
        const pl_pair p = m->work.at[--m->work.n];
        if (m->node_stamps[p.node] == m->node_stamp) {
            continue;
        }
        m->node_stamps[p.node] = m->node_stamp;
        const pl_grammar_node *node = &m->g->nodes[p.node];
        if (node->kind == PL_GRAMMAR_CHARS) {
            status |= push(&m->out, p, err);
        } else if (node->kind == PL_GRAMMAR_FORK) {
            status |= push(&m->work, (pl_pair){node->next, frame}, err);
            status |= node->argument >= 0 ? push(&m->work, (pl_pair){node->argument, frame}, err) : 0;
        } else if (node->kind == PL_GRAMMAR_CALL) {
            status |= enter(m, node, frame, err);
            status |= m->g->nullable[node->argument] ? push(&m->work, (pl_pair){node->next, frame}, err) : 0;
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
            const pl_entry e = pop_entry(m);
            if (m->group.n > 0 && same_pair(m->group.at[m->group.n - 1], e.from)) {
                continue;
            }
            if (push(&m->group, e.from, err) != 0) {
                return -1;
            }
        }
        const int32_t frame = intern(m, m->group.at, m->group.n, err);
        if (frame < 0 || begin_rule(m, m->g->ranked[rank], frame, err) != 0) {
            return -1;
        }
    }
    return 0;
}

/* The state to which the pairs in m->work, behind a character that has matched, lead; -1 when there is no memory. */
static int32_t arrive(pl_matcher *m, pl_error *err) {
    m->out.n = m->n_entries = 0;
    return follow(m, err) == 0 && enter_rules(m, err) == 0 ? intern_unsorted(m, m->out.at, m->out.n, err) : -1;
}

/* The state before the first character. */
static int32_t first_state(pl_matcher *m, pl_error *err) {
    const pl_pair end = {TEXT_END, NO_FRAME};
    m->work.n = m->out.n = m->n_entries = 0;
    if (push_entry(m, (pl_entry){m->g->rank[m->g->root], end}, err) != 0 ||
        (m->g->nullable[m->g->root] && push(&m->out, end, err) != 0)) {
        return -1;
    }
    return enter_rules(m, err) == 0 ? intern_unsorted(m, m->out.at, m->out.n, err) : -1;
}

/* ---- remembered moves --------------------------------------------------------------------------------------------- */

/* The row of a state; NULL when there is no memory. */
static pl_row *row_of(pl_matcher *m, int32_t state, pl_error *err) {
    if (m->sets[state].row == PL_UNKNOWN) {
        if (pl_grow(&m->rows, &m->rows_room, m->n_rows + 1, sizeof *m->rows, err) != 0) {
            return NULL;
        }
        pl_row *fresh = &m->rows[m->n_rows];
        fresh->uniform = 0;
        fresh->onward = fresh->stretch.levels = PL_UNKNOWN;
        for (int c = 0; c < 128; c++) {
            fresh->next[c] = PL_UNKNOWN;
        }
        m->sets[state].row = (int32_t)m->n_rows++;
    }
    return &m->rows[m->sets[state].row];
}

/* Fills m->work with what stands behind an ASCII character, and *alike with the characters that the same pairs take. */
static int32_t take_ascii(pl_matcher *m, int32_t state, uint8_t character, pl_ascii *alike, pl_error *err) {
    *alike = (pl_ascii){{~(uint64_t)0, ~(uint64_t)0}};
    m->work.n = 0;
    for (int32_t i = 0; i < m->sets[state].count; i++) {
        const pl_pair p = m->pool.at[m->sets[state].first + i];
        if (p.node < 0) {
            continue;
        }
        const pl_grammar_node *node = &m->g->nodes[p.node];
        const pl_ascii *taken = &m->g->set_ascii[node->argument];
        const uint64_t flip = pl_ascii_has(taken, character) ? 0 : ~(uint64_t)0;
        alike->bits[0] &= taken->bits[0] ^ flip;
        alike->bits[1] &= taken->bits[1] ^ flip;
        if (!flip && push(&m->work, (pl_pair){node->next, p.frame}, err) != 0) {
            return -1;
        }
    }
    return 0;
}

static int32_t move_ascii(pl_matcher *m, int32_t state, uint8_t character, pl_error *err) {
    const pl_row *known = row_of(m, state, err);
    if (!known || known->next[character] != PL_UNKNOWN) {
        return known ? known->next[character] : -1;
    }
    pl_ascii alike;
    const int32_t next = take_ascii(m, state, character, &alike, err) == 0 ? arrive(m, err) : -1;
    if (next >= 0) {
        for (int c = 0; c < 128; c++) {
            if (pl_ascii_has(&alike, (uint8_t)c)) {
                m->rows[m->sets[state].row].next[c] = next;
            }
        }
    }
    return next;
}

/* Whether a pair takes a character of the classes first..last. */
static inline bool takes_any(const pl_matcher *m, pl_pair p, int32_t first, int32_t last) {
    return p.node >= 0 && pl_grammar_set_meets(m->g, m->g->nodes[p.node].argument, first, last);
}

static int32_t move_other(pl_matcher *m, int32_t state, int32_t class, pl_error *err) {
    if (m->n_moves * 2 >= m->moves_size) {
        const int64_t size = m->moves_size * 2;
        pl_move *bigger = malloc((size_t)size * sizeof *bigger);
        if (!bigger) {
            return pl_fail(err, "out of memory for a grammar");
        }
        for (int64_t i = 0; i < size; i++) {
            bigger[i].state = PL_UNKNOWN;
        }
        for (int64_t i = 0; i < m->moves_size; i++) {
            if (m->moves[i].state != PL_UNKNOWN) {
                int64_t slot = hash_pair(0, (pl_pair){m->moves[i].state, m->moves[i].class}) & (size - 1);
                while (bigger[slot].state != PL_UNKNOWN) {
                    slot = (slot + 1) & (size - 1);
                }
                bigger[slot] = m->moves[i];
            }
        }
        free(m->moves);
        m->moves = bigger;
        m->moves_size = size;
    }
    int64_t slot = hash_pair(0, (pl_pair){state, class}) & (m->moves_size - 1);
    for (; m->moves[slot].state != PL_UNKNOWN; slot = (slot + 1) & (m->moves_size - 1)) {
        if (m->moves[slot].state == state && m->moves[slot].class == class) {
            return m->moves[slot].next;
        }
    }
    m->work.n = 0;
    for (int32_t i = 0; i < m->sets[state].count; i++) {
        const pl_pair p = m->pool.at[m->sets[state].first + i];
        if (takes_any(m, p, class, class) && push(&m->work, (pl_pair){m->g->nodes[p.node].next, p.frame}, err) != 0) {
            return -1;
        }
    }
    const int32_t next = arrive(m, err);
    if (next >= 0) {
        m->moves[slot] = (pl_move){state, class, next};
        m->n_moves++;
    }
    return next;
}

/* Whether one of the characters first..last may come. */
static bool may_come(const pl_matcher *m, int32_t state, int32_t first, int32_t last) {
    const int32_t first_class = pl_grammar_class(m->g, first), last_class = pl_grammar_class(m->g, last);
    const pl_set *s = &m->sets[state];
    for (int32_t i = 0; i < s->count; i++) {
        if (takes_any(m, m->pool.at[s->first + i], first_class, last_class)) {
            return true;
        }
    }
    return false;
}

int32_t pl_matcher_advance(pl_matcher *m, pl_cursor *c, uint8_t byte, pl_error *err) {
    if (byte < 0x80 && c->partial.missing == 0) {
        c->state = move_ascii(m, c->state, byte, err);
        return c->state < 0 ? -1 : c->state != PL_DEAD;
    }
    if (!pl_partial_push(&c->partial, byte)) {
        return 0;
    }
    const int32_t row = m->sets[c->state].row;
    if (row != PL_UNKNOWN && m->rows[row].onward != PL_UNKNOWN && m->rows[row].uniform & PL_GROUP_OTHERS) {
        c->state = c->partial.missing > 0 ? c->state : m->rows[row].onward; /* any of them leads there */
        return 1;
    }
    int32_t first, last;
    pl_partial_range(&c->partial, &first, &last);
    if (c->partial.missing > 0) {
        return may_come(m, c->state, first, last);
    }
    c->state = move_other(m, c->state, pl_grammar_class(m->g, first), err);
    return c->state < 0 ? -1 : c->state != PL_DEAD;
}

/* ---- what states have in common ------------------------------------------------------------------------------------ */

bool pl_matcher_is_open(const pl_matcher *m, int32_t state) {
    return m->sets[state].count > 0 && m->pool.at[m->sets[state].first].node == REST; /* the first of sorted ones */
}

bool pl_matcher_is_alive(const pl_matcher *m, int32_t state) {
    return m->sets[state].count > pl_matcher_is_open(m, state);
}

/* The state, or frame, in which of the frames below only the topmost `n_frames` are kept; -1 when there is no memory. */
static int32_t outline(pl_matcher *m, int32_t id, int32_t n_frames, pl_error *err) {
    const int64_t begin = m->group.n;
    for (int32_t i = 0; i < m->sets[id].count; i++) {
        pl_pair p = m->pool.at[m->sets[id].first + i];
        if (p.frame != NO_FRAME) {
            const bool kept = n_frames > 0 && m->sets[p.frame].count <= MANY_CALLERS;
            p.frame = kept ? outline(m, p.frame, n_frames - 1, err) : REST_FRAME;
            if (p.frame < 0) {
                return -1;
            }
        }
        if (push(&m->group, p, err) != 0) {
            return -1;
        }
    }
    const int32_t outlined = intern_unsorted(m, m->group.at + begin, m->group.n - begin, err);
    m->group.n = begin;
    return outlined;
}

int32_t pl_matcher_outline(pl_matcher *m, int32_t state, pl_error *err) {
    m->group.n = 0;
    return outline(m, state, OUTLINED_FRAMES, err);
}

/* Whether many ASCII characters are taken by the same pairs, so that it pays to look where they lead; -1 when there is no
 * memory. */
static int32_t takes_many_alike(pl_matcher *m, int32_t state, pl_error *err) {
    pl_ascii seen = {{0, 0}};
    for (int c = 0; c < 128; c++) {
        if (pl_ascii_has(&seen, (uint8_t)c)) {
            continue;
        }
        pl_ascii alike;
        if (take_ascii(m, state, (uint8_t)c, &alike, err) != 0) {
            return -1;
        }
        const int n = __builtin_popcountll(alike.bits[0]) + __builtin_popcountll(alike.bits[1]);
        if (m->work.n > 0 && n >= MANY_ALIKE) {
            return 1;
        }
        seen.bits[0] |= alike.bits[0];
        seen.bits[1] |= alike.bits[1];
    }
    return 0;
}

/* The state to which the largest number of ASCII characters leads, DEAD if it is not large. -1 when there is no memory. */
static int32_t common_move(pl_matcher *m, int32_t state, pl_error *err) {
    const int32_t many = takes_many_alike(m, state, err);
    if (many <= 0) {
        return many < 0 ? -1 : PL_DEAD;
    }
    int32_t candidate = PL_DEAD, votes = 0; /* the majority vote of Boyer and Moore, among those that may come at all */
    for (int c = 0; c < 128; c++) {
        const int32_t next = move_ascii(m, state, (uint8_t)c, err);
        if (next < 0) {
            return -1;
        }
        if (next != PL_DEAD) {
            candidate = votes == 0 ? next : candidate;
            votes += next == candidate ? 1 : -1;
        }
    }
    return candidate;
}

/* Whether all characters that are not ASCII lead to one state; -1 when there is no memory. */
static int32_t others_lead_to(pl_matcher *m, int32_t state, int32_t onward, pl_error *err) {
    const int32_t first = pl_grammar_class(m->g, 128);
    bool all = m->g->n_classes - first <= MANY_CLASSES;
    for (int32_t class = first; class < m->g->n_classes && all; class++) {
        if (m->g->bounds[class] >= 0xD800 && m->g->bounds[class] < 0xE000) {
            continue; /* no character */
        }
        const int32_t next = move_other(m, state, class, err);
        if (next < 0) {
            return -1;
        }
        all = next == onward;
    }
    return all;
}

/* The groups of which a character may come. */
static uint64_t open_groups(const pl_matcher *m, int32_t state) {
    pl_ascii any = {{0, 0}};
    for (int32_t i = 0; i < m->sets[state].count; i++) {
        const pl_pair p = m->pool.at[m->sets[state].first + i];
        if (p.node >= 0) {
            any.bits[0] |= m->g->set_ascii[m->g->nodes[p.node].argument].bits[0];
            any.bits[1] |= m->g->set_ascii[m->g->nodes[p.node].argument].bits[1];
        }
    }
    uint64_t groups = may_come(m, state, 128, LAST_CODE_POINT) ? PL_GROUP_OTHERS : 0;
    for (int c = 0; c < 128; c++) {
        groups |= pl_ascii_has(&any, (uint8_t)c) ? (uint64_t)1 << pl_trie_group((uint8_t)c) : 0;
    }
    return groups;
}

/* The row of a state, with what leads onward; NULL when there is no memory. */
static const pl_row *survey(pl_matcher *m, int32_t state, pl_error *err) {
    const pl_row *known = row_of(m, state, err);
    if (!known || known->onward != PL_UNKNOWN) {
        return known;
    }
    const int32_t onward = common_move(m, state, err);
    const int32_t others = onward <= PL_DEAD ? onward : others_lead_to(m, state, onward, err);
    if (others < 0) {
        return NULL;
    }
    pl_row *r = &m->rows[m->sets[state].row];
    r->onward = onward;
    r->uniform = onward == PL_DEAD ? 0 : ~PL_GROUP_BROKEN & (others ? ~(uint64_t)0 : ~PL_GROUP_OTHERS);
    for (int c = 0; c < 128 && onward != PL_DEAD; c++) {
        r->uniform &= r->next[c] == onward ? ~(uint64_t)0 : ~((uint64_t)1 << pl_trie_group((uint8_t)c));
    }
    return r;
}

static int64_t memory_in_use(const pl_matcher *m) {
    return m->pool.n * (int64_t)sizeof *m->pool.at + m->n_sets * (int64_t)sizeof *m->sets +
           m->n_rows * (int64_t)sizeof *m->rows + m->n_moves * (int64_t)sizeof *m->moves;
}

/* Finds the stretch of a state; less of it where to look further would take too much memory. */
static int32_t find_stretch(pl_matcher *m, int32_t state, pl_error *err) {
    pl_stretch stretch = {.levels = 0};
    for (int32_t at = state;; stretch.levels++) {
        const pl_row *r = survey(m, at, err);
        if (!r) {
            return -1;
        }
        stretch.groups = at == state ? r->uniform : stretch.groups;
        if (stretch.levels == MANY_LEVELS || memory_in_use(m) > m->memory || pl_matcher_is_open(m, at)) {
            stretch.stop = ~(uint64_t)0;
            break;
        }
        if (stretch.groups & ~r->uniform || stretch.groups == 0) {
            stretch.stop = open_groups(m, at);
            break;
        }
        if (r->onward == at) {
            stretch.levels = PL_ENDLESS;
            break;
        }
        at = r->onward;
    }
    m->rows[m->sets[state].row].stretch = stretch;
    return 0;
}

int32_t pl_matcher_stretch(pl_matcher *m, const pl_cursor *c, bool wanted, pl_stretch *stretch, pl_error *err) {
    *stretch = (pl_stretch){.levels = 0};
    int32_t state = c->state, row = m->sets[state].row;
    if (c->partial.missing > 0) { /* however the character is completed, it leads to one state; or it is not known to */
        if (row == PL_UNKNOWN || m->rows[row].onward == PL_UNKNOWN || !(m->rows[row].uniform & PL_GROUP_OTHERS)) {
            return 0;
        }
        state = m->rows[row].onward;
        row = m->sets[state].row;
    }
    const bool known = row != PL_UNKNOWN && m->rows[row].stretch.levels != PL_UNKNOWN;
    if (!known && (!wanted || find_stretch(m, state, err) != 0)) {
        return wanted ? -1 : 0;
    }
    *stretch = m->rows[m->sets[state].row].stretch;
    return 0;
}

/* ---- bounded memory ----------------------------------------------------------------------------------------------- */

/* Drops the sets that the first `n_path` cursors do not need, and all remembered moves. Pairs speak of older sets only,
 * and numbers keep their order: sorted pairs stay sorted. */
static int32_t collect(pl_matcher *m, int64_t n_path, pl_error *err) {
    int32_t *moved = malloc((size_t)m->n_sets * sizeof *moved); /* new numbers; until then 1 marks what is needed */
    if (!moved) {
        return pl_fail(err, "out of memory for a grammar");
    }
    pl_masks_forget(m);
    memset(moved, 0, (size_t)m->n_sets * sizeof *moved);
    moved[PL_DEAD] = moved[REST_FRAME] = 1;
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
        pl_set s = {n_pairs, m->sets[id].count, .row = PL_UNKNOWN, .mask = PL_UNKNOWN};
        for (int32_t i = 0; i < s.count; i++) {
            pl_pair p = m->pool.at[m->sets[id].first + i];
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
        m->moves[i].state = PL_UNKNOWN;
    }
    return rebuild_table(m, m->table_size, err);
}

int32_t pl_matcher_bound_memory(pl_matcher *m, int64_t n_path, pl_error *err) {
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
        m->moves[i].state = PL_UNKNOWN;
    }
    const pl_pair rest = {REST, NO_FRAME};
    if (pl_grow(&m->path, &m->path_room, 2, sizeof *m->path, err) == 0 && rebuild_table(m, 256, err) == 0 &&
        pl_grow(&m->pool.at, &m->pool.room, 64, sizeof *m->pool.at, err) == 0 &&
        pl_grow(&m->out.at, &m->out.room, 64, sizeof *m->out.at, err) == 0 && intern(m, &rest, 0, err) == PL_DEAD &&
        intern(m, &rest, 1, err) == REST_FRAME) {
        m->path[0] = (pl_cursor){.state = first_state(m, err)};
        if (m->path[0].state >= 0) {
            return m;
        }
    }
    pl_matcher_free(m);
    return NULL;
}

PL_API void pl_matcher_free(pl_matcher *m) {
    if (m) {
        pl_masks_free(m);
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
        pl_free(m);
    }
}

PL_API int32_t pl_matcher_allows(pl_matcher *m, const uint8_t *bytes, int64_t n_bytes, pl_error *err) {
    m->path[1] = m->path[0];
    int32_t fine = 1;
    for (int64_t i = 0; i < n_bytes && fine == 1; i++) {
        fine = pl_matcher_bound_memory(m, 2, err) == 0 ? pl_matcher_advance(m, &m->path[1], bytes[i], err) : -1;
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
    const pl_set *s = &m->sets[m->path[0].state];
    return m->path[0].partial.missing == 0 && s->count > 0 && m->pool.at[s->first].node == TEXT_END;
}

PL_API int32_t pl_matcher_must_end(const pl_matcher *m) {
    return pl_matcher_can_end(m) && m->sets[m->path[0].state].count == 1;
}
