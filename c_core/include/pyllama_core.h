/*
 * pyllama_core.h - the whole C API of the pyllama core, and its only declaration.
 *
 * The file is plain C99 and is read twice: by C compilers, and by pyllama/core.py, which hands it to cffi (ABI mode) after
 * dropping the preprocessor lines. Keep it free of macros other than `#define NAME integer`.
 *
 * Conventions
 *   - Functions that can fail return 0 (or an object) and fill `*err`; on failure they return -1 (or NULL).
 *   - Sizes are in elements unless the name says bytes. Matrices are row-major, rows contiguous.
 *   - No function keeps a pointer that its caller passed unless its comment says so.
 *   - Nothing here is global: every state hangs on an object made by a `_new` function and ended by its `_free`.
 */
#ifndef PYLLAMA_CORE_H
#define PYLLAMA_CORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- errors ------------------------------------------------------------------------------------------------------- */

typedef struct pl_error {
    char message[256]; /* UTF-8, empty when there was no error */
} pl_error;

/* ---- the machine -------------------------------------------------------------------------------------------------- */

/* Name of the kernel set in use: "scalar", "avx2", "avx_vnni", "avx512", "avx512_bf16", "neon", "neon_i8mm". It is the best that
 * this processor runs, or the one that the environment variable PYLLAMA_CPU names (empty: none). If the variable says anything
 * else, this fails (NULL), and so does whatever needs kernels. */
const char *pl_cpu_name(pl_error *err);

/* Spreads the pages that this thread, and threads that it starts from now on, touch first evenly over memory nodes. */
int32_t pl_interleave_memory(const int32_t *nodes, int32_t n_nodes, pl_error *err);

/* ---- threads ------------------------------------------------------------------------------------------------------ */

typedef struct pl_pool pl_pool;

/* A pool of `n_threads` >= 1 threads, the caller of each call being one of them. */
pl_pool *pl_pool_new(int32_t n_threads, pl_error *err);
void pl_pool_free(pl_pool *pool);

/* ---- tensors ------------------------------------------------------------------------------------------------------ */

/* GGUF's numbers for the tensor types that the core reads. */
enum pl_type {
    PL_F32 = 0,
    PL_F16 = 1,
    PL_Q4_0 = 2,
    PL_Q4_1 = 3,
    PL_Q5_0 = 6,
    PL_Q5_1 = 7,
    PL_Q8_0 = 8,
    PL_Q2_K = 10,
    PL_Q3_K = 11,
    PL_Q4_K = 12,
    PL_Q5_K = 13,
    PL_Q6_K = 14,
    PL_BF16 = 30
};

/* Elements and bytes of one block of a type; both 0 for a type that the core does not know. */
int32_t pl_type_block_elements(int32_t type);
int32_t pl_type_block_bytes(int32_t type);

/* Bytes of `n_rows` rows of `n_cols` elements, or -1 for an unknown type, a negative size, a row that is not whole
 * blocks, or a product beyond 2^62. */
int64_t pl_type_bytes(int32_t type, int64_t n_rows, int64_t n_cols);

/* Expands `n` elements (whole blocks) of `type` at `data` (`n_bytes` long) into float32. */
int32_t pl_dequantize(int32_t type, const void *data, int64_t n_bytes, int64_t n, float *out, pl_error *err);

/* ---- weights ------------------------------------------------------------------------------------------------------ */

/* One mapping that many matrices are laid into, so that large pages and mlock serve them all. */
typedef struct pl_arena pl_arena;

pl_arena *pl_arena_new(int64_t bytes, pl_error *err);
void pl_arena_free(pl_arena *arena);
int32_t pl_arena_lock(pl_arena *arena, pl_error *err);

/* A matrix re-laid into panels of 16 rows for products. */
typedef struct pl_weight pl_weight;

