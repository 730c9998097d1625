/*
 * masks.c - which tokens of a vocabulary may come next, found out for all of them at once.
 *
 * A walk over the tree of tokens takes a byte for all tokens that share it, leaves subtrees as soon as nothing in them
 * can come, and passes over subtrees of which it is plain from the groups of their characters what may come.
 *
 * It starts not from the state where the text stands but from its outline, which leaves out what lies deep in the stack:
 * so one mask serves many states. A token that goes on so far that this matters (closing more brackets than the outline
 * knows of) stays open, and is tried in the state itself each time.
 */
#include <math.h>
#include <stdlib.h>

#include "matcher.h"

enum {
    MANY_TOKENS = 64, /* from so many on it pays to find out a state's stretch */
    KEPT_TOKENS = 1 << 20,
    NO_LIMIT = PL_MANY_CHARS,
};

static inline int32_t add(pl_list *list, int32_t value, pl_error *err) {
    if (list->n == list->room && pl_grow(&list->at, &list->room, list->n + 64, sizeof *list->at, err) != 0) {
        return -1;
    }
    list->at[list->n++] = value;
    return 0;
}

/* ---- the walk -------------------------------------------------------------------------------------------------------- */

static int32_t allow(pl_masks *k, pl_span s, pl_error *err) {
    if (s.first == s.end) {
        return 0;
    }
    pl_span *last = k->n_spans > 0 ? &k->spans[k->n_spans - 1] : NULL;
    if (last && last->end == s.first && last->limit == s.limit) {
        last->end = s.end;
        return 0;
    }
    if (pl_grow(&k->spans, &k->spans_room, k->n_spans + 1, sizeof *k->spans, err) != 0) {
        return -1;
    }
    k->spans[k->n_spans++] = s;
    return 0;
}

/* Tells the children of a node, which path[level] stands at, from its descendants. */
static int32_t enter_node(pl_matcher *m, const pl_trie *trie, int32_t level, int32_t node, pl_branch from, pl_error *err) {
    pl_branch *b = &m->masks.branches[level];
    *b = from;
    b->child = trie->nodes[node].children;
    b->last = trie->nodes[node + 1].children;
    if (node == 0 && m->path[level].partial.missing > 0) {
        return 0; /* the groups are told from the beginning of a character */
    }
    return pl_matcher_stretch(m, &m->path[level], b->end - trie->nodes[node].first >= MANY_TOKENS, &b->stretch, err);
}

/* As far as how many characters the tokens of a child's subtree are allowed, if the stretch tells; 0 otherwise. */
static inline int32_t covered_limit(const pl_branch *b, const pl_trie_node *child) {
    const int32_t end = PL_MIN(b->chars, NO_LIMIT) + PL_MIN(b->stretch.levels, NO_LIMIT);
    const bool ends = end < NO_LIMIT && !b->open && !(child->groups & b->stretch.stop); /* for certain, and there */
    if (child->groups & ~b->stretch.groups || (!ends && child->height > b->stretch.levels)) {
        return 0;
    }
    return ends ? end : NO_LIMIT;
}

