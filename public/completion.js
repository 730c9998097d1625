// Client of the server's /completion endpoint, for pages and for Node (18 or later).
//
//   import { llama } from '/completion.js'
//   for await (const chunk of llama('Once upon a time', { n_predict: 100 })) {
//     document.write(chunk.data.content)
//   }
//
// params:  any option of /completion.
// config:  controller  an AbortController: its abort() ends the generation, on the server too
//          api_url     where the server is; by default where this module came from
//          api_key     the server's key, if it has one
//
// Everything here throws an Error when the server refuses or breaks off; its `code` is the HTTP status and its `type` the
// server's name for the kind of error. An abort throws the controller's reason, an AbortError.

const DEFAULTS = { stream: true, n_predict: 500 }

const ORIGIN = import.meta.url.startsWith('http') ? new URL(import.meta.url).origin : 'http://127.0.0.1:8080'

let modelInfo = null

// Yields the events of the completion as they come: { data: { content, stop, … } }. The last one has data.stop true and tells
// of timings and settings. The generator's return value is the whole text.
export async function* llama(prompt, params = {}, config = {}) {
  const controller = config.controller ?? new AbortController()
  const response = await request('/completion', config, {
    method: 'POST',
    body: JSON.stringify({ ...DEFAULTS, ...params, prompt }),
    headers: { 'Content-Type': 'application/json', Accept: 'text/event-stream' },
    signal: controller.signal,
  })
  if (!response.headers.get('Content-Type')?.startsWith('text/event-stream')) {  // stream: false
    const data = await response.json()
    yield { data }
    return data.content
  }
  let content = ''
  let ended = false
  try {
    for await (const event of serverSentEvents(response.body)) {
      controller.signal.throwIfAborted()  // what came before the abort may still be in the buffer
      if (event.data === undefined || event.data === '[DONE]') continue
      const data = JSON.parse(event.data)
      if (data.error) throw serverError(data.error, response.status)
      content += data.content
      ended = data.stop
      if (data.generation_settings) modelInfo = data.generation_settings
      yield { ...event, data }
      if (ended) break
    }
    if (!ended) throw new Error('the server broke off the completion')
  } finally {
    if (!ended) controller.abort()  // whoever stops listening stops the generation
  }
  return content
}

// The whole text, when it is there.
export async function llamaPromise(prompt, params = {}, config = {}) {
  let content = ''
  for await (const chunk of llama(prompt, params, config)) content += chunk.data.content
  return content
}

// Calls callback(chunk) with every event; params has the prompt.
export async function llamaComplete(params, controller, callback) {
  const { prompt, ...rest } = params
  for await (const chunk of llama(prompt, rest, { controller })) callback(chunk)
}

// An EventTarget: 'message' for every event, then 'generation_settings', 'timings' and 'done', or 'error'. What they tell is in
// `detail`; that of 'done' has the whole text.
export function llamaEventTarget(prompt, params = {}, config = {}) {
  const target = new EventTarget()
  const tell = (name, detail) => target.dispatchEvent(new CustomEvent(name, { detail }))
  const run = async () => {
    let content = ''
    for await (const { data } of llama(prompt, params, config)) {
      content += data.content
      tell('message', data)
      if (data.generation_settings) tell('generation_settings', data.generation_settings)
      if (data.timings) tell('timings', data.timings)
    }
    tell('done', { content })
  }
  run().catch((error) => tell('error', error))
  return target
}

// The server's default settings with the model's name and context: { model, n_ctx, temp, … }.
export async function llamaModelInfo(config = {}) {
  modelInfo ??= await (await request('/model.json', config)).json()
  return modelInfo
}

async function request(path, { api_url, api_key }, options = {}) {
  const headers = { ...options.headers, ...(api_key && { Authorization: `Bearer ${api_key}` }) }
  const response = await fetch((api_url ?? ORIGIN).replace(/\/$/, '') + path, { ...options, headers })
  if (response.ok) return response
  const body = await response.json().catch(() => ({}))
  throw serverError(body.error ?? { message: response.statusText }, response.status)
}

function serverError({ code, message, type }, status) {
  return Object.assign(new Error(message ?? `status ${status}`), { code: code ?? status, type })
}

// Yields an object with the fields of each event in a stream of bytes: lines 'name: value' up to an empty line.
async function* serverSentEvents(body) {
  const reader = body.getReader()
  const decoder = new TextDecoder()
  let rest = ''
  try {
    while (true) {
      const { value, done } = await reader.read()
      if (done) return
      const lines = (rest + decoder.decode(value, { stream: true })).split('\n\n')
      rest = lines.pop()
      for (const block of lines) yield parseEvent(block)
    }
  } finally {
    reader.cancel().catch(() => {})
  }
}

function parseEvent(block) {
  const event = {}
  for (const line of block.split('\n')) {
    const colon = line.indexOf(':')
    if (colon > 0) event[line.slice(0, colon)] = line.slice(colon + 1).replace(/^ /, '')
  }
  return event
}
