#!/usr/bin/env bash
# A chat in the terminal, with bash (4.2 or later), curl and jq:
#
#   bash chat.sh [URL of the server]
#
# The server's key, if it has one, is taken from LLAMA_API_KEY. The end of the input (Ctrl-D) ends the chat.
#
# The conversation is one growing text, which /completion goes on with until the user would speak. When it outgrows the context,
# the server drops the older half of what follows the first n_keep tokens: the introduction always stays.
set -euo pipefail
shopt -s lastpipe  # the last part of a pipeline runs in this shell and can change its variables

server=${1:-http://127.0.0.1:8080}
introduction='A chat between a curious user and an assistant. The answers of the assistant are friendly, true and short.'

post() {  # post PATH: sends the JSON from the standard input
    curl --silent --show-error --no-buffer --header 'Content-Type: application/json' \
        ${LLAMA_API_KEY:+--header "Authorization: Bearer $LLAMA_API_KEY"} --data-binary @- "$server$1"
}

# In jq: ends with the server's message if there is an error.
check='if .error then "chat.sh: \(.error.message)\n" | halt_error(1) else . end'

n_keep=$(jq --null-input --arg content "$introduction" '{$content}' | post /tokenize | jq "$check | .tokens | length")
text=$introduction

while IFS= read -r -e -p '> ' line || [[ $line ]]; do
    [[ $line ]] || continue
    text+=$'\n'"User: $line"$'\n'"Assistant:"
    printf '%s' "$text" |
        jq --raw-input --slurp --argjson n_keep "$n_keep" \
            '{prompt: ., $n_keep, n_predict: 512, stop: ["\nUser:"], stream: true}' |
        post /completion |
        # Lines 'data: {…}' with empty ones between them; of each its piece of text, with a zero byte to end it.
        jq --raw-input --join-output --unbuffered \
            "select(. != \"\") | ltrimstr(\"data: \") | fromjson | $check | .content + \"\\u0000\"" |
        while IFS= read -r -d '' piece; do
            printf '%s' "$piece"
            text+=$piece
        done
    echo
done