/* Bytes that the matrix takes in an arena, or -1. */
int64_t pl_weight_panel_bytes(int32_t type, int64_t n_rows, int64_t n_cols, pl_error *err);
/* `data` holds n_rows x n_cols elements as GGUF stores them; it is read during the call only. `pool` may be NULL. The
 * matrix lives in `arena`, which must outlive it (NULL: in memory of its own). */
pl_weight *pl_weight_new(pl_arena *arena, int32_t type, int64_t n_rows, int64_t n_cols, const void *data, int64_t n_bytes,
                         pl_pool *pool, pl_error *err);
/* The same with the `n_bytes` from `offset` on of a file that is open with this descriptor. Fails where the file ends before
 * them, or cannot be read. */
pl_weight *pl_weight_read(pl_arena *arena, int32_t type, int64_t n_rows, int64_t n_cols, int32_t file, int64_t offset,
                          int64_t n_bytes, pl_pool *pool, pl_error *err);
void pl_weight_free(pl_weight *w);
/* Expands rows[0..n) into out[n][n_cols]. */
int32_t pl_weight_rows(const pl_weight *w, const int32_t *rows, int32_t n, float *out, pl_error *err);
/* out[n_tokens][n_rows] = x[n_tokens][n_cols] times the transpose of w; activations are quantized as in a program. */
int32_t pl_weight_product(const pl_weight *w, const float *x, int32_t n_tokens, float *out, pl_pool *pool, pl_error *err);

/* ---- keys and values ---------------------------------------------------------------------------------------------- */

/* Tokens in a block. */
#define PL_BLOCK_TOKENS 32

/* The quantized ones are GGUF's: 32 elements of a head share a scale. */
enum pl_kv_type { PL_KV_F16 = 0, PL_KV_F32 = 1, PL_KV_Q8_0 = 2, PL_KV_Q4_0 = 3 };

/* A pool of `n_blocks` blocks; a block holds K and V of PL_BLOCK_TOKENS tokens for all layers. */
typedef struct pl_kv pl_kv;

/* The types are enum pl_kv_type; quantized ones need a `head_dim` that is a multiple of 32. */
pl_kv *pl_kv_new(int32_t n_layers, int32_t n_blocks, int32_t n_head_kv, int32_t head_dim, int32_t key_type,
                 int32_t value_type, pl_error *err);
void pl_kv_free(pl_kv *kv);
int64_t pl_kv_bytes(const pl_kv *kv);

/* ---- programs ----------------------------------------------------------------------------------------------------- */

/*
 * A program is a flat list of ops over values. A value is a matrix with one row per token (PL_ROWS_TOKENS) or one per
 * requested output (PL_ROWS_OUTPUTS), `width` columns wide, either float32 or quantized to int8 ("q8": int8 with a float
 * scale per 32 columns, laid out as c_core/src/activations.h tells). Values live in slots:
 * two values whose lives do not overlap may share one. `pl_program_new` checks every index and every width.
 */
enum pl_value_kind { PL_VALUE_F32 = 0, PL_VALUE_Q8 = 1 };
enum pl_rows { PL_ROWS_TOKENS = 0, PL_ROWS_OUTPUTS = 1 };

typedef struct pl_value {
    int32_t kind;  /* enum pl_value_kind */
    int32_t rows;  /* enum pl_rows */
    int32_t width; /* columns */
    int32_t slot;  /* which memory it lives in */
} pl_value;

