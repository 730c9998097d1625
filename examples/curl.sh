#!/usr/bin/env bash
# The two requests to begin with: bash curl.sh [URL of the server]
set -euo pipefail

server=${1:-http://localhost:8080}

curl --request POST \
    --url "$server/completion" \
    --header "Content-Type: application/json" \
    --data '{"prompt": "Building a website can be done in 10 simple steps:","n_predict": 128}'
echo

curl "$server/v1/chat/completions" \
    -H "Content-Type: application/json" \
    -H "Authorization: Bearer ${LLAMA_API_KEY:-no-key}" \
    -d '{
        "model": "gpt-3.5-turbo",
        "messages": [
            {
                "role": "system",
                "content": "You are an assistant. Your top priority is helping users with their requests."
            },
            {
                "role": "user",
                "content": "Write a limerick about python exceptions"
            }
        ]
    }'
echo
