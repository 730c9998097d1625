/*
 * grammar.h - what the compiled grammar (grammar.c), the tree of tokens (trie.c) and the matcher (matcher.c) share.
 */
#ifndef PL_GRAMMAR_H
#define PL_GRAMMAR_H

#include "common.h"

/* A set of ASCII characters: character c is bit c % 64 of bits[c / 64]. */
typedef struct pl_ascii {
    uint64_t bits[2];
} pl_ascii;

static inline bool pl_ascii_has(const pl_ascii *set, uint8_t character) {
    return set->bits[character / 64] >> character % 64 & 1;
}

/*
 * Characters are told apart only as far as the grammar does: code points that belong to the same sets are of one class.
 * Classes are intervals, numbered in ascending order. ASCII and the surrogates, which are no characters, are never in
 * one class with others.
 */
struct pl_grammar {
    pl_grammar_node *nodes;
    int32_t *starts;
    int32_t n_nodes, n_rules, root;
    uint8_t *nullable; /* of rules: matches the empty text */
    int32_t *rank;     /* of rules: ranks grow from a rule to those that it can begin with */
    int32_t *ranked;   /* the rule of each rank */
    int32_t *bounds;   /* class i is the code points bounds[i] <= c < bounds[i + 1] */
    int32_t n_classes;
    int32_t ascii[128];  /* classes of ASCII characters */
    int32_t *set_ranges; /* pairs: first and last class */
    int32_t *set_ends;   /* set i is pairs set_ends[i] <= j < set_ends[i + 1] */
    pl_ascii *set_ascii; /* the ASCII characters of each set */
};

int32_t pl_grammar_class(const pl_grammar *g, int32_t code_point);
/* Whether a set has a class among first..last. */
bool pl_grammar_set_meets(const pl_grammar *g, int32_t set, int32_t first, int32_t last);

/* A character of which some bytes are still missing; between characters none are. */
typedef struct pl_partial {
    int32_t value; /* the bits that have come */
    uint8_t missing, length;
} pl_partial;

/* Takes the next byte. False where no character goes on (or begins) so; overlong forms and surrogates are none. */
bool pl_partial_push(pl_partial *p, uint8_t byte);
/* The characters that may be meant: first..last. */
void pl_partial_range(const pl_partial *p, int32_t *first, int32_t *last);

/*
 * The tree, level by level: the children of a node are neighbours, from `children` up to those of the next node. Tokens
 * are in the order of their bytes; those of a subtree are neighbours, and those that end in a node come first among
 * them. Node 0 is the root, and a last node behind the others marks the end.
 */
typedef struct pl_trie_node {
    uint64_t groups; /* of the characters on the way from the parent into the whole subtree, as bits */
    int32_t parent, children;
    int32_t first;  /* first token of the subtree, in order */
    uint8_t height; /* characters that begin on the longest way from the parent into the subtree */
    uint8_t byte;
} pl_trie_node;

struct pl_trie {
    pl_trie_node *nodes;
    int32_t n_nodes; /* without the last one */
    int32_t *order;       /* token numbers */
    uint8_t *chars;       /* of each token: characters that begin in it, at least 1 */
    uint8_t *order_chars; /* the same of each token in order */
    int32_t n_tokens;
    int32_t depth; /* of the deepest node */
};

enum { PL_MANY_CHARS = 255 }; /* and more, in `height` and `chars` */

/* Bits of pl_trie_node.groups. Below these are groups of ASCII characters. */
#define PL_GROUP_OTHERS ((uint64_t)1 << 62) /* not ASCII */
#define PL_GROUP_BROKEN ((uint64_t)1 << 63) /* not UTF-8 when read from the root */

/* The group, 0..61, of an ASCII character. Few grammars tell apart characters of one group. */
int pl_trie_group(uint8_t character);

/* Makes room for `needed` elements in a growing array (from malloc). */
int32_t pl_grow(void *array, int64_t *room, int64_t needed, size_t element, pl_error *err);

#endif
