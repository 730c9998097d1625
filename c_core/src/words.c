/*
 * words.c - cuts a text into the words within which byte-level BPE merges. Each function does the work of the regular
 * expressions of one pre-tokenizer of pyllama/tokenizer/bpe.py, some ten times faster than a general engine can; the tests
 * hold the two against each other.
 */
#include "common.h"

#include "unicode_classes.h"

typedef struct character {
    uint32_t point;
    int32_t size;  /* bytes; 0 at the end of the text */
    int32_t class; /* LETTER, NUMBER, SPACE, or 0 for all others */
    bool punctuation;
} character;

static int32_t class_of(uint32_t point) {
    static const int32_t n_changes = sizeof CLASS_CHANGES / sizeof *CLASS_CHANGES;
    int32_t low = 0, high = n_changes; /* the entry is in [low, high) */
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (CLASS_CHANGES[middle] >> 4 <= point) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return (int32_t)(CLASS_CHANGES[low] & 15);
}

/* Reads the character at the beginning of a text. A byte that begins none is taken as one of no class. */
static character read_character(const uint8_t *text, int64_t n) {
    if (n <= 0) {
        return (character){0};
    }
    uint32_t point = text[0];
    if (point < 0x80) {
        bool letter = (point | 0x20) >= 'a' && (point | 0x20) <= 'z', number = point >= '0' && point <= '9';
        bool space = point == ' ' || (point >= 9 && point <= 13), visible = point > ' ' && point < 0x7f;
        int32_t class = letter ? LETTER : number ? NUMBER : space ? SPACE : 0;
        return (character){point, 1, class, visible && class == 0 && point != '`'};
    }
    int32_t size = point >= 0xf0 ? 4 : point >= 0xe0 ? 3 : 2;
    if (point < 0xc0 || size > n) {
        return (character){UINT32_MAX, 1, 0, false};
    }
    point &= 0x7fu >> size;
    for (int32_t i = 1; i < size; i++) {
        point = point << 6 | (text[i] & 0x3f);
    }
    int32_t class = class_of(point);
    return (character){point, size, class & ~PUNCTUATION, (class & PUNCTUATION) != 0};
}

/* Bytes of the characters of a class at the beginning of a text, at most `limit` of them. */
static int64_t run_size(const uint8_t *text, int64_t n, int32_t class, int64_t limit) {
    int64_t size = 0;
    for (character c; limit > 0 && (c = read_character(text + size, n - size)).size > 0 && c.class == class; limit--) {
        size += c.size;
    }
    return size;
}