/*
 * kind              src                   dst               weights / vectors        n, f
 * PL_OP_EMBED       -                     x                 w0 = table               f0 = factor
 * PL_OP_ROPE_TABLE  -                     cos|sin           v0 = inverse freqs[n/2]  n0 = n rotated, f0 = magnitude
 * PL_OP_RMS_NORM    x                     y f32?, y q8?     v0 = factor[width]       f0 = epsilon
 * PL_OP_NORM_ADD    residual, x           sum               v0 = factor[width]       f0 = epsilon: residual + norm(x)*v0
 * PL_OP_QUANTIZE    x                     y q8
 * PL_OP_ADD         a, b                  a + b
 * PL_OP_SCALE       x                     f0 * x
 * PL_OP_LINEAR      x, residual?          up to 3 (f32)     w0..w2, v0..v2 = biases? (dst i = x times w i + bias i)
 * PL_OP_GLU         x                     y f32?, y q8?     w0 = gate, w1 = up       n0 = enum pl_activation
 * PL_OP_QKV         q, k, v, cos|sin?     q (in place)      v0, v1 = q/k head norm?  n: layer, n_head, rotated, rope kind
 *                                                                                    f0 = epsilon, f1 = factor on q
 * PL_OP_ATTENTION   q                     y f32             -                        n: layer, n_head, window (0: none)
 *                                                                                    f0 = soft cap (0: none)
 * PL_OP_SELECT      up to 3 x (tokens)    as many y (outputs)
 * PL_OP_HIDDEN      x (outputs)           -> batch.hidden
 * PL_OP_LOGITS      x (outputs)           -> batch.logits   w0: a row for each token f0 = factor, f1 = soft cap (0: none)
 */
enum pl_op_kind {
    PL_OP_EMBED = 0,
    PL_OP_ROPE_TABLE = 1,
    PL_OP_RMS_NORM = 2,
    PL_OP_NORM_ADD = 3,
    PL_OP_QUANTIZE = 4,
    PL_OP_ADD = 5,
    PL_OP_SCALE = 6,
    PL_OP_LINEAR = 7,
    PL_OP_GLU = 8,
    PL_OP_QKV = 9,
    PL_OP_ATTENTION = 10,
    PL_OP_SELECT = 11,
    PL_OP_HIDDEN = 12,
    PL_OP_LOGITS = 13
};

enum pl_activation { PL_SILU = 0, PL_GELU_TANH = 1 };

/* Which elements rotate together: neighbours (2i, 2i+1), or (i, i + n/2). */
enum pl_rope_kind { PL_ROPE_PAIRS = 0, PL_ROPE_HALVES = 1 };

typedef struct pl_op {
    int32_t kind;   /* enum pl_op_kind */
    int32_t src[4]; /* value numbers, -1 for none */
    int32_t dst[3]; /* value numbers, -1 for none */
    int32_t n[4];
    float f[2];
    const pl_weight *w[3]; /* must outlive the program */
    const float *v[3];     /* must outlive the program */
    int64_t v_len[3];      /* elements of v */
} pl_op;

typedef struct pl_program pl_program;

/* `kv` (NULL: no attention) and `pool` (NULL: one thread) must outlive the program. */
pl_program *pl_program_new(const pl_op *ops, int32_t n_ops, const pl_value *values, int32_t n_values, int32_t n_slots,
                           int32_t max_tokens, int32_t max_outputs, pl_kv *kv, pl_pool *pool, pl_error *err);
void pl_program_free(pl_program *p);
/* Bytes of working memory. */
int64_t pl_program_bytes(const pl_program *p);

/* One sequence's part of a batch: `n_tokens` new tokens that come after `n_past` tokens whose K and V are in `blocks`.
 * The new tokens' K and V are written to positions n_past .. n_past + n_tokens - 1 of the same blocks. */
typedef struct pl_sequence {
    int32_t first;    /* index of the first new token in pl_batch.tokens */
    int32_t n_tokens; /* new tokens */
    int32_t n_past;
    int32_t n_blocks;
    const int32_t *blocks;
} pl_sequence;

typedef struct pl_batch {
    int32_t n_tokens; /* 1 .. max_tokens, the sum of the sequences' n_tokens, in the sequences' order */
    const int32_t *tokens;
    int32_t n_sequences;
    const pl_sequence *sequences;
    int32_t n_outputs;      /* 0 .. max_outputs */
    const int32_t *outputs; /* token indices, ascending */
    float *logits;          /* [n_outputs][n_vocab], or NULL */
    float *peaks;           /* [n_outputs][n_vocab / PL_PEAK_LOGITS, rounded up]: the largest of so many logits; or NULL */
    float *hidden;          /* [n_outputs][n_embd], or NULL */
} pl_batch;

