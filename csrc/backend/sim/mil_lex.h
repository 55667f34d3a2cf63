/* Words of MIL text. */
#ifndef ANELLM_SIM_MIL_LEX_H
#define ANELLM_SIM_MIL_LEX_H

#include <stdint.h>

#include "backend/sim/mil.h"

enum mil_token { MIL_T_END, MIL_T_WORD, MIL_T_NUMBER, MIL_T_STRING, MIL_T_ARROW, MIL_T_MARK, MIL_T_BAD };

struct mil_lexer {
    const char *at, *end, *line_start;
    int32_t line;
    /* the token in front */
    int kind;
    char mark;              /* of MIL_T_MARK: ( ) [ ] { } < > , = ; : ? */
    struct mil_name text;   /* the word; the string without its quotes */
    double number;
    uint64_t integer;       /* |number|, if it is written as a whole number */
    int32_t is_integer, is_negative;
    struct mil_place place;
    const char *problem;    /* of MIL_T_BAD */
};

void mil_lex_start(struct mil_lexer *lexer, const char *text, size_t bytes);
void mil_lex_next(struct mil_lexer *lexer);

#endif
