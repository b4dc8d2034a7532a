/* The numbers of a long JSON array, from text to memory, for arrays.py. The functions it calls are at the end.
 *
 * Nothing here is an error: where a text is not a plain array of numbers, or a number has so many digits that
 * rounding it takes more than is here, the result is -1, and arrays.py leaves the text to a JSON parser. So
 * this must be right about all that it accepts, and need not accept everything.
 *
 * Eight digits at a time in one word: D. Lemire, "Number Parsing at a Gigabyte per Second", Software: Practice
 * and Experience 51 (8), 2021, section 5. When one multiplication or division of doubles is the exact way to
 * read a number: W. D. Clinger, "How to Read Floating Point Numbers Accurately", PLDI 1990, section 4.
 */
#include <float.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || FLT_EVAL_METHOD != 0 || defined __FAST_MATH__
#error "arrays.c wants little-endian words, and doubles that are rounded as doubles; the gateway runs without it"
#endif

enum kind { FLOAT, DOUBLE, INTEGER };

/* digits * 10^exponent, below zero if `negative` is 1. */
struct number {
    uint64_t digits, negative;
    int64_t exponent;
    int whole; /* written with neither a point nor an exponent */
};

#define EVERY_BYTE(value) (UINT64_C(0x0101010101010101) * (value))

/* Divided or multiplied by these, digits get the sign as well. */
static const double TENS[2][23] = {
    {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
     1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22},
    {-1e0,  -1e1,  -1e2,  -1e3,  -1e4,  -1e5,  -1e6,  -1e7,  -1e8,  -1e9,  -1e10, -1e11,
     -1e12, -1e13, -1e14, -1e15, -1e16, -1e17, -1e18, -1e19, -1e20, -1e21, -1e22},
};
static const uint64_t POWERS[] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000};
/* The most that n digits can be put behind without leaving 64 bits: (2^64 - 10^n) / 10^n, rounded down. */
static const uint64_t ROOM[] = {UINT64_MAX,     1844674407370955160, 184467440737095515, 18446744073709550, 1844674407370954,
                                184467440737094, 18446744073708,     1844674407369,      184467440736};

static inline int is_digit(unsigned char byte) { return (unsigned char)(byte - '0') < 10; }

