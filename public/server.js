// What the page asks of the server: facts about the model, and answers, in one form for chats and texts.

import { llama, llamaChat } from './completion.js'
import { recall, remember } from './store.js'

// The page may be below a path of a reverse proxy.
const BASE = new URL('.', document.baseURI).href

export const apiKey = {
  get: () => recall('key', ''),
  set: (key) => remember('key', key || undefined),
}

const config = (controller) => ({ api_url: BASE, api_key: apiKey.get(), controller })

async function getJson(path) {
  const key = apiKey.get()
  const response = await fetch(BASE + path, { headers: key ? { Authorization: `Bearer ${key}` } : {} })
  const body = await response.json().catch(() => ({}))
  if (response.ok) return body
  throw Object.assign(new Error(body.error?.message ?? `status ${response.status}`), { code: response.status, body })
}

const delay = (ms, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, ms)
  signal?.addEventListener('abort', () => {
    clearTimeout(timer)
    reject(signal.reason)
  }, { once: true })
})

// The model's name, context and default settings, and whether it takes images. Waits while the server is being started or loads
// its model, telling onWait why.
export async function modelFacts(onWait) {
  while (true) {
    try {
      const settings = await getJson('model.json')
      const props = await getJson('props')
      return { settings, takesImages: Boolean(props.modalities?.vision) }
    } catch (error) {
      if (error.code && error.code !== 503) throw error
      onWait(describe(error))
      await delay(error.code ? 500 : 2000)
    }
  }
}

// 'ok', 'loading model', or undefined where nobody answers.
const health = async () => (await getJson('health').catch((error) => error.body))?.status

// An answer's parts as they come: { text, tokens? }, and last { timings, ended: 'eos' | 'word' | 'limit', truncated }.
//
//   request     { messages } or { prompt }, and options by the names of /completion
//   controller  its abort() ends the answer
//   onWait      is told why nothing comes yet
//   askForKey   a function that asks for the server's key; false when there is none
export async function* answer(request, { controller, onWait, askForKey }) {
  for (let isFirst = true; ; isFirst = false) {
    try {
      yield* 'messages' in request ? chatParts(request, controller) : textParts(request, controller)
      return
    } catch (error) {
      // Both refuse a request before any part of an answer.
      if (error.code === 401 && await askForKey()) continue
      if (error.code !== 503) throw error
      const status = await health()
      if (status === 'loading model') {
        onWait(describe(error))
        await delay(500, controller.signal)
      } else if (!(isFirst && status === 'ok')) throw error  // 'ok': the model has come in this moment
    }
  }
}

async function* textParts({ prompt, ...options }, controller) {
  // What completion.js sets unless told otherwise is left to the server's defaults.
  const params = { n_predict: undefined, temperature: undefined, stop: undefined, ...options }
  for await (const { data } of llama(prompt, params, config(controller))) {
    const tokens = data.completion_probabilities?.map(({ content, probs }) => ({
      text: content,
      prob: probs.find(({ tok_str }) => tok_str === content)?.prob ?? null,
      top: probs.map(({ tok_str, prob }) => [tok_str, prob]),
    }))
    if (!data.stop) yield { text: data.content, tokens }
    else {
      const ended = data.stopped_limit ? 'limit' : data.stopped_word ? 'word' : 'eos'
      yield { text: data.content, timings: data.timings, ended, truncated: data.truncated }
    }
  }
}

async function* chatParts({ messages, n_probs, ...options }, controller) {
  if (n_probs > 0) Object.assign(options, { logprobs: true, top_logprobs: n_probs })
  for await (const { data } of llamaChat(messages, options, config(controller))) {
    const [choice] = data.choices
    const tokens = choice?.logprobs?.content?.map(({ token, logprob, top_logprobs }) => ({
      text: token,
      prob: Math.exp(logprob),
      top: top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]),
    }))
    if (choice?.finish_reason) {
      yield { text: '', timings: data.timings, ended: choice.finish_reason === 'length' ? 'limit' : 'eos' }
    } else if (choice?.delta.content || tokens) yield { text: choice.delta.content ?? '', tokens }
  }
}

// An error as the page tells it.
export function describe(error) {
  if (error.code === 401) return 'The server wants its API key.'
  if (error.code === 429) return 'The server is busy: too many requests wait already. Try again in a moment.'
  if (error.code === 503 && /load/.test(error.message)) return 'The model is being loaded …'
  if (error.code === 503) return `The server is not available: ${error.message}.`
  if (error.code) return `The server refused: ${error.message}`
  // A failed fetch, or a stream that broke.
  return error instanceof TypeError ? 'The server cannot be reached. Is it still running?' : error.message
}
