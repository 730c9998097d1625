// A chat in the terminal:
//
//   node chat.mjs [URL of the server]
//
// For Node 16 or later, which need not have fetch. The server's key, if it has one, is taken from LLAMA_API_KEY. The end of the
// input (Ctrl-D) ends the chat.
//
// The whole conversation goes to /v1/chat/completions each time; the server, which remembers what it has evaluated, works only
// on what is new.

import http from 'node:http'
import https from 'node:https'
import readline from 'node:readline'

const SERVER = process.argv[2] ?? 'http://127.0.0.1:8080'
const KEY = process.env.LLAMA_API_KEY
const SYSTEM = { role: 'system', content: 'You are a friendly assistant. Your answers are short.' }

function request(method, path, fields) {
  const url = new URL(path, SERVER)
  const headers = { 'Content-Type': 'application/json', ...(KEY && { Authorization: `Bearer ${KEY}` }) }
  const { request } = url.protocol === 'https:' ? https : http
  return new Promise((resolve, reject) => {
    const sent = request(url, { method, headers }, (response) => resolve(response.setEncoding('utf8')))
    sent.on('error', reject)
    sent.end(fields && JSON.stringify(fields))
  })
}

async function json(response) {
  let body = ''
  for await (const chunk of response) body += chunk
  if (response.statusCode === 200) return JSON.parse(body)
  throw new Error(body.startsWith('{') ? JSON.parse(body).error.message : `status ${response.statusCode}`)
}

// Yields the data of a stream's events: lines 'data: …' with an empty line after each.
async function* events(response) {
  let rest = ''
  for await (const chunk of response) {
    const lines = (rest + chunk).split('\n')
    rest = lines.pop()
    for (const line of lines) if (line.startsWith('data: ')) yield line.slice('data: '.length)
  }
}

// Yields the answer to a conversation piece by piece.
async function* answer(messages) {
  const response = await request('POST', '/v1/chat/completions', { messages, stream: true })
  if (response.statusCode !== 200) await json(response)  // throws
  for await (const data of events(response)) {
    if (data === '[DONE]') return
    const { error, choices } = JSON.parse(data)
    if (error) throw new Error(error.message)
    yield choices[0].delta.content ?? ''
  }
}

// Forgets the oldest turns until a quarter of the context is left for the answer.
async function forget(messages, nCtx) {
  const roleAndMarks = 8  // tokens, about
  const size = async ({ content }) => (await json(await request('POST', '/tokenize', { content }))).tokens.length + roleAndMarks
  const sizes = await Promise.all(messages.map(size))
  while (messages.length > 2 && sizes.reduce((a, b) => a + b) > 0.75 * nCtx) for (const list of [messages, sizes]) list.splice(1, 2)
}

async function chat() {
  const { n_ctx } = await json(await request('GET', '/model.json'))
  const messages = [SYSTEM]
  const input = readline.createInterface({ input: process.stdin, output: process.stdin.isTTY ? process.stdout : undefined })
  input.setPrompt(process.stdin.isTTY ? '> ' : '')
  input.prompt()
  for await (const line of input) {
    if (line.trim()) {
      messages.push({ role: 'user', content: line.trim() })
      await forget(messages, n_ctx)
      let content = ''
      for await (const piece of answer(messages)) {
        process.stdout.write(piece)
        content += piece
      }
      process.stdout.write('\n')
      messages.push({ role: 'assistant', content })
    }
    input.prompt()
  }
}

chat().catch((error) => {
  console.error(`chat.mjs: ${error.message}`)
  process.exit(1)
})