/* Walks the tree below what branches[1] and path[1] stand at, and collects what is allowed as spans. */
static int32_t walk(pl_matcher *m, const pl_trie *trie, pl_error *err) {
    pl_masks *k = &m->masks;
    for (int32_t level = 1; level > 0;) {
        pl_branch *b = &k->branches[level];
        if (b->child == b->last) {
            level--;
            continue;
        }
        const int32_t i = b->child++;
        const pl_trie_node *node = &trie->nodes[i];
        const int32_t end = b->child < b->last ? node[1].first : b->end;
        const int32_t limit = covered_limit(b, node);
        if (limit > 0) {
            if (allow(k, (pl_span){node->first, end, limit}, err) != 0) {
                return -1;
            }
            continue;
        }
        if (pl_matcher_bound_memory(m, level + 1, err) != 0) {
            return -1;
        }
        pl_cursor *c = &m->path[level + 1];
        *c = m->path[level];
        const int32_t fine = pl_matcher_advance(m, c, node->byte, err);
        if (fine < 0) {
            return -1;
        }
        const bool open = b->open || (fine && pl_matcher_is_open(m, c->state));
        if (!fine || !pl_matcher_is_alive(m, c->state)) {
            if (open && add(&k->open, i, err) != 0) {
                return -1;
            }
            continue;
        }
        const bool leaf = node->children == node[1].children;
        if (allow(k, (pl_span){node->first, leaf ? end : trie->nodes[node->children].first, NO_LIMIT}, err) != 0) {
            return -1;
        }
        if (!leaf) {
            const int32_t chars = b->chars + ((node->byte & 0xC0) != 0x80);
            level++;
            if (enter_node(m, trie, level, i, (pl_branch){.end = end, .chars = chars, .open = open}, err) != 0) {
                return -1;
            }
        }
    }
    return 0;
}

/* ---- masks ----------------------------------------------------------------------------------------------------------- */

void pl_masks_forget(pl_matcher *m) {
    for (int32_t i = 0; i < m->masks.n; i++) {
        free(m->masks.at[i].listed);
        m->sets[m->masks.at[i].state].mask = PL_UNKNOWN;
    }
    m->masks.n = 0;
    m->masks.n_listed = 0;
}

void pl_masks_free(pl_matcher *m) {
    for (int32_t i = 0; i < m->masks.n; i++) {
        free(m->masks.at[i].listed);
    }
    free(m->masks.branches);
    free(m->masks.spans);
    free(m->masks.open.at);
    free(m->masks.allowed.at);
    free(m->masks.banned.at);
    free(m->masks.tried.at);
    free(m->masks.values);
}

/* The limit that is right for most tokens. */
static int32_t common_limit(const pl_masks *k, int32_t n_tokens) {
    int64_t covered[NO_LIMIT + 1] = {0};
    covered[0] = n_tokens;
    for (int64_t i = 0; i < k->n_spans; i++) {
        covered[k->spans[i].limit] += k->spans[i].end - k->spans[i].first;
        covered[0] -= k->spans[i].end - k->spans[i].first;
    }
    int32_t best = 0;
    for (int32_t limit = 1; limit <= NO_LIMIT; limit++) {
        best = covered[limit] > covered[best] ? limit : best;
    }
    return best;
}

/* Adds the tokens first .. end - 1, in order, that begin more than `low` characters and at most `high`. */
static int32_t list_tokens(pl_list *list, const pl_trie *trie, int32_t first, int32_t end, int32_t low, int32_t high,
                           pl_error *err) {
    if (low >= high || first == end) {
        return 0;
    }
    if (pl_grow(&list->at, &list->room, list->n + end - first, sizeof *list->at, err) != 0) {
        return -1;
    }
    for (int32_t i = first; i < end; i++) {
        list->at[list->n] = trie->order[i];
        list->n += trie->order_chars[i] > low && trie->order_chars[i] <= high;
    }
    return 0;
}

