/* grammar.c - compiled grammars: checks the network, and finds out what the matcher wants to know of rules and
 * characters. */
#include "grammar.h"

#include <stdlib.h>

enum { END_OF_CODE_POINTS = 0x110000, FIRST_SURROGATE = 0xD800, AFTER_SURROGATES = 0xE000, NONE = -1 };

int32_t pl_grow(void *array, int64_t *room, int64_t needed, size_t element, pl_error *err) {
    if (needed <= *room) {
        return 0;
    }
    const int64_t wanted = PL_MAX(needed, *room * 2);
    void *old, *bigger;
    memcpy(&old, array, sizeof old);
    bigger = realloc(old, (size_t)wanted * element);
    if (!bigger) {
        return pl_fail(err, "out of memory: %lld elements were asked for", (long long)wanted);
    }
    memcpy(array, &bigger, sizeof bigger);
    *room = wanted;
    return 0;
}

/* ---- characters --------------------------------------------------------------------------------------------------- */

bool pl_partial_push(pl_partial *p, uint8_t byte) {
    if (p->missing == 0) {
        p->length = byte < 0x80 ? 1 : byte >= 0xC2 && byte <= 0xDF ? 2 : byte >= 0xE0 && byte <= 0xEF ? 3 : 4;
        if (p->length == 4 && (byte < 0xF0 || byte > 0xF4)) {
            return false;
        }
        p->missing = p->length - 1;
        p->value = p->length == 1 ? byte : byte & (0x7f >> p->length);
    } else {
        if ((byte & 0xC0) != 0x80) {
            return false;
        }
        p->missing--;
        p->value = p->value << 6 | (byte & 0x3f);
    }
    int32_t first, last;
    pl_partial_range(p, &first, &last);
    return first <= last;
}

void pl_partial_range(const pl_partial *p, int32_t *first, int32_t *last) {
    static const int32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000}; /* of each length: anything less is overlong */
    const int shift = 6 * p->missing;
    *first = PL_MAX(p->value << shift, smallest[p->length]);
    *last = PL_MIN((p->value << shift) + (1 << shift) - 1, END_OF_CODE_POINTS - 1);
    if (*first >= FIRST_SURROGATE && *first < AFTER_SURROGATES) {
        *first = AFTER_SURROGATES;
    }
    if (*last >= FIRST_SURROGATE && *last < AFTER_SURROGATES) {
        *last = FIRST_SURROGATE - 1;
    }
}

int32_t pl_grammar_class(const pl_grammar *g, int32_t code_point) {
    if (code_point < 128) {
        return g->ascii[code_point];
    }
    int32_t low = 0, high = g->n_classes; /* bounds[low] <= code_point < bounds[high] */
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        *(g->bounds[middle] <= code_point ? &low : &high) = middle;
    }
    return low;
}

