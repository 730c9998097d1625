// The page at /: sends a prompt, shows the text as it comes, and how fast it came.

import { llama, llamaModelInfo } from '/completion.js'

const $ = (id) => document.getElementById(id)
let controller = null

function span(className, text = '') {
  const element = document.createElement('span')
  element.className = className
  element.textContent = text
  return element
}

function show(message, bad = false) {
  $('status').textContent = message
  $('status').classList.toggle('bad', bad)
}

function setBusy(busy) {
  $('send').disabled = busy
  $('stop').disabled = !busy
  document.body.dataset.state = busy ? 'busy' : 'idle'
}

function speed({ timings, tokens_evaluated, stopped_limit, truncated }) {
  const rate = (n, ms) => (ms > 0 ? `${((1000 * n) / ms).toFixed(1)} tokens/s` : '–')
  const parts = [
    `prompt: ${tokens_evaluated} tokens, ${timings.prompt_n} of them new, ${rate(timings.prompt_n, timings.prompt_ms)}`,
    `answer: ${timings.predicted_n} tokens, ${rate(timings.predicted_n, timings.predicted_ms)}`,
  ]
  if (stopped_limit) parts.push('stopped at the limit')
  if (truncated) parts.push('the context was exceeded')
  return parts.join(' · ')
}

async function send() {
  if (controller) return
  const prompt = $('prompt').value
  const params = { n_predict: $('n_predict').valueAsNumber, temperature: $('temperature').valueAsNumber }
  const text = span('new')
  $('output').replaceChildren(span('prompt', prompt), text)
  controller = new AbortController()
  const { signal } = controller
  setBusy(true)
  show('reading the prompt …')
  const began = performance.now()
  let n = 0
  try {
    for await (const { data } of llama(prompt, params, { controller })) {
      const atEnd = window.innerHeight + window.scrollY >= document.body.scrollHeight - 40
      text.append(data.content)
      if (atEnd) window.scrollTo(0, document.body.scrollHeight)
      n += 1
      show(data.stop ? speed(data) : `${n} tokens in ${((performance.now() - began) / 1000).toFixed(1)} s`)
    }
  } catch (error) {
    if (signal.aborted) show(`stopped after ${n} tokens`)
    else show(error.message, true)
  } finally {
    controller = null
    setBusy(false)
  }
}

function stop() {
  controller?.abort()
}

$('form').addEventListener('submit', (event) => {
  event.preventDefault()
  send()
})
$('stop').addEventListener('click', stop)
window.addEventListener('pagehide', stop)
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') stop()
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) $('form').requestSubmit()
})

setBusy(false)
llamaModelInfo().then(
  ({ model, n_ctx }) => { $('model').textContent = `${model.split('/').pop()} · ${n_ctx} tokens` },
  (error) => show(error.message, true),
)