/* Makes a mask of what a walk has collected. */
static int32_t make_mask(pl_masks *k, const pl_trie *trie, pl_mask *mask, pl_error *err) {
    const int32_t limit = mask->limit = common_limit(k, trie->n_tokens);
    k->allowed.n = k->banned.n = 0;
    int32_t before = 0;
    for (int64_t i = 0; i <= k->n_spans; i++) {
        const pl_span s = i < k->n_spans ? k->spans[i] : (pl_span){trie->n_tokens, trie->n_tokens, limit};
        if (list_tokens(&k->banned, trie, before, s.first, 0, limit, err) != 0 ||
            list_tokens(&k->banned, trie, s.first, s.end, s.limit, limit, err) != 0 ||
            list_tokens(&k->allowed, trie, s.first, s.end, limit, s.limit, err) != 0) {
            return -1;
        }
        before = s.end;
    }
    mask->n_allowed = (int32_t)k->allowed.n;
    mask->n_banned = (int32_t)k->banned.n;
    mask->n_open = (int32_t)k->open.n;
    mask->listed = malloc((size_t)(k->allowed.n + k->banned.n + k->open.n + 1) * sizeof *mask->listed);
    if (!mask->listed) {
        return pl_fail(err, "out of memory for a grammar");
    }
    int32_t *to = mask->listed;
    const pl_list *parts[] = {&k->allowed, &k->banned, &k->open};
    for (int i = 0; i < 3; to += parts[i++]->n) {
        if (parts[i]->n > 0) {
            memcpy(to, parts[i]->at, (size_t)parts[i]->n * sizeof *to);
        }
    }
    return 0;
}

/* The mask at path[0], as far as its outline tells; remembered or made. NULL when there is no memory. */
static const pl_mask *mask_here(pl_matcher *m, const pl_trie *trie, pl_error *err) {
    pl_masks *k = &m->masks;
    if (trie != k->trie) {
        pl_masks_forget(m);
        k->trie = trie;
    }
    const int32_t outline = pl_matcher_outline(m, m->path[0].state, err);
    const bool between = m->path[0].partial.missing == 0; /* characters: in the midst of one masks are not remembered */
    if (outline < 0 || (between && m->sets[outline].mask != PL_UNKNOWN)) {
        return outline < 0 ? NULL : &k->at[m->sets[outline].mask];
    }
    m->path[1] = (pl_cursor){outline, m->path[0].partial};
    k->n_spans = k->open.n = 0;
    if (enter_node(m, trie, 1, 0, (pl_branch){.end = trie->n_tokens}, err) != 0 || walk(m, trie, err) != 0) {
        return NULL;
    }
    if (k->n == PL_KEPT_MASKS || k->n_listed > KEPT_TOKENS) {
        pl_masks_forget(m);
    }
    pl_mask fresh = {.state = m->path[1].state};
    if (make_mask(k, trie, &fresh, err) != 0) {
        return NULL;
    }
    if (between) {
        m->sets[fresh.state].mask = k->n;
    }
    k->n_listed += fresh.n_allowed + fresh.n_banned + fresh.n_open;
    k->at[k->n] = fresh;
    return &k->at[k->n++];
}

/* ---- what an outline leaves open -------------------------------------------------------------------------------------- */

/* The end of a subtree's tokens. */
static int32_t end_of(const pl_trie *trie, int32_t node) {
    while (node > 0 && trie->nodes[trie->nodes[node].parent + 1].children == node + 1) {
        node = trie->nodes[node].parent; /* a last child ends where its parent ends */
    }
    return node > 0 ? trie->nodes[node + 1].first : trie->n_tokens;
}

/* Tries a node's subtree in the state where the text stands, and adds the tokens that are allowed to k->tried. */
static int32_t try_subtree(pl_matcher *m, const pl_trie *trie, int32_t node, pl_error *err) {
    pl_masks *k = &m->masks;
    int32_t length = 0, chars = 0;
    for (int32_t i = node; i > 0; i = trie->nodes[i].parent) {
        k->branches[length++].child = i;
    }
    m->path[1] = m->path[0];
    while (length > 0) {
        const uint8_t byte = trie->nodes[k->branches[--length].child].byte;
        const int32_t fine = pl_matcher_bound_memory(m, 2, err) == 0 ? pl_matcher_advance(m, &m->path[1], byte, err) : -1;
        if (fine != 1) {
            return fine;
        }
        chars += (byte & 0xC0) != 0x80;
    }
    const int32_t end = end_of(trie, node), children = trie->nodes[node].children;
    const bool leaf = children == trie->nodes[node + 1].children;
    k->n_spans = 0;
    if (allow(k, (pl_span){trie->nodes[node].first, leaf ? end : trie->nodes[children].first, NO_LIMIT}, err) != 0 ||
        enter_node(m, trie, 1, node, (pl_branch){.end = end, .chars = chars}, err) != 0 || walk(m, trie, err) != 0) {
        return -1;
    }
    for (int64_t i = 0; i < k->n_spans; i++) {
        const pl_span s = k->spans[i];
        if (list_tokens(&k->tried, trie, s.first, s.end, 0, s.limit, err) != 0) {
            return -1;
        }
    }
    return 0;
}

