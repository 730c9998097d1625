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

// Adds text to an element once a frame, however fast it comes: laying the page out for every token would hold it up.
function writer(element, onPaint) {
  let waiting = ''
  let frame = 0
  const paint = () => {
    frame = 0
    const atEnd = window.innerHeight + window.scrollY >= document.body.scrollHeight - 40
    element.append(waiting)
    waiting = ''
    onPaint()
    if (atEnd) window.scrollTo(0, document.body.scrollHeight)
  }
  return {
    write(text) {
      waiting += text
      frame ||= requestAnimationFrame(paint)
    },
    end() {
      cancelAnimationFrame(frame)
      paint()
    },
  }
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
  const output = writer(text, () => show(`${n} tokens in ${((performance.now() - began) / 1000).toFixed(1)} s`))
  let message = ''
  let bad = false
  try {
    for await (const { data } of llama(prompt, params, { controller })) {
      n += 1
      output.write(data.content)
      if (data.stop) message = speed(data)
    }
  } catch (error) {
    bad = !signal.aborted
    message = bad ? error.message : `stopped after ${n} tokens`
  } finally {
    output.end()
    show(message, bad)
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