/* Runs the program on `n_threads` of the pool's threads (0: all). Not to be called for one program, or one pool, from two
 * threads at a time. */
int32_t pl_run(pl_program *p, int32_t n_threads, const pl_batch *batch, pl_error *err);

/* Copies K and V of positions [src_pos, src_pos + n) of one block list to positions [dst_pos, dst_pos + n) of another, and
 * rotates K by dst_pos - src_pos with the rope of each layer in the program (nothing is rotated when the two are equal).
 * Positions are copied in ascending order, so that a range may move down over itself; it may not move up over itself. */
int32_t pl_kv_copy(const pl_program *p, const int32_t *src_blocks, int32_t n_src, int32_t src_pos,
                   const int32_t *dst_blocks, int32_t n_dst, int32_t dst_pos, int32_t n, pl_error *err);

/* ---- sampling helpers (c_core/src/sampling.c) ---------------------------------------------------------------------- */

/* Logits that are NaN or -infinity are never taken; +infinity counts as the largest finite number. Of two equal logits the
 * one with the lower token number is the better. */

/* Of so many neighbouring logits a run notes the largest, so that sampling need not look at all of them. */
enum { PL_PEAK_LOGITS = 32 };

/* log(sum of e^(logit * scale)), scale > 0; -infinity when there is nothing to sum. */
double pl_log_sum_exp(const float *logits, int32_t n, double scale);
/* Writes the k >= 1 best tokens[k] and their logits, the best first, and returns how many there are. */
int32_t pl_top_k(const float *logits, int32_t n, int32_t k, int32_t *tokens, double *values, pl_error *err);

/* The first step of a chain selects candidates from the whole vocabulary, the others thin them out. */
enum pl_sampling_step_kind {
    PL_SELECT_TOP_K = 0,      /* value: k >= 1 */
    PL_SELECT_TOP_P = 1,      /* p; the same as PL_KEEP_TOP_P of everything */
    PL_SELECT_MIN_P = 2,      /* p, 0: everything; the same as PL_KEEP_MIN_P of everything */
    PL_SELECT_MIROSTAT_1 = 3, /* mu */
    PL_SELECT_MIROSTAT_2 = 4, /* mu */
    PL_KEEP_TAIL_FREE = 5,    /* z */
    PL_KEEP_TYPICAL = 6,      /* p */
    PL_KEEP_TOP_P = 7,        /* p */
    PL_KEEP_MIN_P = 8,        /* p > 0 */
    PL_TEMPERATURE = 9        /* divides the logits by the temperature; the value is not looked at */
};

typedef struct pl_sampling_step {
    int32_t kind; /* enum pl_sampling_step_kind */
    double value;
} pl_sampling_step;

/* How to get from logits to a token; the caller owns everything that is pointed to. */
typedef struct pl_sampling {
    int32_t n_vocab;
    int32_t n_biased; /* biased tokens, and what is added to their logits */
    const int32_t *biased;
    const float *bias;
    int32_t n_recent; /* tokens that are penalized, in any order; those outside the vocabulary and `exempt` are not */
    int32_t *recent;
    int32_t n_window, oldest; /* `recent` is a ring of so many, and where the next one goes; 0: nothing is penalized */
    int32_t exempt;             /* -1: none */
    float repeat;               /* > 0: positive logits are divided by it, the others multiplied with it */
    float frequency, presence;  /* subtracted for each time, and once */
    int32_t n_steps;
    pl_sampling_step *steps;
    double temperature; /* > 0; also used by mirostat's selections */
    double tau, eta;    /* what mirostat aims at, in bits, and its learning rate; 0: there is no mu to learn */
    /* The candidates at the end of the chain, the best first, are written here. Room for k if top-k selects, for the whole
     * vocabulary otherwise. */
    int32_t room;
    int32_t *tokens;
    double *logits;
    double *work; /* as large */
    int32_t n_candidates;
    int32_t chosen;   /* index of the drawn candidate */
    double log_total; /* log of the sum of e^logit over the candidates */
} pl_sampling;

