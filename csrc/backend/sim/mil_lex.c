#include "backend/sim/mil_lex.h"

#include <math.h>
#include <string.h>

static int is_digit(char c) { return c >= '0' && c <= '9'; }

static int is_word_start(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

static int is_word(char c) { return is_word_start(c) || is_digit(c) || c == '@' || c == '.'; }

static int hex_digit(char c) {
    if (is_digit(c)) return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

static void bad(struct mil_lexer *l, const char *problem) {
    l->kind = MIL_T_BAD;
    l->problem = problem;
}

static void skip_space(struct mil_lexer *l) {
    while (l->at < l->end) {
        if (*l->at == '\n') {
            l->line++;
            l->line_start = l->at + 1;
        } else if (*l->at != ' ' && *l->at != '\t' && *l->at != '\r') {
            return;
        }
        l->at++;
    }
}

static void read_string(struct mil_lexer *l) {
    const char *start = ++l->at;
    while (l->at < l->end && *l->at != '"' && *l->at != '\n') l->at += *l->at == '\\' && l->at + 1 < l->end ? 2 : 1;
    if (l->at >= l->end || *l->at != '"') {
        bad(l, "this string has no closing quote on its line");
        return;
    }
    l->kind = MIL_T_STRING;
    l->text = (struct mil_name){start, (int32_t)(l->at - start)};
    l->at++;
}

/* An exponent after `e` or `p`; what does not fit is cut to +-99999, which is 0 or inf in every type. */
static int read_exponent(struct mil_lexer *l, int *exponent) {
    int negative = 0, value = 0;
    if (l->at < l->end && (*l->at == '+' || *l->at == '-')) negative = *l->at++ == '-';
    if (l->at >= l->end || !is_digit(*l->at)) return 0;
    for (; l->at < l->end && is_digit(*l->at); l->at++) value = value < 99999 ? value * 10 + (*l->at - '0') : 99999;
    *exponent = negative ? -value : value;
    return 1;
}

/* value * 10^exponent. Within 2 ulp of a double, which is exact for every fp16 and fp32 that is printed with enough
 * digits; the C library's strtod depends on the locale. */
static double scale10(double value, int exponent) {
    if (value == 0.0) return 0.0;
    if (exponent > 400) return INFINITY;
    if (exponent < -400) return 0.0;
    static const double small[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                   1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    for (; exponent > 22; exponent -= 22) value *= 1e22;
    for (; exponent < -22; exponent += 22) value /= 1e22;
    return exponent >= 0 ? value * small[exponent] : value / small[-exponent];
}

static void read_decimal(struct mil_lexer *l) {
    uint64_t digits = 0;
    int n_kept = 0, scale = 0, exponent = 0, any = 0, overflow = 0;
    l->is_integer = 1;
    for (int after_point = 0; l->at < l->end; l->at++) {
        if (*l->at == '.' && !after_point) {
            after_point = 1;
            l->is_integer = 0;
            continue;
        }
        if (!is_digit(*l->at)) break;
        any = 1;
        const unsigned digit = (unsigned)(*l->at - '0');
        if (digits <= (UINT64_MAX - digit) / 10) {
            digits = digits * 10 + digit;
            scale -= after_point;
            n_kept++;
        } else {
            overflow = 1; /* 19 digits are known: more of them only scale */
            scale += !after_point;
        }
    }
    if (any && l->at < l->end && (*l->at == 'e' || *l->at == 'E')) {
        l->at++;
        l->is_integer = 0;
        any = read_exponent(l, &exponent);
    }
    if (!any || n_kept < 0 || (l->at < l->end && is_word(*l->at))) {
        bad(l, "this is not a number");
        return;
    }
    if (overflow) l->is_integer = 0;
    if (scale > 1000000) scale = 1000000;
    if (scale < -1000000) scale = -1000000;
    l->integer = digits;
    l->number = scale10((double)digits, scale + exponent);
}

/* C99 hexadecimal floats, as coremltools prints them: 0x1.8p-3. */
static void read_hex(struct mil_lexer *l) {
    uint64_t digits = 0;
    int scale = 0, exponent = 0, any = 0, overflow = 0;
    l->at += 2;
    l->is_integer = 1;
    for (int after_point = 0; l->at < l->end; l->at++) {
        if (*l->at == '.' && !after_point) {
            after_point = 1;
            l->is_integer = 0;
            continue;
        }
        const int digit = hex_digit(*l->at);
        if (digit < 0) break;
        any = 1;
        if (digits >> 60 == 0) {
            digits = digits << 4 | (unsigned)digit;
            scale -= 4 * after_point;
        } else {
            overflow = 1;
            if (!after_point && scale < 100000) scale += 4;
        }
    }
    if (any && l->at < l->end && (*l->at == 'p' || *l->at == 'P')) {
        l->at++;
        l->is_integer = 0;
        any = read_exponent(l, &exponent);
    }
    if (!any || (l->at < l->end && is_word(*l->at))) {
        bad(l, "this is not a number");
        return;
    }
    if (overflow) l->is_integer = 0;
    if (scale < -100000) scale = -100000;
    l->integer = digits;
    l->number = ldexp((double)digits, scale + exponent);
}

static void read_number(struct mil_lexer *l) {
    l->kind = MIL_T_NUMBER;
    l->is_negative = *l->at == '-';
    if (*l->at == '-' || *l->at == '+') l->at++;
    const size_t left = (size_t)(l->end - l->at);
    if (left >= 3 && memcmp(l->at, "inf", 3) == 0 && (left == 3 || !is_word(l->at[3]))) {
        l->at += 3;
        l->is_integer = 0;
        l->number = INFINITY;
    } else if (left >= 2 && l->at[0] == '0' && (l->at[1] == 'x' || l->at[1] == 'X')) {
        read_hex(l);
    } else {
        read_decimal(l);
    }
    if (l->is_negative) l->number = -l->number;
}

void mil_lex_start(struct mil_lexer *l, const char *text, size_t bytes) {
    *l = (struct mil_lexer){.at = text, .end = text + bytes, .line_start = text, .line = 1};
    if (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) l->at += 3;
    mil_lex_next(l);
}

void mil_lex_next(struct mil_lexer *l) {
    skip_space(l);
    const int64_t column = l->at - l->line_start + 1;
    l->place = (struct mil_place){l->line, column < INT32_MAX ? (int32_t)column : INT32_MAX};
    if (l->at >= l->end) {
        l->kind = MIL_T_END;
        return;
    }
    const char c = *l->at;
    const char *start = l->at;
    if (is_word_start(c)) {
        while (l->at < l->end && is_word(*l->at)) l->at++;
        l->kind = MIL_T_WORD;
        l->text = (struct mil_name){start, (int32_t)(l->at - start)};
    } else if (c == '"') {
        read_string(l);
    } else if (c == '-' && l->at + 1 < l->end && l->at[1] == '>') {
        l->kind = MIL_T_ARROW;
        l->at += 2;
    } else if (is_digit(c) || c == '-' || c == '+' || c == '.') {
        read_number(l);
    } else if (c != '\0' && strchr("()[]{}<>,=;:?", c) != NULL) {
        l->kind = MIL_T_MARK;
        l->mark = c;
        l->at++;
    } else {
        bad(l, c == '\0' ? "a NUL byte" : (unsigned char)c >= 0x80 ? "a byte outside ASCII" : "this character has no meaning here");
    }
}