/* Tries what a mask leaves open. */
static int32_t try_open(pl_matcher *m, const pl_trie *trie, const pl_mask *mask, pl_error *err) {
    pl_list *open = &m->masks.open; /* a copy: to try may make the matcher forget its masks */
    open->n = m->masks.tried.n = 0;
    for (int32_t i = 0; i < mask->n_open; i++) {
        if (add(open, mask->listed[mask->n_allowed + mask->n_banned + i], err) != 0) {
            return -1;
        }
    }
    for (int64_t i = 0; i < open->n; i++) { /* nothing stays open now */
        if (try_subtree(m, trie, open->at[i], err) != 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- logits ---------------------------------------------------------------------------------------------------------- */

/* Bans the tokens that begin more characters. */
static void ban_beyond(int32_t limit, const pl_trie *trie, float *logits) {
    if (limit == 0) {
        for (int32_t i = 0; i < trie->n_tokens; i++) {
            logits[i] = -INFINITY;
        }
    } else if (limit < NO_LIMIT) {
        for (int32_t i = 0; i < trie->n_tokens; i++) {
            logits[i] = trie->chars[i] > limit ? -INFINITY : logits[i];
        }
    }
}

/* Bans what the mask does not allow, but for the tokens in k->tried. */
static int32_t apply(pl_masks *k, const pl_mask *mask, const pl_trie *trie, float *logits, pl_error *err) {
    const int32_t *allowed = mask->listed, *banned = mask->listed + mask->n_allowed, *tried = k->tried.at;
    if (pl_grow(&k->values, &k->values_room, k->tried.n + mask->n_allowed, sizeof *k->values, err) != 0) {
        return -1;
    }
    float *value = k->values;
    for (int64_t i = 0; i < k->tried.n; i++) {
        *value++ = logits[tried[i]];
    }
    for (int32_t i = 0; i < mask->n_allowed; i++) {
        *value++ = logits[allowed[i]];
    }
    ban_beyond(mask->limit, trie, logits);
    for (int32_t i = 0; i < mask->n_banned; i++) {
        logits[banned[i]] = -INFINITY;
    }
    value = k->values;
    for (int64_t i = 0; i < k->tried.n; i++) {
        logits[tried[i]] = *value++;
    }
    for (int32_t i = 0; i < mask->n_allowed; i++) {
        logits[allowed[i]] = *value++;
    }
    return 0;
}

PL_API int32_t pl_matcher_mask(pl_matcher *m, const pl_trie *trie, float *logits, int32_t n_logits, pl_error *err) {
    pl_masks *k = &m->masks;
    if (n_logits != trie->n_tokens) {
        return pl_fail(err, "%d logits for a vocabulary of %d tokens", n_logits, trie->n_tokens);
    }
    if (pl_grow(&m->path, &m->path_room, trie->depth + 2, sizeof *m->path, err) != 0 ||
        pl_grow(&k->branches, &k->branches_room, trie->depth + 2, sizeof *k->branches, err) != 0) {
        return -1;
    }
    const pl_mask *here = mask_here(m, trie, err);
    if (!here || try_open(m, trie, here, err) != 0) {
        return -1;
    }
    if (k->n == 0) { /* memory ran short meanwhile: the mask is forgotten */
        here = mask_here(m, trie, err);
    }
    return here ? apply(k, here, trie, logits, err) : -1;
}