/* Adds the biases to the logits and penalizes recent tokens, in place, then does the same as pl_choose. `peaks`: as pl_run
 * gave them for these logits, which changes them likewise; or NULL. */
int32_t pl_sample(pl_sampling *sampling, float *logits, float *peaks, double random, pl_error *err);
/* Runs the chain and draws one of the candidates by a random number 0 <= random < 1 (0: the best one). Returns their number, which
 * is 0 when there is no logit to take. */
int32_t pl_choose(pl_sampling *sampling, const float *logits, double random, pl_error *err);
/* Counts the chosen token as part of the text: among the recent ones, and in mirostat's mu. */
void pl_accept(pl_sampling *sampling, int32_t token);

/* ---- several steps in one call (c_core/src/generate.c) -------------------------------------------------------------- */

/* How to go on with a batch of sequences that have one new token each; the caller owns everything that is pointed to. */
typedef struct pl_generation {
    int32_t n_steps; /* at most, >= 1 */
    pl_sequence *sequences; /* those of the batch; n_past grows, and there are blocks for all steps */
    pl_sampling *const *samplings; /* one for each sequence */
    const double *randoms; /* [n_steps][n_sequences]: for pl_sample */
    int32_t n_ends;
    const int32_t *ends; /* tokens that end a text */
    int32_t *tokens; /* [n_steps][n_sequences]: what was chosen; -1: there was nothing to choose */
} pl_generation;

/* Runs the program, chooses a token for each sequence, runs it with these, and so on, until a text ends. The batch wants
 * logits of all its tokens, of which those of the last step are left. Returns the number of steps. */
int32_t pl_generate(pl_program *p, int32_t n_threads, const pl_batch *batch, const pl_generation *generation, pl_error *err);

/*
 * Grammars (c_core/src/grammar.c). A grammar is a network of nodes; every rule has its own. Matching is over code points:
 *
 * kind                argument            what it does
 * PL_GRAMMAR_CHARS    number of a set     consumes one character of the set, goes on to `next`
 * PL_GRAMMAR_CALL     number of a rule    consumes what the rule matches, goes on to `next`
 * PL_GRAMMAR_FORK     node, or -1         consumes nothing, goes on to `next` and to the other node
 * PL_GRAMMAR_END      -                   the rule has matched
 */
enum pl_grammar_node_kind { PL_GRAMMAR_CHARS = 0, PL_GRAMMAR_CALL = 1, PL_GRAMMAR_FORK = 2, PL_GRAMMAR_END = 3 };

typedef struct pl_grammar_node {
    int32_t kind; /* enum pl_grammar_node_kind */
    int32_t argument;
    int32_t next; /* node number; -1 for PL_GRAMMAR_END */
} pl_grammar_node;

typedef struct pl_grammar pl_grammar;

/* starts[i] is the first node of rule i; `root` is the rule to begin with. Set i is ranges[2 * j], ranges[2 * j + 1] (first
 * and last code point) for ends[i] <= j < ends[i + 1], ascending and disjoint. Everything is copied. A rule that can come to
 * itself without consuming a character is refused, and its number is put into *left_recursive. Never changes afterwards. */
pl_grammar *pl_grammar_new(const pl_grammar_node *nodes, int32_t n_nodes, const int32_t *starts, int32_t n_rules,
                           int32_t root, const int32_t *ranges, const int32_t *ends, int32_t n_sets,
                           int32_t *left_recursive, pl_error *err);
void pl_grammar_free(pl_grammar *grammar);

/* The bytes of all tokens as a tree. Never changes after it is made. */
typedef struct pl_trie pl_trie;

/* Token i is the bytes offsets[i] to offsets[i + 1] of data; they are read during the call only. */
pl_trie *pl_trie_new(const uint8_t *data, int64_t n_data, const int32_t *offsets, int32_t n_tokens, pl_error *err);
void pl_trie_free(pl_trie *trie);

