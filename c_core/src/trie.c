/* trie.c - the tokens of a vocabulary as a tree of their bytes. */
#include "grammar.h"

#include <stdlib.h>

/* A token with its first bytes as a number, so that most comparisons need not look at the text. */
typedef struct entry {
    uint64_t prefix;
    int32_t token;
} entry;

typedef struct texts {
    const uint8_t *data;
    const int32_t *offsets;
} texts;

static inline const uint8_t *text_of(const texts *t, int32_t token) { return t->data + t->offsets[token]; }
static inline int32_t size_of(const texts *t, int32_t token) { return t->offsets[token + 1] - t->offsets[token]; }

static bool comes_first(const texts *t, entry a, entry b) {
    if (a.prefix != b.prefix) {
        return a.prefix < b.prefix;
    }
    const int32_t n = size_of(t, a.token), m = size_of(t, b.token);
    const int order = memcmp(text_of(t, a.token), text_of(t, b.token), (size_t)PL_MIN(n, m));
    return order != 0 ? order < 0 : n != m ? n < m : a.token < b.token;
}

/* Merge sort from the bottom up; both arrays have n entries. The sorted one is returned. */
static entry *sort_entries(const texts *t, entry *from, entry *to, int64_t n) {
    for (int64_t run = 1; run < n; run *= 2) {
        for (int64_t start = 0; start < n; start += 2 * run) {
            const int64_t middle = PL_MIN(start + run, n), end = PL_MIN(start + 2 * run, n);
            int64_t i = start, j = middle;
            for (int64_t k = start; k < end; k++) {
                const bool left = i < middle && (j >= end || comes_first(t, from[i], from[j]));
                to[k] = left ? from[i++] : from[j++];
            }
        }
        entry *swapped = from;
        from = to;
        to = swapped;
    }
    return from;
}

static int32_t sort_tokens(pl_trie *trie, const texts *t, pl_error *err) {
    const size_t n = (size_t)trie->n_tokens;
    entry *entries = pl_alloc(2 * n * sizeof *entries, err);
    if (!entries) {
        return -1;
    }
    for (int32_t token = 0; token < trie->n_tokens; token++) {
        entries[token].token = token;
        for (int32_t i = 0; i < 8; i++) {
            entries[token].prefix = entries[token].prefix << 8 | (i < size_of(t, token) ? text_of(t, token)[i] : 0);
        }
    }
    const entry *sorted = sort_entries(t, entries, entries + n, (int64_t)n);
    for (size_t i = 0; i < n; i++) {
        trie->order[i] = sorted[i].token;
    }
    pl_free(entries);
    return 0;
}

/* Bytes that token `i`, in order, shares with the one before it. */
static int32_t shared_bytes(const pl_trie *trie, const texts *t, int32_t i) {
    if (i == 0) {
        return 0;
    }
    const int32_t a = trie->order[i - 1], b = trie->order[i], n = PL_MIN(size_of(t, a), size_of(t, b));
    int32_t shared = 0;
    while (shared < n && text_of(t, a)[shared] == text_of(t, b)[shared]) {
        shared++;
    }
    return shared;
}

/* A node on the way to a token. */
typedef struct step {
    int32_t node;
    pl_partial partial;
    bool broken;
    uint8_t chars;
} step;

static inline bool begins_character(uint8_t byte) { return (byte & 0xC0) != 0x80; }

/* Adds the nodes. `free_node[d]` is the next free one at depth d; way[d] is the one that the last token went through. */
static void add_nodes(pl_trie *trie, const texts *t, int32_t *free_node, step *way) {
    way[0] = (step){0};
    for (int32_t i = 0; i < trie->n_tokens; i++) {
        const int32_t token = trie->order[i];
        for (int32_t depth = shared_bytes(trie, t, i) + 1; depth <= size_of(t, token); depth++) {
            const uint8_t byte = text_of(t, token)[depth - 1];
            step *s = &way[depth];
            *s = way[depth - 1];
            s->broken = s->broken || !pl_partial_push(&s->partial, byte);
            s->chars += begins_character(byte) && s->chars < PL_MANY_CHARS;
            s->node = free_node[depth]++;
            trie->nodes[s->node] = (pl_trie_node){
                .groups = byte < 0x80 ? (uint64_t)1 << pl_trie_group(byte) : PL_GROUP_OTHERS,
                .parent = way[depth - 1].node,
                .children = free_node[depth + 1],
                .first = i,
                .byte = byte,
            };
            trie->nodes[s->node].groups |= s->broken ? PL_GROUP_BROKEN : 0;
        }
        trie->chars[token] = trie->order_chars[i] = PL_MAX(way[size_of(t, token)].chars, 1);
    }
    trie->nodes[0].children = 1;
    trie->nodes[trie->n_nodes] = (pl_trie_node){.children = trie->n_nodes, .first = trie->n_tokens};
}

