/*
 * bpe.c - what the tokenizers need to be fast: a vocabulary found by text, the search for tokens that stand verbatim in a
 * text, and byte-pair encoding (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units") with
 * its two kinds of rules: ranked merges over bytes (GPT-2) and scored tokens over characters (SentencePiece).
 *
 * The objects never change once they are made, and each call has its own working memory, so any number of threads may
 * encode at the same time. Vocabularies and texts are both taken to be hostile: every index is checked, and the time is
 * bounded by O(n log n) for a text of n bytes (times the length of the longest token where substrings are hashed).
 */
#include "common.h"

#include <stdlib.h>

/* The longest text of one token, in bytes. Real vocabularies stay below a few hundred. */
#define LONGEST_TOKEN 65535

/* More steps than this in a hash table that is at most half full mean that somebody chose the keys to collide. */
#define MAX_PROBES 4096

/* The space of SentencePiece: U+2581 in UTF-8. */
static const uint8_t SPACE[3] = {0xe2, 0x96, 0x81};

/* ---- the vocabulary ----------------------------------------------------------------------------------------------- */

typedef struct text_slot {
    uint32_t hash;
    int32_t token; /* number + 1; 0 when the slot is empty */
} text_slot;

struct pl_vocab {
    int32_t n_tokens;
    int32_t longest; /* bytes of the longest text */
    int32_t *starts; /* [n_tokens + 1] into texts */
    uint8_t *texts;
    uint32_t mask; /* slots - 1, a power of two less one */
    text_slot *slots;
};

static uint32_t hash_bytes(const uint8_t *text, int64_t n) { /* FNV-1a, then mixed so that the low bits are good */
    uint64_t h = 0xcbf29ce484222325u;
    for (int64_t i = 0; i < n; i++) {
        h = (h ^ text[i]) * 0x100000001b3u;
    }
    return (uint32_t)((h ^ h >> 32) * 0x9e3779b97f4a7c15u >> 32);
}

static const uint8_t *token_text(const pl_vocab *vocab, int32_t token, int32_t *n_bytes) {
    *n_bytes = vocab->starts[token + 1] - vocab->starts[token];
    return vocab->texts + vocab->starts[token];
}

/* Smallest power of two >= 2 * n. */
static uint32_t table_size(int64_t n) {
    uint32_t size = 2;
    while (size < 2 * n) {
        size *= 2;
    }
    return size;
}

PL_API int32_t pl_vocab_find(const pl_vocab *vocab, const uint8_t *text, int64_t n_bytes) {
    if (n_bytes <= 0 || n_bytes > vocab->longest) {
        return -1;
    }
    uint32_t hash = hash_bytes(text, n_bytes);
    for (uint32_t i = hash & vocab->mask; vocab->slots[i].token; i = (i + 1) & vocab->mask) {
        if (vocab->slots[i].hash == hash) {
            int32_t size, token = vocab->slots[i].token - 1;
            const uint8_t *candidate = token_text(vocab, token, &size);
            if (size == n_bytes && memcmp(candidate, text, (size_t)size) == 0) {
                return token;
            }
        }
    }
    return -1;
}

/* Enters a token into the hash table. */
static int32_t vocab_enter(pl_vocab *vocab, int32_t token, pl_error *err) {
    int32_t size, probes = 0;
    const uint8_t *text = token_text(vocab, token, &size);
    uint32_t hash = hash_bytes(text, size), i = hash & vocab->mask;
    for (; vocab->slots[i].token; i = (i + 1) & vocab->mask) {
        int32_t other_size, other = vocab->slots[i].token - 1;
        const uint8_t *other_text = token_text(vocab, other, &other_size);
        if (size == other_size && memcmp(text, other_text, (size_t)size) == 0) {
            return pl_fail(err, "tokens %d and %d are the same", other, token);
        }
        if (++probes == MAX_PROBES) {
            return pl_fail(err, "token %d collides with too many others in the hash table", token);
        }
    }
    vocab->slots[i] = (text_slot){hash, token + 1};
    return 0;
}

/* Is the i-th string inside the data? */
static bool string_inside(const int64_t *starts, const int64_t *sizes, int64_t i, int64_t n_data) {
    return starts[i] >= 0 && sizes[i] >= 0 && starts[i] <= n_data && sizes[i] <= n_data - starts[i];
}