bool pl_grammar_set_meets(const pl_grammar *g, int32_t set, int32_t first, int32_t last) {
    int32_t low = g->set_ends[set], high = g->set_ends[set + 1];
    while (low < high) { /* the first range that does not end before `first` */
        const int32_t middle = low + (high - low) / 2;
        if (g->set_ranges[2 * middle + 1] < first) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < g->set_ends[set + 1] && g->set_ranges[2 * low] <= last;
}

static int ascending(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static int32_t make_classes(pl_grammar *g, const int32_t *ranges, const int32_t *ends, int32_t n_sets, pl_error *err) {
    if (n_sets < 0 || ends[0] != 0) {
        return pl_fail(err, "a grammar's sets are numbered wrongly");
    }
    for (int32_t set = 0; set < n_sets; set++) {
        if (ends[set + 1] < ends[set] || ends[set + 1] > (1 << 28)) {
            return pl_fail(err, "a grammar's set %d ends before it begins, or is too large", set);
        }
        int32_t previous = -1;
        for (int32_t i = ends[set]; i < ends[set + 1]; i++) {
            if (ranges[2 * i] <= previous || ranges[2 * i + 1] < ranges[2 * i] || ranges[2 * i + 1] >= END_OF_CODE_POINTS) {
                return pl_fail(err, "a grammar's set %d has ranges that are not ascending code points", set);
            }
            previous = ranges[2 * i + 1];
        }
    }
    const int32_t n_ranges = ends[n_sets];
    g->set_ends = pl_alloc(((size_t)n_sets + 1) * sizeof *g->set_ends, err);
    g->set_ranges = pl_alloc(2 * (size_t)n_ranges * sizeof *g->set_ranges, err);
    g->set_ascii = pl_alloc((size_t)n_sets * sizeof *g->set_ascii, err);
    g->bounds = pl_alloc((2 * (size_t)n_ranges + 5) * sizeof *g->bounds, err);
    if (!g->set_ends || !g->set_ranges || !g->set_ascii || !g->bounds) {
        return -1;
    }
    int32_t n = 0;
    g->bounds[n++] = 0;
    g->bounds[n++] = 128;
    g->bounds[n++] = FIRST_SURROGATE;
    g->bounds[n++] = AFTER_SURROGATES;
    g->bounds[n++] = END_OF_CODE_POINTS;
    for (int32_t i = 0; i < n_ranges; i++) {
        g->bounds[n++] = ranges[2 * i];
        g->bounds[n++] = ranges[2 * i + 1] + 1;
    }
    qsort(g->bounds, (size_t)n, sizeof *g->bounds, ascending);
    int32_t unique = 1;
    for (int32_t i = 1; i < n; i++) {
        if (g->bounds[i] != g->bounds[unique - 1]) {
            g->bounds[unique++] = g->bounds[i];
        }
    }
    g->n_classes = unique - 1;
    for (int32_t c = 0, class = 0; c < 128; c++) {
        class += c >= g->bounds[class + 1];
        g->ascii[c] = class;
    }
    memcpy(g->set_ends, ends, ((size_t)n_sets + 1) * sizeof *ends);
    for (int32_t i = 0; i < 2 * n_ranges; i++) {
        g->set_ranges[i] = pl_grammar_class(g, ranges[i]);
    }
    for (int32_t set = 0; set < n_sets; set++) {
        for (int32_t i = ends[set]; i < ends[set + 1]; i++) {
            for (int32_t c = ranges[2 * i]; c <= PL_MIN(ranges[2 * i + 1], 127); c++) {
                g->set_ascii[set].bits[c / 64] |= (uint64_t)1 << c % 64;
            }
        }
    }
    return 0;
}

/* ---- rules -------------------------------------------------------------------------------------------------------- */

static int32_t check_node(const pl_grammar *g, int32_t i, int32_t n_sets, pl_error *err) {
    const pl_grammar_node *node = &g->nodes[i];
    const bool has_next = node->next >= 0 && node->next < g->n_nodes;
    bool fine = false;
    switch (node->kind) {
    case PL_GRAMMAR_CHARS:
        fine = has_next && node->argument >= 0 && node->argument < n_sets;
        break;
    case PL_GRAMMAR_CALL:
        fine = has_next && node->argument >= 0 && node->argument < g->n_rules;
        break;
    case PL_GRAMMAR_FORK:
        fine = has_next && node->argument >= NONE && node->argument < g->n_nodes;
        break;
    case PL_GRAMMAR_END:
        fine = true;
        break;
    }
    return fine ? 0 : pl_fail(err, "a grammar's node %d is of no known kind or leads nowhere", i);
}

/* Checks all nodes that can be reached, and finds the rule of each. `stack` has room for every node. */
static int32_t find_owners(const pl_grammar *g, int32_t n_sets, int32_t *owner, int32_t *stack, pl_error *err) {
    for (int32_t i = 0; i < g->n_nodes; i++) {
        owner[i] = NONE;
    }
    for (int32_t rule = 0; rule < g->n_rules; rule++) {
        if (g->starts[rule] < 0 || g->starts[rule] >= g->n_nodes) {
            return pl_fail(err, "a grammar's rule %d begins nowhere", rule);
        }
        if (owner[g->starts[rule]] != NONE) {
            return pl_fail(err, "a grammar's rules %d and %d share nodes", rule, owner[g->starts[rule]]);
        }
        int32_t n = 0;
        owner[g->starts[rule]] = rule;
        stack[n++] = g->starts[rule];
        while (n > 0) {
            const int32_t i = stack[--n];
            if (check_node(g, i, n_sets, err) != 0) {
                return -1;
            }
            const pl_grammar_node *node = &g->nodes[i];
            const int32_t successors[2] = {node->kind == PL_GRAMMAR_END ? NONE : node->next,
                                           node->kind == PL_GRAMMAR_FORK ? node->argument : NONE};
            for (int j = 0; j < 2; j++) {
                if (successors[j] == NONE || owner[successors[j]] == rule) {
                    continue;
                }
                if (owner[successors[j]] != NONE) {
                    return pl_fail(err, "a grammar's rules %d and %d share nodes", rule, owner[successors[j]]);
                }
                owner[successors[j]] = rule;
                stack[n++] = successors[j];
            }
        }
    }
    return 0;
}

/* Which rules match the empty text, and which nodes can be reached from the start of their rule without a character:
 * forks pass, calls pass when their rule is nullable, and those of rules not yet known to be wait for it in a list. */
static void find_nullable(pl_grammar *g, const int32_t *owner, uint8_t *reached, int32_t *waiting, int32_t *next_waiting,
                          int32_t *stack) {
    int32_t n = 0;
    for (int32_t rule = 0; rule < g->n_rules; rule++) {
        waiting[rule] = NONE;
        reached[g->starts[rule]] = 1;
        stack[n++] = g->starts[rule];
    }
    while (n > 0) {
        const int32_t i = stack[--n];
        const pl_grammar_node *node = &g->nodes[i];
        int32_t onward[2] = {NONE, NONE};
        if (node->kind == PL_GRAMMAR_FORK) {
            onward[0] = node->next;
            onward[1] = node->argument;
        } else if (node->kind == PL_GRAMMAR_CALL && g->nullable[node->argument]) {
            onward[0] = node->next;
        } else if (node->kind == PL_GRAMMAR_CALL) {
            next_waiting[i] = waiting[node->argument];
            waiting[node->argument] = i;
        } else if (node->kind == PL_GRAMMAR_END && !g->nullable[owner[i]]) {
            g->nullable[owner[i]] = 1;
            for (int32_t w = waiting[owner[i]]; w != NONE; w = next_waiting[w]) {
                if (!reached[g->nodes[w].next]) {
                    reached[g->nodes[w].next] = 1;
                    stack[n++] = g->nodes[w].next;
                }
            }
        }
        for (int j = 0; j < 2; j++) {
            if (onward[j] != NONE && !reached[onward[j]]) {
                reached[onward[j]] = 1;
                stack[n++] = onward[j];
            }
        }
    }
}

/* Orders the rules so that each comes before those that it can begin with (Kahn's algorithm). Where that cannot be, a
 * rule can begin with itself. */
static int32_t rank_rules(pl_grammar *g, const int32_t *owner, const uint8_t *reached, int32_t *n_callers, int32_t *calls,
                          int32_t *next_call, int32_t *left_recursive, pl_error *err) {
    for (int32_t rule = 0; rule < g->n_rules; rule++) {
        calls[rule] = NONE;
        n_callers[rule] = 0;
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        if (reached[i] && g->nodes[i].kind == PL_GRAMMAR_CALL) {
            next_call[i] = calls[owner[i]];
            calls[owner[i]] = i;
            n_callers[g->nodes[i].argument]++;
        }
    }
    int32_t n = 0;
    for (int32_t rule = 0; rule < g->n_rules; rule++) {
        if (n_callers[rule] == 0) {
            g->ranked[n++] = rule;
        }
    }
    for (int32_t rank = 0; rank < n; rank++) {
        g->rank[g->ranked[rank]] = rank;
        for (int32_t i = calls[g->ranked[rank]]; i != NONE; i = next_call[i]) {
            if (--n_callers[g->nodes[i].argument] == 0) {
                g->ranked[n++] = g->nodes[i].argument;
            }
        }
    }
    if (n == g->n_rules) {
        return 0;
    }
    /* Every rule left has a caller that is left: who goes from callee to caller for long enough goes in a circle. */
    int32_t *caller = g->rank;
    for (int32_t rule = 0; rule < g->n_rules; rule++) {
        for (int32_t i = n_callers[rule] > 0 ? calls[rule] : NONE; i != NONE; i = next_call[i]) {
            caller[g->nodes[i].argument] = rule;
        }
    }
    int32_t rule = 0;
    while (n_callers[rule] == 0) {
        rule++;
    }
    for (int32_t i = 0; i < g->n_rules; i++) {
        rule = caller[rule];
    }
    *left_recursive = rule;
    return pl_fail(err, "a grammar's rule %d is left-recursive", rule);
}

static int32_t analyse(pl_grammar *g, int32_t n_sets, int32_t *left_recursive, pl_error *err) {
    const size_t nodes = (size_t)g->n_nodes, rules = (size_t)g->n_rules;
    int32_t *scratch = pl_alloc((3 * nodes + 2 * rules) * sizeof *scratch, err);
    uint8_t *reached = pl_alloc(nodes, err);
    int32_t status = -1;
    if (scratch && reached) {
        int32_t *owner = scratch, *stack = owner + nodes, *links = stack + nodes, *lists = links + nodes;
        status = find_owners(g, n_sets, owner, stack, err);
        if (status == 0) {
            find_nullable(g, owner, reached, lists, links, stack);
            status = rank_rules(g, owner, reached, lists + rules, lists, links, left_recursive, err);
        }
    }
    pl_free(scratch);
    pl_free(reached);
    return status;
}

/* ---- the object --------------------------------------------------------------------------------------------------- */

PL_API pl_grammar *pl_grammar_new(const pl_grammar_node *nodes, int32_t n_nodes, const int32_t *starts, int32_t n_rules,
                                  int32_t root, const int32_t *ranges, const int32_t *ends, int32_t n_sets,
                                  int32_t *left_recursive, pl_error *err) {
    if (n_nodes < 1 || n_rules < 1 || n_rules > n_nodes || root < 0 || root >= n_rules) {
        pl_fail(err, "a grammar of %d nodes and %d rules cannot begin with rule %d", n_nodes, n_rules, root);
        return NULL;
    }
    pl_grammar *g = pl_alloc(sizeof *g, err);
    if (!g) {
        return NULL;
    }
    g->n_nodes = n_nodes;
    g->n_rules = n_rules;
    g->root = root;
    g->nodes = pl_alloc((size_t)n_nodes * sizeof *g->nodes, err);
    g->starts = pl_alloc((size_t)n_rules * sizeof *g->starts, err);
    g->nullable = pl_alloc((size_t)n_rules, err);
    g->rank = pl_alloc((size_t)n_rules * sizeof *g->rank, err);
    g->ranked = pl_alloc((size_t)n_rules * sizeof *g->ranked, err);
    if (g->nodes && g->starts && g->nullable && g->rank && g->ranked) {
        memcpy(g->nodes, nodes, (size_t)n_nodes * sizeof *nodes);
        memcpy(g->starts, starts, (size_t)n_rules * sizeof *starts);
        if (make_classes(g, ranges, ends, n_sets, err) == 0 && analyse(g, n_sets, left_recursive, err) == 0) {
            return g;
        }
    }
    pl_grammar_free(g);
    return NULL;
}

PL_API void pl_grammar_free(pl_grammar *g) {
    if (g) {
        pl_free(g->nodes);
        pl_free(g->starts);
        pl_free(g->nullable);
        pl_free(g->rank);
        pl_free(g->ranked);
        pl_free(g->bounds);
        pl_free(g->set_ranges);
        pl_free(g->set_ends);
        pl_free(g->set_ascii);
        pl_free(g);
    }
}