/* Tells every node what is in its subtree. */
static void look_below(pl_trie *trie) {
    for (int32_t i = trie->n_nodes - 1; i > 0; i--) { /* children come before their parents */
        pl_trie_node *node = &trie->nodes[i], *parent = &trie->nodes[node->parent];
        node->height += begins_character(node->byte) && node->height < PL_MANY_CHARS;
        parent->groups |= node->groups;
        parent->height = PL_MAX(parent->height, node->height);
    }
}

int pl_trie_group(uint8_t c) {
    enum { SPACE = 1, TAB, LINE_FEED, RETURN, ZERO, DIGIT, LOWER_HEX, LOWER, UPPER_HEX, UPPER, PUNCTUATION };
    switch (c) {
    case ' ':
        return SPACE;
    case '\t':
        return TAB;
    case '\n':
        return LINE_FEED;
    case '\r':
        return RETURN;
    case '0':
        return ZERO;
    }
    if (c < ' ' || c == 0x7f) {
        return 0;
    }
    if (c >= '1' && c <= '9') {
        return DIGIT;
    }
    if (c >= 'a' && c <= 'z') {
        return c <= 'f' ? LOWER_HEX : LOWER;
    }
    if (c >= 'A' && c <= 'Z') {
        return c <= 'F' ? UPPER_HEX : UPPER;
    }
    const int rank = c < '0' ? c - '!' : c < 'A' ? c - ':' + 15 : c < 'a' ? c - '[' + 22 : c - '{' + 28;
    return PUNCTUATION + rank; /* a group for each of the 32 */
}

/* Finds where the nodes of each depth begin. */
static int32_t place_levels(pl_trie *trie, const texts *t, int32_t *begins, pl_error *err) {
    for (int32_t i = 0; i < trie->n_tokens; i++) {
        for (int32_t depth = shared_bytes(trie, t, i) + 1; depth <= size_of(t, trie->order[i]); depth++) {
            begins[depth + 1]++;
        }
    }
    int64_t n_nodes = 1;
    for (int32_t depth = 1; depth <= trie->depth + 1; depth++) {
        n_nodes += begins[depth];
        if (n_nodes >= INT32_MAX) {
            return pl_fail(err, "the tokens are too long for a tree");
        }
        begins[depth] = (int32_t)n_nodes;
    }
    trie->n_nodes = (int32_t)n_nodes;
    return 0;
}

static int32_t build(pl_trie *trie, const texts *t, pl_error *err) {
    trie->order = pl_alloc((size_t)trie->n_tokens * sizeof *trie->order, err);
    trie->chars = pl_alloc((size_t)trie->n_tokens, err);
    trie->order_chars = pl_alloc((size_t)trie->n_tokens, err);
    if (!trie->order || !trie->chars || !trie->order_chars || sort_tokens(trie, t, err) != 0) {
        return -1;
    }
    for (int32_t token = 0; token < trie->n_tokens; token++) {
        trie->depth = PL_MAX(trie->depth, size_of(t, token));
    }
    const size_t depths = (size_t)trie->depth + 2;
    int32_t *begins = pl_alloc(depths * sizeof *begins, err);
    step *way = pl_alloc(depths * sizeof *way, err);
    int32_t status = begins && way ? place_levels(trie, t, begins, err) : -1;
    if (status == 0) {
        trie->nodes = pl_alloc(((size_t)trie->n_nodes + 1) * sizeof *trie->nodes, err);
        status = trie->nodes ? 0 : -1;
    }
    if (status == 0) {
        add_nodes(trie, t, begins, way);
        look_below(trie);
    }
    pl_free(begins);
    pl_free(way);
    return status;
}

PL_API pl_trie *pl_trie_new(const uint8_t *data, int64_t n_data, const int32_t *offsets, int32_t n_tokens, pl_error *err) {
    if (n_tokens < 0 || offsets[0] < 0) {
        pl_fail(err, "a vocabulary of %d tokens", n_tokens);
        return NULL;
    }
    for (int32_t i = 0; i < n_tokens; i++) {
        if (offsets[i + 1] < offsets[i] || offsets[i + 1] > n_data) {
            pl_fail(err, "token %d reaches beyond the texts", i);
            return NULL;
        }
    }
    pl_trie *trie = pl_alloc(sizeof *trie, err);
    if (!trie) {
        return NULL;
    }
    trie->n_tokens = n_tokens;
    const texts t = {data, offsets};
    if (build(trie, &t, err) != 0) {
        pl_trie_free(trie);
        return NULL;
    }
    return trie;
}

PL_API void pl_trie_free(pl_trie *trie) {
    if (trie) {
        pl_free(trie->nodes);
        pl_free(trie->order);
        pl_free(trie->chars);
        pl_free(trie->order_chars);
        pl_free(trie);
    }
}