static inline const unsigned char *spaces(const unsigned char *at, const unsigned char *end) {
    while (at < end && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t')) at++;
    return at;
}

static inline uint64_t word(const unsigned char *at) {
    uint64_t bytes;
    memcpy(&bytes, at, 8);
    return bytes;
}

/* The high bit of each byte that is no digit, exact up to the first of them. `values` are the bytes less '0'. */
static inline uint64_t no_digits(uint64_t bytes, uint64_t values) {
    return ((bytes + EVERY_BYTE(0x46)) | values) & EVERY_BYTE(0x80);
}

/* The number that the digits in the word's eight bytes, the first the highest, make. */
static inline uint64_t eight_digits(uint64_t values) {
    values = values * 10 + (values >> 8);
    uint64_t first = (values & 0x000000FF000000FF) * 0x000F424000000064;
    uint64_t second = ((values >> 16) & 0x000000FF000000FF) * 0x0000271000000001;
    return (first + second) >> 32;
}

/* Puts the digits at `at` behind those there are already; returns where they end, NULL if that is out of room. */
static inline const unsigned char *more_digits(const unsigned char *at, const unsigned char *end, uint64_t *digits) {
    for (;;) {
        uint64_t bytes = 0;
        if (end - at >= 8) bytes = word(at);
        else memcpy(&bytes, at, (size_t)(end - at));
        uint64_t values = bytes - EVERY_BYTE('0'), others = no_digits(bytes, values);
        int bits = others ? __builtin_ctzll(others) & 0x38 : 64, count = bits / 8;
        if (!count) return at;
        if (*digits > ROOM[count]) return NULL;
        *digits = *digits * POWERS[count] + eight_digits(values << (64 - bits)); /* zeros come in before the first */
        at += count;
        if (count < 8) return at;
    }
}

static const unsigned char *exponent_part(const unsigned char *at, const unsigned char *end, int64_t *exponent) {
    int64_t sign = 1, value = 0;
    if (at < end && (*at == '+' || *at == '-')) sign = *at++ == '-' ? -1 : 1;
    if (at == end || !is_digit(*at)) return NULL;
    for (; at < end && is_digit(*at); at++) {
        value = value * 10 + (*at - '0');
        if (value > 999) return NULL;
    }
    *exponent += sign * value;
    return at;
}

/* Reads the number at `at`, which is before `end`; returns where it ends, NULL if there is none. */
static inline const unsigned char *scan(const unsigned char *at, const unsigned char *end, struct number *found) {
    found->negative = *at == '-';
    found->exponent = 0;
    found->whole = 1;
    at += found->negative;
    if (at == end || !is_digit(*at)) return NULL;
    found->digits = (uint64_t)(*at++ - '0');
    if (at < end && is_digit(*at)) {
        if (!found->digits) return NULL; /* JSON has no leading zeros */
        at = more_digits(at, end, &found->digits);
        if (!at) return NULL;
    }
    if (at < end && *at == '.') {
        const unsigned char *fraction = ++at;
        at = more_digits(at, end, &found->digits);
        if (!at || at == fraction) return NULL;
        found->exponent = fraction - at;
        found->whole = 0;
    }
    if (at < end && (*at | 0x20) == 'e') {
        found->whole = 0;
        return exponent_part(at + 1, end, &found->exponent);
    }
    if (found->whole && !found->digits) found->negative = 0; /* to a JSON parser "-0" is the integer 0 */
    return at;
}

/* The double nearest to the number if that is `exact`, else one not farther than 2^-50 of it away. 0: neither. */
static inline int as_double(const struct number *found, double *value, int *exact) {
    const double *tens = TENS[found->negative];
    int64_t exponent = found->exponent;
    double digits = (double)found->digits;
    *exact = found->digits <= UINT64_C(1) << 53 && exponent >= -22 && exponent <= 22;
    if (exponent < -22) {
        digits /= TENS[0][22];
        exponent += 22;
    }
    if (exponent < -22 || exponent > 22) return 0;
    *value = exponent < 0 ? digits / tens[-exponent] : digits * tens[exponent];
    return 1;
}

static inline int store(const struct number *found, void *places, int64_t index, enum kind kind) {
    double value;
    int exact;
    if (found->whole && found->digits > INT64_MAX) return 0; /* parsers differ about those */
    if (kind == INTEGER) {
        if (!found->whole) return 0;
        ((int64_t *)places)[index] = found->negative ? -(int64_t)found->digits : (int64_t)found->digits;
        return 1;
    }
    if (!as_double(found, &value, &exact)) return 0;
    if (kind == DOUBLE) {
        ((double *)places)[index] = value;
        return exact;
    }
    float nearest = ((float *)places)[index] = (float)value;
    /* Where all that the exact double may be makes one float, that is the float the exact double makes. */
    return exact || ((float)(value * (1 - 0x1p-49)) == nearest && (float)(value * (1 + 0x1p-49)) == nearest);
}

/* Numbers like 0.5 and -1.2345678, of which most tensors are made, for as long as one follows the other with a
 * comma in between: in a third fewer instructions than `scan` takes, none of which waits for the sign.
 */
static inline const unsigned char *short_decimals(
    const unsigned char *at, const unsigned char *end, void *places, int64_t *count, int64_t room, enum kind kind) {
    int64_t index = *count;
    for (; end - at >= 16 && index < room; index++) {
        uint64_t bytes = word(at), plain = word(at + 2), signed_ = word(at + 3), negative = *at == '-', chosen = 0 - negative;
        uint64_t plain_values = plain - EVERY_BYTE('0'), signed_values = signed_ - EVERY_BYTE('0');
        uint64_t plain_others = no_digits(plain, plain_values), signed_others = no_digits(signed_, signed_values);
        uint64_t others = plain_others ^ ((plain_others ^ signed_others) & chosen);
        uint64_t values = plain_values ^ ((plain_values ^ signed_values) & chosen);
        if (!others) break;
        bytes >>= negative * 8;
        uint64_t lead = (bytes & 0xFF) - '0', bits = (uint64_t)__builtin_ctzll(others) & 0x38, fraction = bits / 8;
        if (lead > 9 || (bytes & 0xFF00) != '.' << 8 || !fraction) break;
        const unsigned char *after = at + negative + 2 + fraction;
        if (after[0] != ',' || (unsigned char)(after[1] - '-') > '9' - '-') break;
        double digits = (double)(int64_t)eight_digits((values << 8 | lead) << (56 - bits));
        if (kind == FLOAT) ((float *)places)[index] = (float)(digits / TENS[negative][fraction]);
        else ((double *)places)[index] = digits / TENS[negative][fraction];
        at = after + 1;
    }
    *count = index;
    return at;
}

/* Skips `count` brackets and the spaces after each; returns where they end, NULL if there are fewer. */
static const unsigned char *brackets(const unsigned char *at, const unsigned char *end, unsigned char bracket, int64_t count) {
    for (; count; count--) {
        if (at == end || *at != bracket) return NULL;
        at = spaces(at + 1, end);
    }
    return at;
}

/* From behind a number to the next one; to `end` after the last. NULL: there is something else. */
static inline const unsigned char *next(const unsigned char *at, const unsigned char *end, int64_t depth) {
    int64_t closed = 0;
    at = spaces(at, end);
    for (; at < end && *at == ']'; closed++) at = spaces(at + 1, end);
    if (closed >= depth) return closed == depth && at == end ? end : NULL;
    if (at == end || *at != ',') return NULL;
    at = brackets(spaces(at + 1, end), end, '[', closed);
    return at == end ? NULL : at;
}

/* always_inline: each of the three functions below becomes a loop of its own that asks for no kind. */
static inline __attribute__((always_inline)) int64_t read_all(
    const unsigned char *text, int64_t size, int64_t depth, void *places, int64_t room, enum kind kind) {
    const unsigned char *end = text + size, *at = brackets(text, end, '[', depth);
    int64_t count = 0;
    struct number found;
    if (!at || at == end) return -1;
    do {
        if (kind != INTEGER) at = short_decimals(at, end, places, &count, room, kind);
        at = scan(at, end, &found);
        if (!at || count == room || !store(&found, places, count++, kind)) return -1;
        if (end - at > 1 && *at == ',' && at[1] > ' ' && at[1] != '[') at++; /* what `next` does, most of the time */
        else at = next(at, end, depth);
    } while (at && at < end);
    return at ? count : -1;
}

/* Each reads the JSON array in the `size` bytes from `start` of `text`, whose numbers all lie `depth` (1 or more)
 * arrays deep, into `places`, and returns how many there are: -1 if more than `room`, or if it is not for this file.
 */
int64_t lockgate_floats(const char *text, int64_t start, int64_t size, int64_t depth, float *places, int64_t room) {
    return read_all((const unsigned char *)text + start, size, depth, places, room, FLOAT);
}

int64_t lockgate_doubles(const char *text, int64_t start, int64_t size, int64_t depth, double *places, int64_t room) {
    return read_all((const unsigned char *)text + start, size, depth, places, room, DOUBLE);
}

int64_t lockgate_integers(const char *text, int64_t start, int64_t size, int64_t depth, int64_t *places, int64_t room) {
    return read_all((const unsigned char *)text + start, size, depth, places, room, INTEGER);
}

/* The digest of the source this was compiled from: arrays.py wants it to be the one that lies beside it. */
const char *lockgate_source(void) { return LOCKGATE_SOURCE; }
