// Client of the server, for pages and for Node (16 or later; before 18 with a fetch of your own as globalThis.fetch).
//
//   import { llama } from '/completion.js'
//   for await (const chunk of llama('Once upon a time', { n_predict: 100 })) {
//     document.write(chunk.data.content)
//   }
//
// params:  any option of the endpoint. For /completion these are set unless you say otherwise: stream, n_predict 500,
//          temperature 0.2, stop ['</s>'].
// config:  controller  an AbortController: its abort() ends the generation, on the server too
//          api_url     where the server is; by default where this module came from
//          endpoint    the path there, if it is not the usual one
//          api_key     the server's key, if it has one (params may have it as well)
//
// Everything here throws an Error when the server refuses or breaks off; its `code` is the HTTP status and its `type` the
// server's name for the kind of error. An abort throws the controller's reason, an AbortError.

const DEFAULTS = { stream: true, n_predict: 500, temperature: 0.2, stop: ['</s>'] }

const ORIGIN = import.meta.url.startsWith('http') ? new URL(import.meta.url).origin : 'http://127.0.0.1:8080'

let modelInfo = null

// Yields the events of a completion as they come: { data: { content, stop, … } }. The last one has data.stop true and tells of
// timings and settings. The generator's return value is the whole text. (Of an array of prompts each has such a last event; data
// tells the prompt's index.)
export async function* llama(prompt, params = {}, config = {}) {
  let content = ''
  for await (const event of post('/completion', { ...DEFAULTS, ...params, prompt }, config, (data) => data.stop)) {
    for (const data of [event.data].flat()) {
      content += data.content
      if (data.generation_settings) modelInfo = data.generation_settings
    }
    yield event
  }
  return content
}

// The same for a chat: messages are [{ role, content }, …], params any option of /v1/chat/completions or /completion. The
// events' data are OpenAI's chunks: the text is in data.choices[0].delta.content. The return value is the whole answer.
export async function* llamaChat(messages, params = {}, config = {}) {
  let content = ''
  const body = { stream: true, ...params, messages }
  for await (const event of post('/v1/chat/completions', body, config, (data) => data === DONE)) {
    if (event.data === DONE) break
    const choice = event.data.choices.find(({ index }) => index === 0)
    content += (choice?.delta ?? choice?.message)?.content ?? ''
    yield event
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
  for await (const chunk of llama(params.prompt, params, { controller })) callback(chunk)
}

// An EventTarget: 'message' for every event, then 'generation_settings', 'timings' and 'done', or 'error'. What they tell is in
// `detail`; that of 'done' has the whole text.
export function llamaEventTarget(prompt, params = {}, config = {}) {
  const target = new EventTarget()
  const tell = (name, detail) => target.dispatchEvent(Object.assign(new Event(name), { detail }))
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

// ---- requests and their streams ---------------------------------------------------------------------------------------

const DONE = '[DONE]'

// Posts a body and yields the answer's events, each with its data decoded. One of them must be such that isLast(data), or
// the answer is not whole.
async function* post(path, { api_key, ...body }, config, isLast) {
  const controller = config.controller ?? new AbortController()
  const { signal } = controller
  const response = await request(config.endpoint ?? path, { api_key, ...config }, {
    method: 'POST',
    body: JSON.stringify(body),
    headers: { 'Content-Type': 'application/json', Accept: 'text/event-stream' },
    signal,
  })
  if (!response.headers.get('Content-Type')?.startsWith('text/event-stream')) {  // stream: false
    yield { data: await response.json() }
    return
  }
  let ended = false
  try {
    for await (const event of serverSentEvents(response.body)) {
      if (signal.aborted) throw abortReason(signal)  // what came before the abort may still be in the buffer
      if (event.error) throw serverError(parsed(event.error), response.status)
      if (!event.data) continue
      const data = event.data === DONE ? DONE : JSON.parse(event.data)
      if (data.error) throw serverError(data.error, response.status)
      ended ||= Boolean(isLast(data))
      yield { ...event, data }
    }
    if (!ended) throw new Error('the server broke off the answer')
  } finally {
    if (!ended) controller.abort()  // whoever stops listening stops the generation
  }
}

// A response that is no error.
async function request(path, { api_url, api_key }, options = {}) {
  const headers = { ...options.headers, ...(api_key && { Authorization: `Bearer ${api_key}` }) }
  const response = await fetch((api_url ?? ORIGIN).replace(/\/+$/, '') + path, { ...options, headers })
  if (response.ok) return response
  const body = parsed(await response.text())
  throw serverError(body.error ?? { message: `status ${response.status} ${response.statusText}` }, response.status)
}

function serverError(error, status) {
  const { code, message, type, content } = typeof error === 'string' ? { message: error } : error
  return Object.assign(new Error(message ?? content ?? `status ${status}`), { code: code ?? status, type })
}

function parsed(text) {
  try {
    return Object(JSON.parse(text))
  } catch {
    return {}
  }
}

function abortReason(signal) {
  return signal.reason ?? Object.assign(new Error('This operation was aborted'), { name: 'AbortError' })
}

// ---- server-sent events -------------------------------------------------------------------------------------------------

// Yields an object with the fields of each event in a stream of bytes. An event is some lines 'name: value' and an empty one;
// lines that begin with a colon are comments. https://html.spec.whatwg.org/multipage/server-sent-events.html
async function* serverSentEvents(body) {
  let event = null
  for await (const line of lines(body)) {
    if (line === '') {
      if (event) yield event
      event = null
      continue
    }
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line)
    if (name === '') continue
    event ??= {}
    event[name] = name === 'data' && 'data' in event ? `${event.data}\n${value}` : value
  }
  if (event) yield event  // the last empty line may be missing
}

// The lines of a stream, which may end in \n, \r\n or \r and be cut anywhere.
async function* lines(body) {
  const decoder = new TextDecoder()
  let rest = ''
  for await (const bytes of chunks(body)) {
    const text = rest + decoder.decode(bytes, { stream: true })
    const end = text.endsWith('\r') ? text.length - 1 : text.length  // its \n may be on the way
    const found = text.slice(0, end).split(/\r\n|\n|\r/)
    rest = found.pop() + text.slice(end)
    yield* found
  }
  if (rest) yield rest.replace(/\r$/, '')
}

// A web stream's or a Node stream's pieces. Not every browser lets its streams be iterated over.
async function* chunks(body) {
  if (!body.getReader) {
    yield* body
    return
  }
  const reader = body.getReader()
  try {
    while (true) {
      const { value, done } = await reader.read()
      if (done) return
      yield value
    }
  } finally {
    reader.cancel().catch(() => {})
  }
}