PL_API pl_vocab *pl_vocab_new(const uint8_t *data, int64_t n_data, const int64_t *starts, const int64_t *sizes,
                              int64_t n_tokens, pl_error *err) {
    if (n_tokens < 1 || n_tokens > INT32_MAX / 4) {
        pl_fail(err, "a vocabulary of %lld tokens", (long long)n_tokens);
        return NULL;
    }
    int64_t n_bytes = 0, longest = 0;
    for (int64_t i = 0; i < n_tokens; i++) {
        if (!string_inside(starts, sizes, i, n_data)) {
            pl_fail(err, "token %lld lies outside the data", (long long)i);
            return NULL;
        }
        if (sizes[i] > LONGEST_TOKEN) {
            pl_fail(err, "token %lld is %lld bytes long, more than %d", (long long)i, (long long)sizes[i], LONGEST_TOKEN);
            return NULL;
        }
        longest = PL_MAX(longest, sizes[i]);
        n_bytes += sizes[i];
        if (n_bytes > INT32_MAX) {
            pl_fail(err, "the tokens are more than %d bytes long together", INT32_MAX);
            return NULL;
        }
    }
    pl_vocab *vocab = pl_alloc(sizeof *vocab, err);
    if (!vocab) {
        return NULL;
    }
    uint32_t n_slots = table_size(n_tokens);
    vocab->n_tokens = (int32_t)n_tokens;
    vocab->longest = (int32_t)longest;
    vocab->mask = n_slots - 1;
    vocab->starts = pl_alloc(sizeof *vocab->starts * (size_t)(n_tokens + 1), err);
    vocab->texts = pl_alloc((size_t)n_bytes, err);
    vocab->slots = pl_alloc(sizeof *vocab->slots * n_slots, err);
    if (!vocab->starts || !vocab->texts || !vocab->slots) {
        pl_vocab_free(vocab);
        return NULL;
    }
    for (int32_t i = 0; i < n_tokens; i++) {
        memcpy(vocab->texts + vocab->starts[i], data + starts[i], (size_t)sizes[i]);
        vocab->starts[i + 1] = vocab->starts[i] + (int32_t)sizes[i];
        if (sizes[i] > 0 && vocab_enter(vocab, i, err) < 0) {
            pl_vocab_free(vocab);
            return NULL;
        }
    }
    return vocab;
}

PL_API void pl_vocab_free(pl_vocab *vocab) {
    if (vocab) {
        pl_free(vocab->starts);
        pl_free(vocab->texts);
        pl_free(vocab->slots);
        pl_free(vocab);
    }
}

PL_API int32_t pl_vocab_bytes(const pl_vocab *vocab) { return vocab->starts[vocab->n_tokens]; }

PL_API void pl_vocab_texts(const pl_vocab *vocab, uint8_t *out, int32_t *starts) {
    memcpy(out, vocab->texts, (size_t)pl_vocab_bytes(vocab));
    memcpy(starts, vocab->starts, sizeof *starts * ((size_t)vocab->n_tokens + 1));
}

/* ---- what a token stands for -------------------------------------------------------------------------------------- */

/*
 * GPT-2's alphabet gives each byte a visible character: the printable ones of Latin-1 stand for themselves, and the other
 * 68 are numbered from U+0100 in their order: 0..32, 127..160, 173.
 */
static uint32_t byte_character(int32_t byte) {
    if (byte <= 32) {
        return 256 + (uint32_t)byte;
    }
    if (byte >= 127 && byte <= 160) {
        return 256 + 33 + (uint32_t)(byte - 127);
    }
    return byte == 173 ? 256 + 33 + 34 : (uint32_t)byte;
}

/* The byte of a character of the alphabet, or -1. */
static int32_t character_byte(uint32_t character) {
    if (character >= 256 && character <= 256 + 32) {
        return (int32_t)character - 256;
    }
    if (character > 256 + 32 && character < 256 + 33 + 34) {
        return (int32_t)character - (256 + 33) + 127;
    }
    if (character == 256 + 33 + 34) {
        return 173;
    }
    return character < 256 && byte_character((int32_t)character) == character ? (int32_t)character : -1;
}

/* Spells a byte in the alphabet; returns the number of bytes in UTF-8, 1 or 2. */
static int32_t spell_byte(int32_t byte, uint8_t out[2]) {
    uint32_t character = byte_character(byte);
    if (character < 0x80) {
        out[0] = (uint8_t)character;
        return 1;
    }
    out[0] = (uint8_t)(0xc0 | character >> 6);
    out[1] = (uint8_t)(0x80 | (character & 0x3f));
    return 2;
}