/* Follows one text through a grammar, which must outlive it. */
typedef struct pl_matcher pl_matcher;

pl_matcher *pl_matcher_new(const pl_grammar *grammar, pl_error *err);
void pl_matcher_free(pl_matcher *matcher);
/* 1 if these bytes (UTF-8, which may begin and end inside a character) may come next, or 0. */
int32_t pl_matcher_allows(pl_matcher *matcher, const uint8_t *bytes, int64_t n_bytes, pl_error *err);
/* The same; when they may, they have come. */
int32_t pl_matcher_accept(pl_matcher *matcher, const uint8_t *bytes, int64_t n_bytes, pl_error *err);
/* Whether the text may end here; whether it may, and no character can follow. */
int32_t pl_matcher_can_end(const pl_matcher *matcher);
int32_t pl_matcher_must_end(const pl_matcher *matcher);
/* Sets to -infinity the logits[n_logits] of the trie's tokens that may not come next, and of those without bytes. */
int32_t pl_matcher_mask(pl_matcher *matcher, const pl_trie *trie, float *logits, int32_t n_logits, pl_error *err);

/* ---- tokenizer helpers (c_core/src/bpe.c) -------------------------------------------------------------------------- */

/* GGUF's numbers for the kinds of tokens. */
enum pl_token_type {
    PL_TOKEN_NORMAL = 1,
    PL_TOKEN_UNKNOWN = 2,
    PL_TOKEN_CONTROL = 3,
    PL_TOKEN_USER_DEFINED = 4,
    PL_TOKEN_UNUSED = 5,
    PL_TOKEN_BYTE = 6
};

/* The texts of all tokens, found by number and by text. */
typedef struct pl_vocab pl_vocab;

/* The text of token i is the `sizes[i]` bytes at data[starts[i]]; an empty one is never found, and no two others may be
 * equal. Everything is copied. */
pl_vocab *pl_vocab_new(const uint8_t *data, int64_t n_data, const int64_t *starts, const int64_t *sizes, int64_t n_tokens,
                       pl_error *err);
void pl_vocab_free(pl_vocab *vocab);
/* Bytes of all texts together. */
int32_t pl_vocab_bytes(const pl_vocab *vocab);
/* The token with this text, or -1. */
int32_t pl_vocab_find(const pl_vocab *vocab, const uint8_t *text, int64_t n_bytes);
/* Copies all texts, one after the other, to out[pl_vocab_bytes]; that of token i begins at starts[i], and
 * starts[n_tokens] is where the last one ends. */
void pl_vocab_texts(const pl_vocab *vocab, uint8_t *out, int32_t *starts);
/* The same with the bytes that each token stands for in a text. Normal tokens are spelled in GPT-2's alphabet when
 * `byte_level`, with U+2581 for spaces otherwise; user-defined ones are plain text; byte tokens are spelled <0xNN>; those
 * of the other types are empty. `types` has one enum pl_token_type for each token. */
int32_t pl_vocab_decode(const pl_vocab *vocab, const int32_t *types, int32_t byte_level, uint8_t *out, int32_t *starts,
                        pl_error *err);

/* Finds tokens that are matched in a text before anything else is. */
typedef struct pl_splitter pl_splitter;

/* `tokens` come in ascending order of their texts, compared byte by byte; none is empty. `vocab` must outlive it. */
pl_splitter *pl_splitter_new(const pl_vocab *vocab, const int32_t *tokens, int32_t n_tokens, pl_error *err);
void pl_splitter_free(pl_splitter *splitter);
/* Cuts a text into pieces: piece i is sizes[i] bytes long and is tokens[i], or not a token of the splitter (-1). The
 * leftmost match is taken, of several at one place the longest. Returns the number of pieces; there must be room for
 * `n_bytes` of them. */
