"""A chat with OpenAI's own client: ``python openai_client.py [URL of the server]`` after ``pip install openai``."""

import sys

import openai

server = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8080"
client = openai.OpenAI(base_url=f"{server}/v1", api_key="sk-no-key-required")
completion = client.chat.completions.create(
    model="gpt-3.5-turbo",  # any name will do: the server has one model
    messages=[
        {"role": "system", "content": "You are an assistant. Your top priority is helping users with their requests."},
        {"role": "user", "content": "Write a limerick about python exceptions"},
    ],
)
print(completion.choices[0].message.content)