/* 's 't 'm 'd 're 've 'll: its bytes, or 0. */
static int64_t contraction_size(const uint8_t *text, int64_t n, bool any_case) {
    if (n < 2 || text[0] != '\'') {
        return 0;
    }
    uint8_t fold = any_case ? 0x20 : 0, first = text[1] | fold, second = n > 2 ? text[2] | fold : 0;
    if (first == 's' || first == 't' || first == 'm' || first == 'd') {
        return 2;
    }
    return (first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l') ? 3 : 0;
}

/*
 * \s+(?!\S)|\s+: white space up to the last character of the run, which goes with the word that follows; all of it where
 * none follows. `number_ends`: a number does not count as a word that follows.
 */
static int64_t space_size(const uint8_t *text, int64_t n, bool number_ends) {
    int64_t size = 0;
    int32_t last = 0;
    character c;
    while ((c = read_character(text + size, n - size)).class == SPACE) {
        last = c.size;
        size += last;
    }
    bool follows = c.size > 0 && !(number_ends && c.class == NUMBER);
    return follows && size > last ? size - last : size;
}

/* GPT-2's words; with `single_digits` those of SmolLM, in which each digit is a word and ends the one before it. */
static int64_t gpt2_word(const uint8_t *text, int64_t n, bool single_digits) {
    int64_t contraction = contraction_size(text, n, false);
    if (contraction > 0) {
        return contraction;
    }
    int32_t skip = text[0] == ' ';
    character c = read_character(text + skip, n - skip);
    if (single_digits && c.class == NUMBER) {
        return skip ? 1 : c.size;
    }
    if (c.size > 0 && c.class != SPACE) {
        return skip + run_size(text + skip, n - skip, c.class, n);
    }
    return space_size(text, n, single_digits);
}

/* Words of Llama 3 and, with one digit in place of three, of Qwen 2. */
static int64_t llama3_word(const uint8_t *text, int64_t n, int32_t max_digits) {
    int64_t contraction = contraction_size(text, n, true);
    if (contraction > 0) {
        return contraction;
    }
    character first = read_character(text, n);
    if (first.class == NUMBER) {
        return run_size(text, n, NUMBER, max_digits);
    }
    character second = read_character(text + first.size, n - first.size);
    bool newline = first.point == '\r' || first.point == '\n';
    if (first.class == LETTER || (!newline && second.class == LETTER)) {
        return first.size + run_size(text + first.size, n - first.size, LETTER, n);
    }
    int32_t skip = first.point == ' ';
    int64_t size = skip + run_size(text + skip, n - skip, 0, n);
    if (size > skip) {
        while (size < n && (text[size] == '\r' || text[size] == '\n')) {
            size++;
        }
        return size;
    }
    /* \s*[\r\n]+: white space up to its last line end */
    int64_t end = run_size(text, n, SPACE, n);
    while (end > 0 && text[end - 1] != '\r' && text[end - 1] != '\n') {
        end--;
    }
    return end > 0 ? end : space_size(text, n, false);
}

static bool three_digits(const uint8_t *text, int64_t n) {
    for (int32_t i = 0; i < 3; i++) {
        if (i >= n || text[i] < '0' || text[i] > '9') {
            return false;
        }
    }
    return true;
}

/* Three digits, or numbers up to the next three digits. */
static int64_t number_size(const uint8_t *text, int64_t n) {
    int64_t size = 0;
    if (three_digits(text, n)) {
        return 3;
    }
    for (character c; (c = read_character(text + size, n - size)).class == NUMBER && !three_digits(text + size, n - size);) {
        size += c.size;
    }
    return size;
}

/* Bytes of a text's beginning up to the first character that is punctuation, or is not. */
static int64_t part_size(const uint8_t *text, int64_t n, bool punctuation) {
    int64_t size = 0;
    for (character c; (c = read_character(text + size, n - size)).size > 0 && c.punctuation == punctuation;) {
        size += c.size;
    }
    return size;
}

/* Words where a model does not say which: punctuation by itself; GPT-2's words between, of which a number is a word of its
 * own, in threes of digits. `*part`: how much is left of the part between punctuation, 0 when that is to be found out. */
static int64_t default_word(const uint8_t *text, int64_t n, int64_t *part) {
    if (*part == 0) {
        const int64_t size = part_size(text, n, true);
        if (size > 0) {
            return size;
        }
        *part = part_size(text, n, false);
    }
    const int32_t skip = text[0] == ' ' && *part > 1;
    int64_t size;
    if (read_character(text + skip, *part - skip).class == NUMBER) {
        size = skip ? 1 : number_size(text, *part);
    } else {
        size = gpt2_word(text, *part, false);
    }
    *part -= size;
    return size;
}

static int64_t word_size(int32_t kind, const uint8_t *text, int64_t n, int64_t *part) {
    switch (kind) {
    case PL_WORDS_GPT2:
        return gpt2_word(text, n, false);
    case PL_WORDS_SMOLLM:
        return gpt2_word(text, n, true);
    case PL_WORDS_LLAMA3:
        return llama3_word(text, n, 3);
    case PL_WORDS_QWEN2:
        return llama3_word(text, n, 1);
    default:
        return default_word(text, n, part);
    }
}

PL_API int64_t pl_cut_words(int32_t kind, const uint8_t *text, int64_t n_bytes, const int32_t *sizes, const int32_t *tokens,
                            int64_t n_pieces, int32_t *word_sizes, int32_t *word_tokens, pl_error *err) {
    if (kind < PL_WORDS_GPT2 || kind > PL_WORDS_DEFAULT) {
        return pl_fail(err, "there is no kind %d of words", kind);
    }
    int64_t n_words = 0;
    for (int64_t i = 0; i < n_pieces; i++) {
        if (sizes[i] < 1 || sizes[i] > n_bytes) {
            return pl_fail(err, "piece %lld (%d bytes) does not fit", (long long)i, sizes[i]);
        }
        int64_t part = 0;
        for (int64_t at = 0; at < sizes[i]; n_words++) {
            int64_t size = tokens[i] < 0 ? word_size(kind, text + at, sizes[i] - at, &part) : sizes[i];
            word_sizes[n_words] = (int32_t)size;
            word_tokens[n_words] = tokens[i];
            at += size;
        }
        text += sizes[i];
        n_bytes -= sizes[i];
    }
    return n_words;
}