/* Reads a text in the alphabet. One that has other characters is no spelling but plain text, and is copied. */
static int32_t decode_byte_level(const uint8_t *text, int32_t n, uint8_t *out) {
    int32_t n_out = 0;
    for (int32_t i = 0; i < n;) {
        uint32_t character = text[i++];
        if ((character & 0xe0) == 0xc0 && i < n && (text[i] & 0xc0) == 0x80) {
            character = (character & 0x1f) << 6 | (text[i++] & 0x3f);
        } else if (character >= 0x80) {
            character = UINT32_MAX;
        }
        int32_t byte = character_byte(character);
        if (byte < 0) {
            memcpy(out, text, (size_t)n);
            return n;
        }
        out[n_out++] = (uint8_t)byte;
    }
    return n_out;
}

/* Copies a text with plain spaces for U+2581. */
static int32_t decode_spaces(const uint8_t *text, int32_t n, uint8_t *out) {
    int32_t n_out = 0;
    for (int32_t i = 0; i < n;) {
        if (n - i >= 3 && memcmp(text + i, SPACE, 3) == 0) {
            out[n_out++] = ' ';
            i += 3;
        } else {
            out[n_out++] = text[i++];
        }
    }
    return n_out;
}

static int32_t hex_digit(uint8_t c) {
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The byte that <0xNN> names, or -1. */
static int32_t byte_name_value(const uint8_t *text, int32_t n) {
    if (n != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') {
        return -1;
    }
    int32_t high = hex_digit(text[3]), low = hex_digit(text[4]);
    return high < 0 || low < 0 ? -1 : high << 4 | low;
}

PL_API int32_t pl_vocab_decode(const pl_vocab *vocab, const int32_t *types, int32_t byte_level, uint8_t *out,
                               int32_t *starts, pl_error *err) {
    int32_t n_out = 0;
    for (int32_t i = 0; i < vocab->n_tokens; i++) {
        int32_t size, byte;
        const uint8_t *text = token_text(vocab, i, &size);
        starts[i] = n_out;
        switch (types[i]) {
        case PL_TOKEN_NORMAL:
            n_out += byte_level ? decode_byte_level(text, size, out + n_out) : decode_spaces(text, size, out + n_out);
            break;
        case PL_TOKEN_USER_DEFINED:
            memcpy(out + n_out, text, (size_t)size);
            n_out += size;
            break;
        case PL_TOKEN_BYTE:
            byte = byte_name_value(text, size);
            if (byte < 0) {
                return pl_fail(err, "token %d has the type of a byte, but is not spelled <0xNN>", i);
            }
            out[n_out++] = (uint8_t)byte;
            break;
        default:
            break;
        }
    }
    starts[vocab->n_tokens] = n_out;
    return 0;
}

/* ---- tokens that stand verbatim in a text ------------------------------------------------------------------------- */

struct pl_splitter {
    const pl_vocab *vocab;
    int32_t *tokens;           /* ascending by text */
    int32_t first_of[256 + 1]; /* tokens[first_of[b] .. first_of[b + 1]) begin with the byte b */
};

static int32_t compare_texts(const pl_vocab *vocab, int32_t a, int32_t b) {
    int32_t n_a, n_b;
    const uint8_t *text_a = token_text(vocab, a, &n_a), *text_b = token_text(vocab, b, &n_b);
    int32_t order = memcmp(text_a, text_b, (size_t)PL_MIN(n_a, n_b));
    return order ? order : n_a - n_b;
}

PL_API pl_splitter *pl_splitter_new(const pl_vocab *vocab, const int32_t *tokens, int32_t n_tokens, pl_error *err) {
    if (n_tokens < 0 || n_tokens > vocab->n_tokens) {
        pl_fail(err, "a splitter with %d tokens", n_tokens);
        return NULL;
    }
    pl_splitter *splitter = pl_alloc(sizeof *splitter, err);
    if (!splitter) {
        return NULL;
    }
    splitter->vocab = vocab;
    splitter->tokens = pl_alloc(sizeof *tokens * (size_t)n_tokens, err);
    if (!splitter->tokens) {
        pl_splitter_free(splitter);
        return NULL;
    }
    for (int32_t i = 0; i < n_tokens; i++) {
        bool known = tokens[i] >= 0 && tokens[i] < vocab->n_tokens;
        int32_t size = known ? vocab->starts[tokens[i] + 1] - vocab->starts[tokens[i]] : 0;
        if (size == 0 || (i > 0 && compare_texts(vocab, tokens[i - 1], tokens[i]) >= 0)) {
            pl_fail(err, "token %d is unknown, empty or out of order", tokens[i]);
            pl_splitter_free(splitter);
            return NULL;
        }
        splitter->tokens[i] = tokens[i];
        splitter->first_of[vocab->texts[vocab->starts[tokens[i]]] + 1]++;
    }
    for (int32_t b = 0; b < 256; b++) {
        splitter->first_of[b + 1] += splitter->first_of[b];
    }
    return splitter;
}

PL_API void pl_splitter_free(pl_splitter *splitter) {
    if (splitter) {
        pl_free(splitter->tokens);
        pl_free(splitter);
    }
}

/* The first of tokens[low .. high) whose byte at `depth` is not below `byte`; all of them are longer than that. */
static int32_t lower_bound(const pl_splitter *splitter, int32_t low, int32_t high, int32_t depth, int32_t byte) {
    const pl_vocab *vocab = splitter->vocab;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (vocab->texts[vocab->starts[splitter->tokens[middle]] + depth] < byte) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* The longest token at the beginning of a text, or -1: the range of those that agree is narrowed byte by byte. */
static int32_t longest_match(const pl_splitter *splitter, const uint8_t *text, int64_t n_bytes, int32_t *size) {
    int32_t low = splitter->first_of[text[0]], high = splitter->first_of[text[0] + 1], match = -1;
    for (int32_t depth = 1; low < high; depth++) {
        int32_t shortest;
        token_text(splitter->vocab, splitter->tokens[low], &shortest);
        if (shortest == depth) {
            match = splitter->tokens[low++];
            *size = depth;
        }
        if (depth == n_bytes) {
            break;
        }
        low = lower_bound(splitter, low, high, depth, text[depth]);
        high = lower_bound(splitter, low, high, depth, text[depth] + 1);
    }
    return match;
}

PL_API int64_t pl_split(const pl_splitter *splitter, const uint8_t *text, int64_t n_bytes, int32_t *sizes, int32_t *tokens,
                        pl_error *err) {
    if (n_bytes < 0 || n_bytes > INT32_MAX) {
        return pl_fail(err, "a text of %lld bytes", (long long)n_bytes);
    }
    int64_t n_pieces = 0, begin = 0, at = 0; /* text[begin .. at) holds no match */
    while (begin < n_bytes) {
        int32_t match = -1, size = 0;
        while (at < n_bytes && (match = longest_match(splitter, text + at, n_bytes - at, &size)) < 0) {
            at++;
        }
        if (at > begin) {
            sizes[n_pieces] = (int32_t)(at - begin);
            tokens[n_pieces++] = -1;
        }
        if (match >= 0) {
            sizes[n_pieces] = size;
            tokens[n_pieces++] = match;
        }
        begin = at += size;
    }
    return n_pieces;
}

/* ---- the rules of byte-pair encoding ------------------------------------------------------------------------------ */

typedef struct pair_slot {
    uint64_t pair; /* left token << 32 | right token */
    int32_t token; /* what they become, + 1; 0 when the slot is empty */
    uint32_t rank;
} pair_slot;

struct pl_bpe {
    const pl_vocab *vocab;
    int32_t byte_tokens[256]; /* -1 where there is none */
    /* ranked rules */
    bool whole_first;
    uint32_t pair_mask;
    pair_slot *pairs; /* NULL: the rules are scored */
    /* scored rules */
    uint32_t *priorities; /* of each token: the lower the better */
    uint8_t *neighbours;  /* a set of bits: may these two characters stand side by side in a token? */
};

static uint32_t hash_pair(uint64_t pair) { return (uint32_t)((pair ^ pair >> 29) * 0x9e3779b97f4a7c15u >> 32); }

static const pair_slot *find_pair(const pl_bpe *bpe, int32_t left, int32_t right) {
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (uint32_t i = hash_pair(pair) & bpe->pair_mask; bpe->pairs[i].token; i = (i + 1) & bpe->pair_mask) {
        if (bpe->pairs[i].pair == pair) {
            return &bpe->pairs[i];
        }
    }
    return NULL;
}

/* Enters the merge "left right". One whose parts or whole are no tokens can never make one, and is left out; of equal ones
 * the first counts. */
static int32_t enter_merge(pl_bpe *bpe, const uint8_t *merge, int64_t size, int64_t rank, uint8_t *scratch, pl_error *err) {
    const uint8_t *space = size > 1 ? memchr(merge + 1, ' ', (size_t)size - 1) : NULL;
    if (!space) {
        return pl_fail(err, "merge %lld is not two texts with a space between them", (long long)rank);
    }
    int64_t n_left = space - merge, n_right = size - n_left - 1;
    if (n_left + n_right > bpe->vocab->longest) {
        return 0;
    }
    memcpy(scratch, merge, (size_t)n_left);
    memcpy(scratch + n_left, space + 1, (size_t)n_right);
    int32_t left = pl_vocab_find(bpe->vocab, scratch, n_left);
    int32_t right = pl_vocab_find(bpe->vocab, scratch + n_left, n_right);
    int32_t token = pl_vocab_find(bpe->vocab, scratch, n_left + n_right);
    if (left < 0 || right < 0 || token < 0) {
        return 0;
    }
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    uint32_t i = hash_pair(pair) & bpe->pair_mask;
    for (int32_t probes = 0; bpe->pairs[i].token; i = (i + 1) & bpe->pair_mask) {
        if (bpe->pairs[i].pair == pair) {
            return 0;
        }
        if (++probes == MAX_PROBES) {
            return pl_fail(err, "merge %lld collides with too many others in the hash table", (long long)rank);
        }
    }
    bpe->pairs[i] = (pair_slot){pair, token + 1, (uint32_t)rank};
    return 0;
}

PL_API pl_bpe *pl_bpe_new_ranked(const pl_vocab *vocab, const uint8_t *data, int64_t n_data, const int64_t *starts,
                                 const int64_t *sizes, int64_t n_merges, int32_t whole_first, pl_error *err) {
    if (n_merges < 0 || n_merges > INT32_MAX / 4) {
        pl_fail(err, "%lld merges", (long long)n_merges);
        return NULL;
    }
    pl_bpe *bpe = pl_alloc(sizeof *bpe, err);
    uint8_t *scratch = pl_alloc((size_t)vocab->longest, err);
    if (!bpe || !scratch) {
        goto failed;
    }
    uint32_t n_slots = table_size(n_merges);
    bpe->vocab = vocab;
    bpe->whole_first = whole_first != 0;
    bpe->pair_mask = n_slots - 1;
    bpe->pairs = pl_alloc(sizeof *bpe->pairs * n_slots, err);
    if (!bpe->pairs) {
        goto failed;
    }
    for (int64_t i = 0; i < n_merges; i++) {
        if (!string_inside(starts, sizes, i, n_data)) {
            pl_fail(err, "merge %lld lies outside the data", (long long)i);
            goto failed;
        }
        if (enter_merge(bpe, data + starts[i], sizes[i], i, scratch, err) < 0) {
            goto failed;
        }
    }
    for (int32_t byte = 0; byte < 256; byte++) {
        uint8_t spelling[2];
        bpe->byte_tokens[byte] = pl_vocab_find(vocab, spelling, spell_byte(byte, spelling));
    }
    pl_free(scratch);
    return bpe;
failed:
    pl_free(scratch);
    pl_bpe_free(bpe);
    return NULL;
}

/* A number that is lower for a higher score. Not for NaN. */
static uint32_t score_priority(float score) {
    uint32_t bits;
    score += 0.0f; /* makes -0 equal to 0 */
    memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? bits : ~(bits | 0x80000000u);
}

/* Bytes of the character at the beginning of a text. What is no UTF-8 comes in bytes, or as if it were. */
static int32_t character_size(const uint8_t *text, int64_t n_bytes) {
    static const uint8_t size_of[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4};
    int32_t size = size_of[text[0] >> 4];
    return (int32_t)PL_MIN(size, n_bytes);
}

/*
 * Scored rules can only merge across two characters that stand side by side in some token. Where they don't, a text falls
 * apart into stretches that have nothing to do with each other. The set is kept as hashed bits: a false "yes" costs a
 * little time and changes nothing.
 */
#define NEIGHBOUR_BITS 20

static uint32_t neighbour_bit(const uint8_t *left, int32_t n_left, const uint8_t *right, int32_t n_right) {
    uint32_t a = 0, b = 0;
    memcpy(&a, left, (size_t)n_left);
    memcpy(&b, right, (size_t)n_right);
    return (uint32_t)(((uint64_t)a << 32 | b) * 0x9e3779b97f4a7c15u >> (64 - NEIGHBOUR_BITS));
}

static void enter_neighbours(pl_bpe *bpe, const uint8_t *text, int32_t n_bytes) {
    int32_t n_left = character_size(text, n_bytes);
    for (int32_t at = n_left; at < n_bytes;) {
        int32_t n_right = character_size(text + at, n_bytes - at);
        uint32_t bit = neighbour_bit(text + at - n_left, n_left, text + at, n_right);
        bpe->neighbours[bit >> 3] |= (uint8_t)(1 << (bit & 7));
        n_left = n_right;
        at += n_right;
    }
}

PL_API pl_bpe *pl_bpe_new_scored(const pl_vocab *vocab, const float *scores, int64_t n_scores, int32_t unknown,
                                 pl_error *err) {
    if (n_scores != vocab->n_tokens) {
        pl_fail(err, "%lld scores for %d tokens", (long long)n_scores, vocab->n_tokens);
        return NULL;
    }
    if (unknown < -1 || unknown >= vocab->n_tokens) {
        pl_fail(err, "token %d is not in the vocabulary", unknown);
        return NULL;
    }
    pl_bpe *bpe = pl_alloc(sizeof *bpe, err);
    if (!bpe) {
        return NULL;
    }
    bpe->vocab = vocab;
    bpe->priorities = pl_alloc(sizeof *bpe->priorities * (size_t)n_scores, err);
    bpe->neighbours = pl_alloc((size_t)1 << (NEIGHBOUR_BITS - 3), err);
    if (!bpe->priorities || !bpe->neighbours) {
        pl_bpe_free(bpe);
        return NULL;
    }
    for (int32_t i = 0; i < n_scores; i++) {
        if (scores[i] != scores[i]) {
            pl_fail(err, "the score of token %d is not a number", i);
            pl_bpe_free(bpe);
            return NULL;
        }
        int32_t size;
        const uint8_t *text = token_text(vocab, i, &size);
        bpe->priorities[i] = score_priority(scores[i]);
        if (size > 0) {
            enter_neighbours(bpe, text, size);
        }
    }
    for (int32_t byte = 0; byte < 256; byte++) {
        static const char digits[] = "0123456789ABCDEF";
        uint8_t name[6] = {'<', '0', 'x', (uint8_t)digits[byte >> 4], (uint8_t)digits[byte & 15], '>'};
        int32_t token = pl_vocab_find(vocab, name, sizeof name);
        bpe->byte_tokens[byte] = token >= 0 ? token : unknown;
    }
    return bpe;
}

PL_API void pl_bpe_free(pl_bpe *bpe) {
    if (bpe) {
        pl_free(bpe->pairs);
        pl_free(bpe->priorities);
        pl_free(bpe->neighbours);
        pl_free(bpe);
    }
}

/* ---- encoding ----------------------------------------------------------------------------------------------------- */

/* Symbols of a stretch of text are a doubly linked list; a symbol that was merged into its left neighbour has size 0. */
typedef struct symbol {
    const uint8_t *text;
    int32_t size;
    int32_t token;          /* -1: not looked up, or none */
    int32_t previous, next; /* -1: none */
} symbol;

/* A pair that may be merged. */
typedef struct candidate {
    uint64_t order; /* priority << 32 | left symbol: the lowest goes first */
    int32_t size;   /* of both together: when it is another one by now, the pair no longer exists */
    int32_t token;  /* what they become */
} candidate;

typedef struct encoder {
    const pl_bpe *bpe;
    symbol *symbols;
    candidate *heap; /* the lowest order at the top */
    int32_t n_symbols, n_heap, capacity;
    uint8_t *buffer; /* for a piece in another spelling */
    int64_t buffer_size;
    int32_t *out;
    int64_t n_out, out_size;
    pl_error *err;
} encoder;

static int32_t reserve_symbols(encoder *e, int64_t n) {
    if (n <= e->capacity) {
        return 0;
    }
    int64_t capacity = PL_MAX(n, (int64_t)e->capacity * 2);
    free(e->symbols);
    free(e->heap);
    e->symbols = malloc(sizeof *e->symbols * (size_t)capacity);
    /* There are n - 1 pairs at first, and each of at most n - 1 merges takes one and brings two. */
    e->heap = malloc(sizeof *e->heap * 2 * (size_t)capacity);
    e->capacity = (int32_t)capacity;
    return e->symbols && e->heap ? 0 : pl_fail(e->err, "out of memory for a text of %lld symbols", (long long)n);
}

static int32_t reserve_buffer(encoder *e, int64_t n) {
    if (n > e->buffer_size) {
        free(e->buffer);
        e->buffer_size = PL_MAX(n, e->buffer_size * 2);
        e->buffer = malloc((size_t)e->buffer_size);
    }
    return e->buffer || n == 0 ? 0 : pl_fail(e->err, "out of memory for a text of %lld bytes", (long long)n);
}

static int32_t emit(encoder *e, int32_t token) {
    if (token >= 0) {
        if (e->n_out == e->out_size) {
            return pl_fail(e->err, "the text has more than %lld tokens", (long long)e->out_size);
        }
        e->out[e->n_out++] = token;
    }
    return 0;
}

/* Four children to a node: half as many levels as with two, and the four lie side by side. */
static void sift_down(candidate *heap, int64_t n, int64_t i) {
    candidate moved = heap[i];
    for (int64_t child; (child = 4 * i + 1) < n; i = child) {
        const int64_t end = PL_MIN(child + 4, n);
        for (int64_t other = child + 1; other < end; other++) {
            child = heap[other].order < heap[child].order ? other : child;
        }
        if (moved.order <= heap[child].order) {
            break;
        }
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

static void sift_up(candidate *heap, int64_t i) {
    candidate moved = heap[i];
    for (int64_t parent; i > 0; i = parent) {
        parent = (i - 1) / 4;
        if (heap[parent].order <= moved.order) {
            break;
        }
        heap[i] = heap[parent];
    }
    heap[i] = moved;
}

/* Puts the pair at the end of the heap (out of order) if a rule allows it. */
static bool propose(encoder *e, int32_t left, int32_t right) {
    const pl_bpe *bpe = e->bpe;
    const symbol *a = &e->symbols[left], *b = &e->symbols[right];
    candidate c = {.size = a->size + b->size};
    uint32_t priority;
    if (bpe->pairs) {
        const pair_slot *pair = find_pair(bpe, a->token, b->token);
        if (!pair) {
            return false;
        }
        c.token = pair->token - 1;
        priority = pair->rank;
    } else {
        c.token = pl_vocab_find(bpe->vocab, a->text, c.size);
        if (c.token < 0) {
            return false;
        }
        priority = bpe->priorities[c.token];
    }
    c.order = (uint64_t)priority << 32 | (uint32_t)left;
    e->heap[e->n_heap++] = c;
    return true;
}

/* Merges the symbols as far as the rules go. */
static void merge_symbols(encoder *e) {
    symbol *symbols = e->symbols;
    e->n_heap = 0;
    for (int32_t i = 0; i + 1 < e->n_symbols; i++) {
        propose(e, i, i + 1);
    }
    for (int64_t i = e->n_heap > 1 ? (e->n_heap - 2) / 4 : -1; i >= 0; i--) { /* from the last parent on */
        sift_down(e->heap, e->n_heap, i);
    }
    while (e->n_heap > 0) {
        candidate best = e->heap[0];
        e->heap[0] = e->heap[--e->n_heap];
        if (e->n_heap > 0) {
            sift_down(e->heap, e->n_heap, 0);
        }
        int32_t i = (int32_t)(best.order & UINT32_MAX);
        symbol *left = &symbols[i];
        if (left->size == 0 || left->next < 0 || left->size + symbols[left->next].size != best.size) {
            continue;
        }
        symbol *right = &symbols[left->next];
        left->size = best.size;
        left->token = best.token;
        left->next = right->next;
        right->size = 0;
        if (left->next >= 0) {
            symbols[left->next].previous = i;
        }
        if (left->previous >= 0 && propose(e, left->previous, i)) {
            sift_up(e->heap, e->n_heap - 1);
        }
        if (left->next >= 0 && propose(e, i, left->next)) {
            sift_up(e->heap, e->n_heap - 1);
        }
    }
}

static void add_symbol(encoder *e, const uint8_t *text, int32_t size, int32_t token) {
    int32_t i = e->n_symbols++;
    e->symbols[i] = (symbol){text, size, token, i - 1, i + 1};
}

/* Encodes the symbols that were added, and forgets them. */
static int32_t finish_symbols(encoder *e) {
    if (e->n_symbols == 0) {
        return 0;
    }
    e->symbols[e->n_symbols - 1].next = -1;
    merge_symbols(e);
    for (int32_t i = 0; i >= 0; i = e->symbols[i].next) {
        const symbol *s = &e->symbols[i];
        int32_t token = s->token;
        if (token < 0 && !e->bpe->pairs) { /* a lone character */
            token = pl_vocab_find(e->bpe->vocab, s->text, s->size);
            for (int32_t byte = 0; token < 0 && byte < s->size; byte++) {
                if (emit(e, e->bpe->byte_tokens[s->text[byte]]) < 0) {
                    return -1;
                }
            }
        }
        if (emit(e, token) < 0) {
            return -1;
        }
    }
    e->n_symbols = 0;
    return 0;
}

static int32_t encode_ranked(encoder *e, const uint8_t *text, int32_t n_bytes) {
    const pl_bpe *bpe = e->bpe;
    if (bpe->whole_first && n_bytes <= bpe->vocab->longest) { /* a spelling is never shorter than its bytes */
        int64_t size = 0;
        if (reserve_buffer(e, 2 * (int64_t)n_bytes) < 0) {
            return -1;
        }
        for (int32_t i = 0; i < n_bytes; i++) {
            size += spell_byte(text[i], e->buffer + size);
        }
        int32_t token = pl_vocab_find(bpe->vocab, e->buffer, size);
        if (token >= 0) {
            return emit(e, token);
        }
    }
    if (reserve_symbols(e, n_bytes) < 0) {
        return -1;
    }
    for (int32_t i = 0; i < n_bytes; i++) {
        add_symbol(e, text + i, 1, bpe->byte_tokens[text[i]]);
    }
    return finish_symbols(e);
}

static int32_t encode_scored(encoder *e, const uint8_t *text, int32_t n_bytes, bool space_prefix) {
    if (reserve_buffer(e, 3 * ((int64_t)n_bytes + 1)) < 0 || reserve_symbols(e, (int64_t)n_bytes + 1) < 0) {
        return -1;
    }
    uint8_t *spaced = e->buffer;
    int64_t n = 0;
    for (int32_t i = space_prefix ? -1 : 0; i < n_bytes; i++) {
        if (i < 0 || text[i] == ' ') {
            memcpy(spaced + n, SPACE, 3);
            n += 3;
        } else {
            spaced[n++] = text[i];
        }
    }
    int32_t size, previous_size = 0;
    for (int64_t at = 0; at < n; at += size) {
        size = character_size(spaced + at, n - at);
        if (e->n_symbols > 0) {
            uint32_t bit = neighbour_bit(spaced + at - previous_size, previous_size, spaced + at, size);
            bool neighbours = e->bpe->neighbours[bit >> 3] >> (bit & 7) & 1;
            if (!neighbours && finish_symbols(e) < 0) {
                return -1;
            }
        }
        add_symbol(e, spaced + at, size, -1);
        previous_size = size;
    }
    return finish_symbols(e);
}

/* Checks that the pieces cover the text, and are known tokens where they are tokens. */
static int32_t check_pieces(const pl_vocab *vocab, int64_t n_bytes, const int32_t *sizes, const int32_t *tokens,
                            int64_t n_pieces, pl_error *err) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n_pieces; i++) {
        if (sizes[i] < 0 || sizes[i] > n_bytes - sum || tokens[i] < -1 || tokens[i] >= vocab->n_tokens) {
            return pl_fail(err, "piece %lld (%d bytes, token %d) does not fit", (long long)i, sizes[i], tokens[i]);
        }
        sum += sizes[i];
    }
    return sum == n_bytes ? 0 : pl_fail(err, "the pieces are %lld bytes of %lld", (long long)sum, (long long)n_bytes);
}

PL_API int64_t pl_bpe_encode(const pl_bpe *bpe, const uint8_t *text, int64_t n_bytes, const int32_t *sizes,
                             const int32_t *tokens, int64_t n_pieces, int32_t space_prefix, int32_t *out, int64_t n_out,
                             pl_error *err) {
    if (n_bytes < 0 || n_bytes > INT32_MAX / 8) { /* sizes are 32-bit, also with three bytes for a space */
        return pl_fail(err, "a text of %lld bytes is too long", (long long)n_bytes);
    }
    if (check_pieces(bpe->vocab, n_bytes, sizes, tokens, n_pieces, err) < 0) {
        return -1;
    }
    encoder e = {.bpe = bpe, .out = out, .out_size = n_out, .err = err};
    bool after_token = true;
    int32_t status = 0;
    for (int64_t i = 0; i < n_pieces && status == 0; text += sizes[i++]) {
        if (tokens[i] >= 0) {
            status = emit(&e, tokens[i]);
        } else if (bpe->pairs) {
            status = encode_ranked(&e, text, sizes[i]);
        } else {
            status = encode_scored(&e, text, sizes[i], space_prefix && after_token);
        }
        after_token = tokens[i] >= 0;
    }
    free(e.symbols);
    free(e.heap);
    free(e.buffer);
    return status < 0 ? -1 : e.n_out;
}