int64_t pl_split(const pl_splitter *splitter, const uint8_t *text, int64_t n_bytes, int32_t *sizes, int32_t *tokens,
                 pl_error *err);

/* The words that byte-level models cut a text into; pyllama/tokenizer/bpe.py gives the regular expressions. */
enum pl_words { PL_WORDS_GPT2 = 0, PL_WORDS_SMOLLM = 1, PL_WORDS_LLAMA3 = 2, PL_WORDS_QWEN2 = 3, PL_WORDS_DEFAULT = 4 };

/* Cuts the pieces of a text further, those that are no tokens, into words of a kind (enum pl_words). Returns the number of
 * pieces there are now; there must be room for `n_bytes` of them. */
int64_t pl_cut_words(int32_t kind, const uint8_t *text, int64_t n_bytes, const int32_t *sizes, const int32_t *tokens,
                     int64_t n_pieces, int32_t *word_sizes, int32_t *word_tokens, pl_error *err);

/* Byte-pair encoding: neighbouring symbols are merged, the best pair first (of equal ones the leftmost), until no pair is
 * in the rules. */
typedef struct pl_bpe pl_bpe;

/* Rules in GPT-2's manner: symbols are bytes, spelled in its alphabet; merge i is "left right", and earlier ones are
 * better. With `whole_first` a piece that is a token is taken as it stands. `vocab` must outlive the object. */
pl_bpe *pl_bpe_new_ranked(const pl_vocab *vocab, const uint8_t *data, int64_t n_data, const int64_t *starts,
                          const int64_t *sizes, int64_t n_merges, int32_t whole_first, pl_error *err);
/* Rules in SentencePiece's manner: symbols are characters, with U+2581 for spaces; a pair may be merged when it makes a
 * token, and those with a higher score are better. Characters that are no token become their bytes' tokens <0xNN>, or
 * `unknown` (-1: nothing) where these are missing too. `vocab` must outlive the object. */
pl_bpe *pl_bpe_new_scored(const pl_vocab *vocab, const float *scores, int64_t n_scores, int32_t unknown, pl_error *err);
void pl_bpe_free(pl_bpe *bpe);
/* Encodes a text that was cut into pieces: each is sizes[i] bytes long and already is tokens[i], or is to be encoded (-1).
 * With `space_prefix` a space is put before a piece to be encoded that comes first or after a token. Returns the number
 * of tokens written to out[n_out], of which 3 * (n_bytes + n_pieces) are always enough. */
int64_t pl_bpe_encode(const pl_bpe *bpe, const uint8_t *text, int64_t n_bytes, const int32_t *sizes, const int32_t *tokens,
                      int64_t n_pieces, int32_t space_prefix, int32_t *out, int64_t n_out, pl_error *err);


/* ---- container helpers (c_core/src/gguf.c) ------------------------------------------------------------------------- */

/* Walks `n_strings` strings (a 64-bit length, then that many bytes) that begin at `data`, and notes where the bytes of each
 * begin, counted from `data`, and how many they are. Returns the bytes walked over. */
int64_t pl_gguf_scan_strings(const void *data, int64_t n_bytes, int64_t n_strings, int64_t *offsets, int64_t *lengths,
                             pl_error *err);

/* ---- machine limits, measured (c_core/src/measure.c) --------------------------------------------------------------- */

/* How fast `n_threads` of the pool's threads (0: all) read memory from end to end: the best of the passes over `bytes`
 * (at least 1 MiB; should be many times the caches) that begin within `seconds`, in 10^9 bytes a second. */
int32_t pl_measure_read_bandwidth(pl_pool *pool, int32_t n_threads, int64_t bytes, double seconds, double *rate,
                                  pl_error *err);
/* How fast they multiply and add int8 numbers in registers, with the instruction that products use: in 10^9 operations a
 * second, a multiplication and its addition being two. */
int32_t pl_measure_int8_rate(pl_pool *pool, int32_t n_threads, double seconds, double *rate, pl_error *err);

#ifdef __cplusplus
}
#endif

#endif
